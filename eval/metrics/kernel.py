"""Squared maximum mean discrepancies, in float64, a block of rows of the kernel at a time.

With a cubic kernel (KID, Binkowski et al. 2018) and a Gaussian one (CMMD, Jayasumana et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eval.metrics.distances import squared_distances

ROWS = 256


class KernelDistance(NamedTuple):
    """value: may be below 0 if unbiased; error: its standard error, or the spread over subsets."""

    value: float
    error: float


def kernel_distance(
    x: Tensor, y: Tensor, x_labels: Tensor | None = None, y_labels: Tensor | None = None
) -> KernelDistance:
    """MMD^2 between features (N, D) and (M, D) with k(a, b) = (a.b / D + 1)^3, unbiased, over all pairs.

    x_labels, y_labels  (N,), (M,): the classes of a set whose number of samples per class is fixed, not
                        drawn. A sample then meets others of its class too rarely, by (n_c - 1) / n_c, and the
                        plain estimate is below 0 for equal distributions: such pairs get more weight. Without
                        labels, samples count as independent

    The standard error is by jackknife over the samples, within each class; for equal distributions it is up
    to sqrt(2) too large. Needs 3 samples in every class.
    """
    x, y = _checked(x, y)
    of_x, of_y = _classes(x, x_labels), _classes(y, y_labels)
    (x_all, x_own), (y_all, y_own) = _sums_within(x, of_x), _sums_within(y, of_y)
    x_to_y, y_to_x = _sums_between(x, y, _cubic)
    within = _mean_within(x_all, x_own, of_x) + _mean_within(y_all, y_own, of_y)
    value = within - 2 * x_to_y.sum() / (len(x) * len(y))
    variance = _variance(x_all, x_own, x_to_y / len(y), of_x) + _variance(y_all, y_own, y_to_x / len(x), of_y)
    return KernelDistance(float(value), variance**0.5)


def subset_kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """KID as papers cite it: mean and standard deviation over random subsets of `size` of (N, D) and (M, D).

    Subsets are those of torch-fidelity for the same seed. The deviation is not a standard error.
    """
    x, y = _checked(x, y)
    if subsets < 1 or not 2 <= size <= min(len(x), len(y)):
        raise ValueError(
            f"{subsets} subsets of {size} samples cannot be drawn from {len(x)} and {len(y)}: take 1 or "
            "more, of 2 or more"
        )
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        rows = (torch.from_numpy(random.choice(len(z), size, replace=False)) for z in (x, y))
        a, b = (z[some.to(z.device, non_blocking=True)] for z, some in zip((x, y), rows, strict=True))
        within = _cubic(a, a).fill_diagonal_(0).sum() + _cubic(b, b).fill_diagonal_(0).sum()
        values.append(within / (size * (size - 1)) - 2 * _cubic(a, b).mean())
    found = torch.stack(values).cpu().numpy()  # read once, so that the loop does not wait
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


def gaussian_distance(x: Tensor, y: Tensor, sigma: float = 10.0) -> KernelDistance:
    """CMMD: 1000 MMD^2 between (N, D) and (M, D), k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), over all pairs.

    Pairs of a sample with itself count, as in the authors' code: the estimate is biased, by about (1 - mean
    k) (1/N + 1/M), and not below 0 but for rounding. They compare embeddings of CLIP ViT-L/14 at 336 pixels,
    of length 1. The standard error is by jackknife over the samples of both sets; NaN for a single sample.
    """
    x, y = _checked(x, y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        """k - 1, which is small for embeddings of length 1 and so more exact; the ones cancel."""
        return squared_distances(a, b).div_(-2 * sigma**2).expm1_()

    (xx, _), (yy, _), (xy, yx) = (_sums_between(a, b, kernel) for a, b in ((x, x), (y, y), (x, y)))
    value = xx.sum() / len(x) ** 2 + yy.sum() / len(y) ** 2 - 2 * xy.sum() / (len(x) * len(y))
    variance = _jackknife_variance(xx, xy, len(y)) + _jackknife_variance(yy, yx, len(x))
    return KernelDistance(1000 * float(value), 1000 * variance**0.5)


def _jackknife_variance(own: Tensor, cross: Tensor, others: int) -> float:
    """Of the distance. own, cross (n,): each sample's sums over its set, and over the `others`."""
    n = len(own)
    if n < 2:
        return math.nan
    left = (own.sum() - 2 * own) / (n - 1) ** 2 - 2 * (cross.sum() - cross) / ((n - 1) * others)
    return float((n - 1) / n * (left - left.mean()).square().sum())


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) == 0:
        raise ValueError(
            f"kernel distance needs two (N, D) sets of equal width, not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x.detach().double(), y.detach().double()


def _classes(x: Tensor, labels: Tensor | None) -> Tensor:
    """(N,): each sample's class, numbered from 0."""
    if labels is None:
        labels = torch.zeros(len(x), dtype=torch.long)
    if len(labels) != len(x):
        raise ValueError(f"{len(labels)} labels for {len(x)} features: one per sample is needed")
    classes = labels.cpu().unique(return_inverse=True)[1]
    fewest = int(classes.bincount().min())
    if fewest < 3:
        raise ValueError(f"kernel distance needs at least 3 samples in every set and class, not {fewest}")
    return classes.to(x.device, non_blocking=True)


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    kernel = (a @ b.T).div_(a.shape[1]).add_(1)
    return kernel.square().mul_(kernel)


def _sums_between(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(N,), (M,): sums of the kernel from each sample of x to all of y, and from each of y to all of x."""
    to_y, to_x = [], y.new_zeros(len(y))
    for rows in x.split(ROWS):
        block = kernel(rows, y)
        to_y.append(block.sum(1))
        to_x += block.sum(0)
    return torch.cat(to_y), to_x


def _sums_within(x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(N,), (N,): sums of the kernel from each sample to all others, and to the others of its class."""
    to_all, to_own = [], []
    for start, rows, own in zip(range(0, len(x), ROWS), x.split(ROWS), classes.split(ROWS), strict=True):
        block = _cubic(rows, x)
        block[:, start:].fill_diagonal_(0)
        to_all.append(block.sum(1))
        to_own.append(block.mul_(own[:, None] == classes).sum(1))
    return torch.cat(to_all), torch.cat(to_own)


def _mean_within(to_all: Tensor, to_own: Tensor, classes: Tensor) -> Tensor:
    """Mean kernel of two independent samples of a set. n_c (n_c - 1) pairs within a class stand for n_c^2."""
    count = classes.bincount()[classes]
    return (to_all + to_own / (count - 1)).sum() / len(classes) ** 2


def _variance(to_all: Tensor, to_own: Tensor, to_other: Tensor, classes: Tensor) -> float:
    """Of the distance, by jackknife. (N,) each: sums over set and class, the mean over the other set.

    Only what differs between the samples of a class matters. Class shares stay those of the whole set: with n
    - 1 of n samples of a class left, a pair with another class weighs n / (n - 1) / N^2, and one of the (n -
    1) (n - 2) pairs within it n^2 / ((n - 1) (n - 2)) / N^2.
    """
    count = classes.bincount()[classes].double()
    rest = (to_all + to_own * 2 / (count - 2)) / len(classes) - to_other
    without = -2 * count / (count - 1) * rest / len(classes)
    mean = torch.zeros_like(without).index_add_(0, classes, without)[classes] / count
    return float(((count - 1) / count * (without - mean).square()).sum())
