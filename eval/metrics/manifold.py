"""Precision, recall, density and coverage: how far two sets of features lie within each other's balls around
neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.distances import ROWS, exact_distances, nearest_others, squared_distances

ROUNDING = 1e-12  # of squared norms: more than squared_distances are off by


class PrecisionRecall(NamedTuple):
    """precision: share of samples within the reference; recall: share of the reference within the samples."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """density: mean number of reference balls a sample lies in, over k; about 1 for equal distributions, and
    may be above.
    coverage: share of reference balls that hold a sample. error: standard error of density over the samples,
        for the balls as they are.
    """

    density: float
    coverage: float
    error: float


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> PrecisionRecall:
    """Of features (N, D) and (M, D): in a ball around a member of the other set that reaches to its k-th
    neighbour there, border included (Kynkaanniemi et al. 2019, eq. 1 and 2). Both counts are exact in
    float64, copies and ties included. Needs k + 1 of each set.
    """
    samples, reference = _checked(samples, reference)
    precision, recall = (
        int(sum((distance <= radius).any(1).sum() for distance in _distances(points, centres, radius)))
        / len(points)
        for points, centres in ((samples, reference), (reference, samples))
        for radius in (nearest_others(centres, k).distance[:, -1],)
    )
    return PrecisionRecall(precision, recall)


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> DensityCoverage:
    """Of features (N, D) and (M, D): inside the balls around members of the reference that reach to their
    k-th neighbour there, border excluded (Naeem et al. 2020, eq. 3 and 4, and their code). Both counts are
    exact in float64. Needs k + 1 of the reference.
    """
    samples, reference = _checked(samples, reference)
    radius = nearest_others(reference, k).distance[:, -1]
    inside, covered = [], torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for distance in _distances(samples, reference, radius):
        within = distance < radius
        inside.append(within.sum(1))
        covered |= within.any(0)
    each = torch.cat(inside).double() / k
    return DensityCoverage(
        float(each.mean()), int(covered.sum()) / len(reference), float(each.std() / len(each) ** 0.5)
    )


def _checked(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """In float64."""
    if (
        samples.ndim != 2
        or reference.ndim != 2
        or samples.shape[1] != reference.shape[1]
        or len(samples) == 0
    ):
        raise ValueError(
            f"two (N, D) sets of equal width are needed, not {tuple(samples.shape)} and "
            f"{tuple(reference.shape)}"
        )
    return samples.detach().double(), reference.detach().double()


def _distances(points: Tensor, centres: Tensor, radius: Tensor) -> Iterator[Tensor]:
    """(rows, M) for block after block of the points: distances to the centres, exact wherever rounding could
    place them on the wrong side of the centre's radius (M,).
    """
    for rows in points.split(ROWS):
        squared = squared_distances(rows, centres)
        slack = ROUNDING * (rows.square().sum(1)[:, None] + centres.square().sum(1))
        unsure = ((squared - radius.square()).abs() <= slack).nonzero()
        distance = squared.sqrt_()
        for i, j in (pairs.unbind(1) for pairs in unsure.split(ROWS * ROWS // 16)):
            distance[i, j] = exact_distances(rows[i], centres[j])
        yield distance
