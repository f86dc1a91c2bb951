"""One noise level: the factors of data (alpha) and noise (sigma) in x_t = alpha * x0 + sigma * eps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
"""A coefficient: one number for the whole batch, or a (B,) tensor with one per sample."""


class NoiseLevel(NamedTuple):
    """The level of a whole batch, for solvers: float64 numbers on the host.

    t      the schedule's own time (a training index for DiscreteVP, [0, 1] for flows, sigma for EDM)
    alpha  factor of the data, >= 0
    sigma  factor of the noise, >= 0
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha (EDM's and k-diffusion's sigma): 0 at data, inf at pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def flow_time(self) -> float:
        """sigma / (alpha + sigma): 0 at data, 1 at pure noise, on every schedule."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), DPM-Solver's lambda: -inf at pure noise, +inf at data."""
        ratio = self.ratio
        return -math.log(ratio) if ratio > 0 else math.inf


class BatchLevel(NamedTuple):
    """One level per sample, as training uses: t, alpha and sigma are float64 tensors (B,) on the host."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def flow_time(self) -> Tensor:
        """sigma / (alpha + sigma), (B,)."""
        return self.sigma / (self.alpha + self.sigma)


Level = NoiseLevel | BatchLevel


def broadcast(coefficient: Scalar, x: Tensor) -> Scalar:
    """A coefficient ready to multiply x: floats unchanged, (B,) tensors as (B, 1, ..., 1) like x."""
    if isinstance(coefficient, Tensor):
        return coefficient.to(x.device, x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))
    return coefficient


def linear(a: Scalar, b: Scalar, p: Tensor, q: Tensor) -> Tensor:
    """a * p + b * q; each coefficient is one number, or one per sample (B,)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return broadcast(a, p) * p + broadcast(b, q) * q
    if a == 0 or b == 0:
        factor, x = (b, q) if a == 0 else (a, p)
        return x if factor == 1 else factor * x
    return torch.add(p if a == 1 else a * p, q, alpha=b)
