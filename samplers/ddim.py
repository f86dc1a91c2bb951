"""DDIM and its stochastic family."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffusion import DenoiserLike, Grid, Noise, SeededNoise, tau
from samplers.solver import Step


def ddim(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, eta: float = 0.0, noise: Noise | None = None
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12): keep the estimated noise, lower its level. Order 1.

    x_s = alpha_s x0 + sigma_s (sqrt(1 - eta^2 tau) eps + eta sqrt(tau) z), tau the share of new noise. eta =
    0 is deterministic: one Euler step in sigma/alpha, and in flow time, on every schedule. eta = 1 is DDPM.
    noise defaults to seeds 0 ... B-1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], not {eta:g}")
    noise = noise or SeededNoise(range(len(x)))
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        new = eta**2 * tau(t, s) if eta > 0 else 0.0
        x = estimate.combine(s.alpha, s.sigma * math.sqrt(1 - new))
        if s.sigma * new > 0:
            x = torch.add(x, noise(x, i), alpha=s.sigma * math.sqrt(new))
        yield Step(i, s, x, estimate)
