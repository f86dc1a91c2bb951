"""The judge of digit samples: every figure of a set of images, against held-out real digits and the training set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eval.digit_classifier import DigitClassifier, train_classifier
from eval.frechet import frechet_distance
from eval.kernel import kernel_distance
from eval.moments import Moments
from eval.neighbours import nearest_distance
from samplers.pictures import to_uint8
from train.data import TensorData


class Figures(NamedTuple):
    """frechet, kernel: to the held-out images; accuracy: share of labels met; nearest: mean distance to the training set."""

    frechet: float
    kernel: float
    kernel_error: float
    accuracy: float
    nearest: float


class DigitJudge:
    """Knows the train split only through a classifier and as neighbours, the held-out split as reference features."""

    def __init__(self, train: TensorData, held_out: TensorData, classifier: DigitClassifier | None = None) -> None:
        if train.labels is None or held_out.labels is None:
            raise ValueError("judging labels needs labelled data")
        self.train, self.held_out, self.labels = train, held_out, held_out.labels
        self.classifier = classifier or train_classifier(train)
        self.reference = self.features(held_out.images)
        self.moments = Moments.of(self.reference)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 64), of images in [-1, 1]."""
        return self.classifier.features(images)

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor) -> Figures:
        """Figures of images (N, 1, 8, 8) that were asked to show `labels` (N,), as they would be written to 8-bit files."""
        images = to_uint8(images).float() / 127.5 - 1
        features = self.features(images)
        kernel = kernel_distance(features, self.reference)
        return Figures(
            frechet=frechet_distance(Moments.of(features), self.moments),
            kernel=kernel.value,
            kernel_error=kernel.error,
            accuracy=float((self.classifier(images).argmax(1) == labels).float().mean()),
            nearest=float(nearest_distance(images, self.train.images).mean()),
        )
