"""Squared maximum mean discrepancies: with a cubic kernel (KID, Binkowski et al. 2018) and a Gaussian one (CMMD, Jayasumana et al. 2024).

All are computed in float64, a block of rows of the kernel at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics.distances import squared_distances

ROWS = 256


class KernelDistance(NamedTuple):
    """value: unbiased, may fall below 0 for equal distributions; error: its standard error, or the spread over subsets."""

    value: float
    error: float


def kernel_distance(x: Tensor, y: Tensor, x_labels: Tensor | None = None, y_labels: Tensor | None = None) -> KernelDistance:
    """MMD^2 between features (N, D) and (M, D) with k(a, b) = (a.b / D + 1)^3, on all pairs, in float64.

    x_labels, y_labels  (N,), (M,): the classes of a set whose number per class was fixed rather than drawn. A sample then meets
        others of its class too rarely, by (n_c - 1) / n_c, and the plain estimate falls below 0 for equal distributions; pairs
        within a class are weighted up to make good for it. Without labels, samples are taken as independent.

    The standard error is by jackknife over the samples, within each class; for equal distributions it is up to sqrt(2) too large.
    Needs 3 samples in every class.
    """
    x, y = _checked(x, y)
    in_x, in_y = _membership(x, x_labels), _membership(y, y_labels)
    n, m = in_x.sum(0), in_y.sum(0)
    # Sums of the kernel from each sample to each class; then from class to class.
    x_to_x, y_to_y, x_to_y, y_to_x = _to_own(x, in_x), _to_own(y, in_y), _to_other(x, y, in_y), _to_other(y, x, in_x)
    sums_xx, sums_yy, sums_xy = in_x.T @ x_to_x, in_y.T @ y_to_y, in_x.T @ x_to_y
    value = _within(sums_xx, n, n) + _within(sums_yy, m, m) - 2 * _between(sums_xy, n, m)
    error = 0.0
    for members, own, cross, sums, sums_cross, count, other in (
        (in_x, x_to_x, x_to_y, sums_xx, sums_xy, n, m),
        (in_y, y_to_y, y_to_x, sums_yy, sums_xy.T, m, n),
    ):
        for k in range(len(count)):
            i = members[:, k].bool()
            row = torch.eye(len(count), dtype=count.dtype, device=count.device)[k]
            less = count - row
            # The class sums without sample i of class k, for all of them at once; class shares stay those of the whole set.
            left = sums - own[i][:, None, :] * row[:, None] - own[i][:, :, None] * row
            left_cross = sums_cross - cross[i][:, None, :] * row[:, None]
            leave = _within(left, less, count) - 2 * _between(left_cross, less, other, count)
            error += float((count[k] - 1) / count[k] * (leave - leave.mean()).square().sum())
    return KernelDistance(float(value), error**0.5)


def subset_kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020) -> KernelDistance:
    """KID as papers cite it: the mean over random subsets of `size` samples of each of (N, D) and (M, D), and the standard deviation
    over them, which is no standard error. Subsets are those of torch-fidelity for the same seed.
    """
    x, y = _checked(x, y)
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise ValueError(f"{subsets} subsets of {size} samples cannot be drawn from {len(x)} and {len(y)}: take 1 or more, of 2 or more")
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        a, b = (z[torch.from_numpy(random.choice(len(z), size, replace=False)).to(z.device)] for z in (x, y))
        within = (_cubic(a, a).fill_diagonal_(0).sum() + _cubic(b, b).fill_diagonal_(0).sum()) / (size * (size - 1))
        values.append(float(within - 2 * _cubic(a, b).mean()))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def gaussian_distance(x: Tensor, y: Tensor, sigma: float = 10.0) -> KernelDistance:
    """CMMD: 1000 MMD^2 between (N, D) and (M, D) with k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), on all pairs, a sample with itself included.

    As its authors' code has it: that estimate is biased, by some (1 - mean k) (1/N + 1/M), and never below 0 but for rounding. They
    compare embeddings of CLIP ViT-L/14 at 336 pixels, each of length 1. The standard error is by jackknife over the samples of both sets;
    NaN for a single one.
    """
    x, y = _checked(x, y)
    xx, yy, xy, yx = (_gaussian_sums(a, b, sigma) for a, b in ((x, x), (y, y), (x, y), (y, x)))
    value = xx.sum() / len(x) ** 2 + yy.sum() / len(y) ** 2 - 2 * xy.sum() / (len(x) * len(y))
    variance = _jackknife_variance(xx, xy, len(y)) + _jackknife_variance(yy, yx, len(x))
    return KernelDistance(1000 * float(value), 1000 * variance**0.5)


def _gaussian_sums(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """(N,): sums of k - 1 from each sample of x to all of y. Near 0, where k of embeddings of length 1 is near 1; the ones cancel."""
    return torch.cat([torch.expm1(squared_distances(rows, y) / (-2 * sigma**2)).sum(1) for rows in x.split(ROWS)])


def _jackknife_variance(own: Tensor, cross: Tensor, others: int) -> float:
    """Of the distance, without each of n samples in turn: own (n,) and cross (n,) are its sums over its set and over the `others`."""
    n = len(own)
    if n < 2:
        return math.nan
    left = (own.sum() - 2 * own) / (n - 1) ** 2 - 2 * (cross.sum() - cross) / ((n - 1) * others)
    return float((n - 1) / n * (left - left.mean()).square().sum())


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) == 0:
        raise ValueError(f"kernel distance needs two (N, D) sets of equal width, not {tuple(x.shape)} and {tuple(y.shape)}")
    return x.detach().double(), y.detach().double()


def _membership(x: Tensor, labels: Tensor | None) -> Tensor:
    """(N, classes) of 0 and 1, a column for each class there is."""
    if labels is None:
        labels = torch.zeros(len(x), dtype=torch.long)
    if len(labels) != len(x):
        raise ValueError(f"{len(labels)} labels for {len(x)} features: one per sample is needed")
    found, column = labels.cpu().unique(return_inverse=True)
    members = F.one_hot(column, len(found)).double().to(x.device)
    fewest = int(members.sum(0).min()) if len(x) else 0
    if fewest < 3:
        raise ValueError(f"kernel distance needs at least 3 samples in every set and class, not {fewest}")
    return members


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _to_own(x: Tensor, members: Tensor) -> Tensor:
    """(N, classes): sums of the kernel from each sample to each class, itself left out."""
    sums = []
    for start, rows in zip(range(0, len(x), ROWS), x.split(ROWS), strict=True):
        kernel = _cubic(rows, x)
        kernel[:, start:].fill_diagonal_(0)
        sums.append(kernel @ members)
    return torch.cat(sums)


def _to_other(x: Tensor, y: Tensor, members: Tensor) -> Tensor:
    """(N, classes): sums of the kernel from each sample of x to each class of y."""
    return torch.cat([_cubic(rows, y) @ members for rows in x.split(ROWS)])


def _within(sums: Tensor, count: Tensor, shares: Tensor) -> Tensor:
    """Mean kernel of two independent samples of one set, from the sums (..., classes, classes) over its pairs without the diagonal."""
    share = shares / shares.sum()
    pairs = count[:, None] * count - torch.diag(count)
    return (share[:, None] * share * sums / pairs).sum((-2, -1))


def _between(sums: Tensor, count: Tensor, other: Tensor, shares: Tensor | None = None) -> Tensor:
    """Mean kernel of a sample of each set, from the sums (..., classes, other's classes)."""
    shares = count if shares is None else shares
    share, others = shares / shares.sum(), other / other.sum()
    return (share[:, None] * others * sums / (count[:, None] * other)).sum((-2, -1))
