"""Distance to the nearest training image: samples nearer than unseen real data are copies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eval.metrics.accuracy import share
from eval.metrics.distances import nearest
from eval.metrics.figure import Figure


@dataclass(frozen=True)
class Memorised:
    """share of samples nearer than `threshold` to a training image; distance, index (N,) of the nearest."""

    share: Figure
    threshold: float
    distance: Tensor
    index: Tensor


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """(N,): Euclidean distance of x (N, ...) to the nearest of reference (M, ...), float64; 0 of a copy."""
    return nearest(x.flatten(1).double(), reference.flatten(1).double()).distance[:, 0]


def memorised(samples: Tensor, training: Tensor, held_out: Tensor) -> Memorised:
    """Share of samples (N, ...) nearer to training (M, ...) than 99 % of held-out images (K, ...) are.

    It is 0.01 for a perfect model that copies nothing. Its interval is Wilson's, for this threshold.
    """
    threshold = float(nearest_distance(held_out, training).quantile(0.01))
    found = nearest(samples.flatten(1).double(), training.flatten(1).double())
    distance = found.distance[:, 0]
    copied = share(int((distance < threshold).sum()), len(samples))
    return Memorised(copied, threshold, distance, found.index[:, 0])
