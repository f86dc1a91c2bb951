"""Kernel distance: the unbiased squared maximum mean discrepancy with a cubic kernel (KID, Binkowski et al. 2018)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KernelDistance(NamedTuple):
    """value: unbiased, may fall below 0 for equal distributions; error: its standard error."""

    value: float
    error: float


def kernel_distance(x: Tensor, y: Tensor) -> KernelDistance:
    """MMD^2 between features (N, D) and (M, D) with k(a, b) = (a.b / D + 1)^3, on all pairs, in float64.

    The standard error is by jackknife over the samples of both sets. Needs N, M >= 3.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(f"kernel distance needs two (N >= 3, D) sets of equal width, not {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.detach().double(), y.detach().double()
    n, m = len(x), len(y)
    xx, yy, xy = _within(x), _within(y), (x @ y.T / x.shape[1] + 1) ** 3
    sum_xx, sum_yy, sum_xy = xx.sum(), yy.sum(), xy.sum()
    value = sum_xx / (n * (n - 1)) + sum_yy / (m * (m - 1)) - 2 * sum_xy / (n * m)
    # The value without sample i of x, for every i at once; likewise for y.
    without_x = (sum_xx - 2 * xx.sum(1)) / ((n - 1) * (n - 2)) + sum_yy / (m * (m - 1)) - 2 * (sum_xy - xy.sum(1)) / ((n - 1) * m)
    without_y = sum_xx / (n * (n - 1)) + (sum_yy - 2 * yy.sum(1)) / ((m - 1) * (m - 2)) - 2 * (sum_xy - xy.sum(0)) / (n * (m - 1))
    variance = sum((k - 1) / k * (leave - leave.mean()).square().sum() for k, leave in ((n, without_x), (m, without_y)))
    return KernelDistance(float(value), float(torch.as_tensor(variance).sqrt()))


def _within(x: Tensor) -> Tensor:
    return ((x @ x.T / x.shape[1] + 1) ** 3).fill_diagonal_(0)
