"""A small digit classifier: its last hidden layer is the feature space of the digits benchmark, its output the judge of labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data import TensorData


class DigitClassifier(nn.Module):
    """Three convolutions on 8x8 images in [-1, 1], then 64 features, then 10 classes."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden = nn.Linear(64 * 4, features)
        self.classes = nn.Linear(features, 10)

    def features(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 64), after the ReLU."""
        return F.relu(self.hidden(self.convolutions(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(F.dropout(self.features(x), 0.5, self.training))


def train_classifier(data: TensorData, epochs: int = 40, seed: int = 0) -> DigitClassifier:
    """Fit the classifier to the train split; seconds on a CPU, the same weights for the same seed and machine."""
    if data.labels is None:
        raise ValueError("a classifier needs labels")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DigitClassifier()
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
        steps = -(-len(data) // 64) * epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(epochs):
            for index in torch.randperm(len(data)).split(64):
                loss = F.cross_entropy(net(data.images[index]), data.labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()
