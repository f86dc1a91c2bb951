"""Precision, recall, density and coverage: balls around features that reach to their k-th neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.distances import ROWS, exact_distances, nearest_others, squared_distances

ROUNDING = 1e-12  # of squared norms; the error of squared_distances is less


class PrecisionRecall(NamedTuple):
    """precision: share of samples within the reference; recall: share of the reference within the samples."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """How samples lie in the reference's balls.

    density   mean number of balls that a sample lies in, over k: about 1 for equal distributions, maybe above
    coverage  share of balls that hold a sample
    error     standard error of density over the samples, for the same balls
    """

    density: float
    coverage: float
    error: float


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> PrecisionRecall:
    """Of features (N, D) and (M, D): shares within the other set's balls, borders included.

    Counts are exact, also for copies and ties. Needs k + 1 of each set. Kynkaanniemi et al. 2019, eq. 1 and
    2.
    """
    samples, reference = _checked(samples, reference)
    return PrecisionRecall(_share_within(samples, reference, k), _share_within(reference, samples, k))


def _share_within(points: Tensor, centres: Tensor, k: int) -> float:
    radius = nearest_others(centres, k).distance[:, -1]
    within = sum((distance <= radius).any(1).sum() for distance in _distances(points, centres, radius))
    return int(within) / len(points)


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> DensityCoverage:
    """Of features (N, D) and (M, D): samples within the reference's balls, borders excluded.

    Counts are exact. Needs k + 1 of the reference. Naeem et al. 2020, eq. 3 and 4, and their code.
    """
    samples, reference = _checked(samples, reference)
    radius = nearest_others(reference, k).distance[:, -1]
    inside, covered = [], torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for distance in _distances(samples, reference, radius):
        within = distance < radius
        inside.append(within.sum(1))
        covered |= within.any(0)
    each = torch.cat(inside).double() / k
    error = float(each.std() / len(each) ** 0.5)
    return DensityCoverage(float(each.mean()), int(covered.sum()) / len(reference), error)


def _checked(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    shapes = samples.shape, reference.shape
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1] or len(samples) == 0:
        one, other = map(tuple, shapes)
        raise ValueError(f"two (N, D) sets of equal width are needed, not {one} and {other}")
    return samples.detach().double(), reference.detach().double()


def _distances(points: Tensor, centres: Tensor, radius: Tensor) -> Iterator[Tensor]:
    """(rows, M) per block: distances to the centres, exact where rounding could cross radius (M,)."""
    for rows in points.split(ROWS):
        squared = squared_distances(rows, centres)
        slack = ROUNDING * (rows.square().sum(1)[:, None] + centres.square().sum(1))
        unsure = ((squared - radius.square()).abs() <= slack).nonzero()
        distance = squared.sqrt_()
        for i, j in (pairs.unbind(1) for pairs in unsure.split(ROWS * ROWS // 16)):
            distance[i, j] = exact_distances(rows[i], centres[j])
        yield distance
