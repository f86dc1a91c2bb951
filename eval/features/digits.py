"""The digit classifier as an extractor: what the metrics are tried with where no published weights are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from eval.digits.classifier import DigitClassifier, train_classifier
from eval.features.extractor import Extractor, Identity
from eval.features.weights import sha256_of_tensors
from train.data import TensorData


class DigitFeatures(Extractor):
    """The hidden layer (64) after its ReLU, and the logits of the ten `classes`, of 8x8 digits; of colours, the mean."""

    classes = tuple("0123456789")

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self.widths = {"features": classifier.hidden.out_features, "logits": len(self.classes)}
        self.identity = Identity("digit classifier", sha256_of_tensors(classifier.state_dict()), "8x8, mean of the colours, -1 ... 1")

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """Grey, -1 ... 1. ValueError for a picture that is not 8x8."""
        for picture in pictures:
            if picture.shape != (3, 8, 8):
                raise ValueError(f"the digit classifier takes pictures of 8x8 pixels, (3, 8, 8), not {tuple(picture.shape)}")
        return torch.stack(list(pictures)).float().mean(1, keepdim=True) / 127.5 - 1

    @torch.inference_mode()
    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """See `Extractor`."""
        features = self.classifier.features(x)
        found = {"features": features, "logits": self.classifier.classes(features)}
        return {name: found[name] for name in outputs}


def digit_features(training: TensorData) -> DigitFeatures:
    """The extractor with a classifier trained on these digits: seconds, and the same for the same digits and machine."""
    return DigitFeatures(train_classifier(training))
