"""The judge of digit samples: every figure of a set of images, against held-out real digits and the training set."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from eval.digits.classifier import DigitClassifier, train_classifier
from eval.metrics.frechet import frechet_distance
from eval.metrics.kernel import kernel_distance
from eval.metrics.moments import Moments
from eval.metrics.neighbours import memorised
from samplers.pictures import to_uint8
from train.data import TensorData


class Figures(NamedTuple):
    """frechet, kernel: to the held-out images; accuracy: share of labels met; nearest: mean distance to the training set;
    copies: share of images nearer to the training set than all but 1 % of held-out images are. NaN: not asked for.
    """

    frechet: float = math.nan
    kernel: float = math.nan
    kernel_error: float = math.nan
    accuracy: float = math.nan
    nearest: float = math.nan
    copies: float = math.nan


class DigitJudge:
    """Knows the train split only through a classifier and as neighbours, the held-out split as reference features."""

    def __init__(self, train: TensorData, held_out: TensorData, classifier: DigitClassifier | None = None) -> None:
        if train.labels is None or held_out.labels is None:
            raise ValueError("judging labels needs labelled data")
        self.train, self.held_out, self.labels = train, held_out, held_out.labels
        self.classifier = classifier or train_classifier(train)
        self.reference = self.features(held_out.images)
        self.moments = Moments.of(self.reference)

    def classes(self, n: int) -> Tensor:
        """The labels (n,) that samples are asked to show, mixed: each class in the proportion it has among the held-out images.

        Another proportion would be a distance of its own. ValueError where there are fewer held-out images than n.
        """
        if not 1 <= n <= len(self.labels):
            raise ValueError(f"n must lie in 1 ... {len(self.labels)}, the number of held-out digits, not {n}")
        proportional = self.labels.sort().values[torch.arange(n) * len(self.labels) // n]
        return proportional[torch.randperm(n, generator=torch.Generator().manual_seed(0))]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 64), of images in [-1, 1]."""
        return self.classifier.features(images)

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor, wanted: Collection[str] = Figures._fields) -> Figures:
        """Figures of images (N, 1, 8, 8) that were asked to show `labels` (N,), as they would be written to 8-bit files.

        Both sets have a fixed number of images per class, which the kernel distance takes into account.
        """
        images = to_uint8(images).float() / 127.5 - 1
        found = {}
        if "frechet" in wanted or "kernel" in wanted:
            features = self.features(images)
        if "frechet" in wanted:
            found["frechet"] = frechet_distance(Moments.of(features), self.moments)
        if "kernel" in wanted:
            found["kernel"], found["kernel_error"] = kernel_distance(features, self.reference, labels, self.labels)
        if "accuracy" in wanted:
            found["accuracy"] = float((self.classifier(images).argmax(1) == labels).float().mean())
        if "nearest" in wanted or "copies" in wanted:
            copied = memorised(images, self.train.images, self.held_out.images)
            found |= {"nearest": float(copied.distance.mean()), "copies": copied.share.value}
        return Figures(**found)
