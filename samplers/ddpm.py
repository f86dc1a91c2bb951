"""Ancestral sampling with the exact posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffusion import DenoiserLike, Estimate, Grid, Noise, NoiseLevel, SeededNoise, decay, learned_std, tau
from diffusion.spec import check_names
from samplers.solver import Step

Variance = Literal["posterior", "upper", "learned"]


def ddpm(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Grid,
    *,
    variance: Variance = "posterior",
    noise: Noise | None = None,
) -> Iterator[Step]:
    """DDPM (Ho et al. 2020, alg. 2) on any grid: sample q(x_s | x_t, x0) at the estimated x0.

    variance  "posterior": the exact one, right for point-like data; "upper": that of the forward step, right
              for white data (both section 3.2); "learned": the network's own (Nichol & Dhariwal 2021, eq. 15)

    The step that reaches clean data adds no noise. noise defaults to seeds 0 ... B-1.
    """
    check_names("variance", [variance], ("posterior", "upper", "learned"))
    noise = noise or SeededNoise(range(len(x)))
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        x = estimate.combine(s.alpha, s.sigma * decay(t, s))  # the mean of q(x_s | x_t, x0)
        if s.sigma > 0:
            x = x + _std(variance, estimate, t, s) * noise(x, i)
        yield Step(i, s, x, estimate)


def _std(variance: Variance, estimate: Estimate, t: NoiseLevel, s: NoiseLevel) -> float | Tensor:
    share = math.sqrt(tau(t, s))
    lower = s.sigma * share
    upper = t.sigma * share * math.hypot(s.alpha, s.sigma) / math.hypot(t.alpha, t.sigma)  # hypot: 1 on VP
    if variance == "learned":
        if estimate.variance is None:
            raise ValueError("this network has no learned variance: use variance='posterior' or 'upper'")
        return learned_std(estimate.variance, lower, upper)
    return lower if variance == "posterior" else upper
