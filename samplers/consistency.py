"""Multistep consistency sampling."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid, Noise, SeededNoise, marginal
from samplers.solver import Step


def consistency(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, noise: Noise | None = None
) -> Iterator[Step]:
    """Consistency sampling (Song et al. 2023, alg. 1): jump to data, add noise for the next level, repeat.

    For denoisers that map any level straight to data, such as `train.consistency` makes. For LCMs (Luo et al.
    2023) users know it as "lcm". noise defaults to seeds 0 ... B-1.
    """
    noise = noise or SeededNoise(range(len(x)))
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        x = estimate.x0 if s.sigma == 0 else marginal(estimate.x0, noise(x, i), s)
        yield Step(i, s, x, estimate)
