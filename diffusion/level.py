"""One row of noise: how much signal (alpha) and how much noise (sigma) a sample holds, x_t = alpha * x0 +
sigma * eps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
"""A coefficient: one number for the whole batch, or a (B,) tensor with one per sample."""


class NoiseLevel(NamedTuple):
    """The level of a whole batch, as solvers use it. Plain float64 numbers on the host: a solver never waits
    for a device.

    t      the schedule's own time (a training index for DiscreteVP, [0, 1] for flows, sigma for EDM)
    alpha  factor of the data, >= 0
    sigma  factor of the noise, >= 0
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise-to-signal ratio: 0 at data, inf at pure noise. EDM and k-diffusion call it
        sigma."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def flow_time(self) -> float:
        """sigma / (alpha + sigma), the time of a straight line from data to noise: 0 at data, 1 at pure
        noise, on every schedule."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def half_log_snr(self) -> float:
        """log(alpha / sigma), DPM-Solver's lambda: -inf at pure noise, +inf at data."""
        ratio = self.ratio
        return -math.log(ratio) if ratio > 0 else math.inf


class BatchLevel(NamedTuple):
    """One level per sample, as training draws them: t, alpha and sigma are float64 tensors (B,), kept on the
    host."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def flow_time(self) -> Tensor:
        """sigma / (alpha + sigma), (B,), as of a NoiseLevel."""
        return self.sigma / (self.alpha + self.sigma)


Level = NoiseLevel | BatchLevel


def broadcast(coefficient: Scalar, x: Tensor) -> Scalar:
    """A coefficient ready to multiply x: floats as they are, (B,) tensors as (B, 1, ..., 1) in x's dtype and
    on its device."""
    if isinstance(coefficient, Tensor):
        return coefficient.to(x.device, x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))
    return coefficient


def linear(a: Scalar, b: Scalar, p: Tensor, q: Tensor) -> Tensor:
    """a * p + b * q; a coefficient is one number, or one per sample (B,)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return broadcast(a, p) * p + broadcast(b, q) * q
    if a == 0 or b == 0:
        kept, x = (b, q) if a == 0 else (a, p)
        return x if kept == 1 else kept * x
    return torch.add(p if a == 1 else a * p, q, alpha=b)
