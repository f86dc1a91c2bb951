"""Distance to the nearest training image: samples that lie closer than unseen real data does are copies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eval.metrics.accuracy import share
from eval.metrics.distances import nearest
from eval.metrics.figure import Figure


@dataclass(frozen=True)
class Memorised:
    """share: of samples nearer than `threshold` to a training image; distance, index (N,): of each sample's
    nearest training image."""

    share: Figure
    threshold: float
    distance: Tensor
    index: Tensor


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """For each image of x (N, ...) the Euclidean distance to its nearest image of reference (M, ...), (N,),
    in float64; of a copy 0."""
    return nearest(x.flatten(1).double(), reference.flatten(1).double()).distance[:, 0]


def memorised(samples: Tensor, training: Tensor, held_out: Tensor) -> Memorised:
    """Share of samples (N, ...) nearer to a training image (M, ...) than all but 1 % of held-out images (K,
    ...) are.

    Of a model that copies nothing and draws as well as life it is 0.01; its interval is Wilson's, for the
    threshold as found.
    """
    threshold = float(nearest_distance(held_out, training).quantile(0.01))
    found = nearest(samples.flatten(1).double(), training.flatten(1).double())
    distance = found.distance[:, 0]
    return Memorised(
        share(int((distance < threshold).sum()), len(samples)), threshold, distance, found.index[:, 0]
    )
