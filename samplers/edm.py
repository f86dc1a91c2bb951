"""EDM's stochastic sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffusion import DenoiserLike, Grid, Noise, SeededNoise
from samplers.coordinate import RATIO
from samplers.solver import Step


def edm(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, churn: float = 40.0, low: float = 0.0,
    high: float = math.inf, noise_scale: float = 1.0, noise: Noise | None = None,
) -> Iterator[Step]:  # fmt: skip
    """EDM's sampler (Karras et al. 2022, alg. 2): add a little noise, then a Heun step. Two calls a step.

    churn        S_churn: sigma/alpha rises by 1 + min(churn / steps, sqrt(2) - 1), if the schedule has that
                 level
    low, high    S_tmin and S_tmax: the range of sigma/alpha in which it rises
    noise_scale  S_noise: standard deviation of the added noise

    A step from pure noise or to data is Euler's, one call. noise defaults to seeds 0 ... B-1.
    """
    if not (0 <= churn < math.inf and 0 <= low <= high and 0 <= noise_scale < math.inf):
        values = f"{churn:g}, {low:g}, {high:g} and {noise_scale:g}"
        raise ValueError(f"churn, low <= high and noise_scale must be 0 or more, not {values}")
    noise, top = noise or SeededNoise(range(len(x))), float(grid.schedule.ratio(grid.schedule.t_max))
    for i, (t, s) in enumerate(pairwise(grid)):
        raised = t.ratio * (1 + min(churn / grid.steps, math.sqrt(2) - 1))
        if low <= t.ratio <= high and t.ratio < raised <= top:
            t_hat = grid.between(raised)
            fresh = noise_scale * t_hat.alpha * math.sqrt(raised**2 - t.ratio**2)
            x, t = torch.add(t_hat.alpha / t.alpha * x, noise(x, i), alpha=fresh), t_hat
        estimate = denoiser(x, t)
        x_s = estimate.at(s)
        if t.alpha > 0 and s.sigma > 0:
            x_s = RATIO.step(x, (estimate.eps + denoiser(x_s, s).eps) / 2, t, s)
        x = x_s
        yield Step(i, s, x, estimate)
