"""A small digit classifier as an extractor, for the digits benchmark and for trials."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eval.features.extractor import Extractor, Identity
from eval.features.weights import sha256_of_tensors
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
    """Train the classifier: seconds on a CPU, and the same weights for the same seed and machine."""
    if data.labels is None:
        raise ValueError("a classifier needs labels")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DigitClassifier()
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
        steps = -(-len(data) // 64) * epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in tqdm(range(epochs), "training the digit classifier", leave=False, disable=None):
            for index in torch.randperm(len(data)).split(64):
                loss = F.cross_entropy(net(data.images[index]), data.labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()


class DigitFeatures(Extractor):
    """features (64) after the ReLU, logits of ten `classes`, pixels (64) in -1 ... 1, of 8x8 digits."""

    classes = tuple("0123456789")

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self.widths = {"features": classifier.hidden.out_features, "logits": len(self.classes), "pixels": 64}
        weights = sha256_of_tensors(classifier.state_dict())
        self.identity = Identity("digit classifier", weights, "8x8, mean of the colours, -1 ... 1")

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """Grey, -1 ... 1. ValueError for a picture that is not 8x8."""
        for picture in pictures:
            if picture.shape != (3, 8, 8):
                shape = tuple(picture.shape)
                raise ValueError(f"the digit classifier takes pictures of 8x8 pixels, (3, 8, 8), not {shape}")
        return torch.stack(list(pictures)).float().mean(1, keepdim=True) / 127.5 - 1

    @torch.inference_mode()
    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """See `Extractor`."""
        features = self.classifier.features(x)
        found = {"features": features, "logits": self.classifier.classes(features), "pixels": x.flatten(1)}
        return {name: found[name] for name in outputs}
