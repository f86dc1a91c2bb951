"""Frechet distance between two sets of features as normal distributions (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics.figure import Figure
from eval.metrics.moments import GroupedMoments, Moments

BLOCK = 256
POINTS = 15
SMALLEST = 5000
ROWS = 4096
SPARE = 16  # columns beyond the rank, so that the range is found whole
EPS = torch.finfo(torch.float64).eps


class Reference:
    """Moments that many others are compared with: the root of their covariance is computed once.

    root  lower trapezoidal (D, rank), root root^T = covariance: Cholesky's at full rank, else from the
          eigenvalues above D * 2.2e-16 of the largest
    """

    def __init__(self, moments: Moments) -> None:
        self.mean, self.covariance = moments.mean, moments.covariance
        self.root = _root(self.covariance, moments.n)


def frechet_distance(a: Moments, b: Moments | Reference) -> float:
    """|mean_a - mean_b|^2 + tr (C_a + C_b - 2 (C_a C_b)^(1/2)), in squared feature units.

    tr (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of R_b^T C_a R_b for any factor C_b = R_b
    R_b^T. Rounding moves eigenvalues by 2.2e-16 of the largest, which is much for the roots of small ones. If
    the error could reach 1e-10 of the sum (as with N < D), it is instead the sum of the singular values of
    R_a^T R_b, which squares nothing. So the error is below 1e-10 of tr C_a + tr C_b. In a covariance without
    full rank, variances below D * 2.2e-16 of the largest count as 0.
    """
    if len(a.mean) != len(b.mean):
        widths = f"{len(a.mean)} and {len(b.mean)}"
        raise ValueError(f"features of different width, {widths}: were they made by the same extractor?")
    reference = b if isinstance(b, Reference) else Reference(b)
    covariance = a.covariance.to(reference.mean.device)
    difference = (a.mean.to(reference.mean.device) - reference.mean).square().sum()
    traces = difference + covariance.trace() + reference.covariance.trace()
    return max(0.0, float(traces - 2 * _cross(covariance, a.n, reference.root)))


def frechet_infinity(
    samples: Tensor | GroupedMoments, reference: Moments | Reference, seed: int = 2020
) -> Figure:
    """The Frechet distance extrapolated to infinitely many samples (FID-infinity, Chong & Forsyth 2020, 3.3).

    Its bias is of first order in 1/n: distances of 15 numbers n = 5,000 ... N of samples (from N / 2 below N
    = 10,000) are fitted linearly in 1/n, and the intercept is returned. If n is not well above D, higher
    orders remain.

    samples  features (N, D), random subsets of which are taken, as in the paper; or moments of at least 3
             groups, random groups of which are taken, up to 15 different numbers of them

    extra: slope, the distance of all N, the smallest n and the number of points. There is no interval, since
    the points share samples.
    """
    reference = reference if isinstance(reference, Reference) else Reference(reference)
    random = np.random.RandomState(seed)
    if isinstance(samples, GroupedMoments):
        subsets = _random_groups(samples, random)
    else:
        subsets = _random_rows(samples, random)
    distances = [(part.n, frechet_distance(part, reference)) for part in subsets]
    sizes, values = (np.array(column, dtype=np.float64) for column in zip(*distances, strict=True))
    slope, intercept = np.polyfit(1 / sizes, values, 1)
    extra = {"slope": slope, "all": values[-1], "smallest": sizes[0], "points": len(sizes)}
    return Figure(float(intercept), extra={name: float(value) for name, value in extra.items()})


def _random_rows(features: Tensor, random: np.random.RandomState) -> Iterator[Moments]:
    for count in _counts(len(features), len(features)):
        moments = Moments(features.shape[1])
        for rows in torch.from_numpy(random.permutation(len(features))[:count]).split(ROWS):
            moments.update(features[rows.to(features.device)])
        yield moments


def _random_groups(samples: GroupedMoments, random: np.random.RandomState) -> Iterator[Moments]:
    for count in _counts(samples.groups, samples.n):
        moments = Moments(samples.dim)
        for g in random.permutation(samples.groups)[:count].tolist():
            moments.merge(samples.group(g))
        yield moments


def _counts(parts: int, n: int) -> list[int]:
    """How many of the parts to use for each point, ascending; n samples are in all parts."""
    if n < 2 * POINTS or parts < 3:
        raise ValueError(
            f"an extrapolation needs at least {2 * POINTS} samples, in at least 3 groups, not {n} in {parts}"
        )
    least = math.ceil(min(SMALLEST, n / 2) * parts / n)
    return sorted(set(np.linspace(least, parts, POINTS).astype(int).tolist()))


def _cross(covariance: Tensor, n: int, root: Tensor) -> Tensor:
    """tr (C R R^T)^(1/2), for the covariance of n samples."""
    if n > root.shape[1] > 0:
        values = torch.linalg.eigvalsh(_product(covariance, root))
        rounding = EPS * values[-1]
        error = rounding * values.reciprocal().sum().sqrt()
        if values[0] > len(covariance) * rounding and error < 1e-10 * values.sqrt().sum():
            return values.sqrt().sum()
    return torch.linalg.svdvals(_root(covariance, n).T @ root).sum()


def _product(covariance: Tensor, root: Tensor) -> Tensor:
    """The lower triangle of R^T C R for a lower trapezoidal R, at a third of the multiplications."""
    product = root.new_zeros(root.shape[1], root.shape[1])
    for j in range(0, root.shape[1], BLOCK):
        tail = root[j:, j:]
        product[j:, j : j + BLOCK] = tail.T @ (covariance[j:, j:] @ tail[:, :BLOCK])
    return product


def _root(covariance: Tensor, n: int) -> Tensor:
    """Lower trapezoidal R (D, rank) with R R^T = covariance, that of n samples."""
    lowest = len(covariance) * EPS  # relative to the largest; less is rounding noise
    root, failed = torch.linalg.cholesky_ex(covariance)
    pivots = root.diagonal().square()
    if not failed and pivots.min() > lowest * pivots.max():
        return root
    values, vectors = _eigenpairs(covariance, n)
    kept = values > values[-1].clamp(min=0) * lowest
    return torch.linalg.qr((vectors[:, kept] * values[kept].sqrt()).T, mode="r").R.T


def _eigenpairs(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors as columns; of a low rank, those that are not 0.

    Then random combinations of the columns span the range (Halko et al. 2011, section 4.1).
    """
    dim, width = len(covariance), rank + SPARE
    if 2 * width < dim:
        generator = torch.Generator(covariance.device).manual_seed(0)
        like: dict[str, Any] = dict(dtype=covariance.dtype, device=covariance.device)
        basis = torch.linalg.qr(covariance @ torch.randn(dim, width, generator=generator, **like)).Q
        inner = basis.T @ covariance @ basis
        if covariance.trace() - inner.trace() <= dim * EPS * covariance.trace():  # nothing lies outside
            values, vectors = torch.linalg.eigh(inner)
            return values, basis @ vectors
    return torch.linalg.eigh(covariance)
