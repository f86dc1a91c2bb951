"""Deterministic inversion: the noise from which a sampler would make a given image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffusion import NONE, Condition, DenoiserLike, Grid
from samplers.sample import sample
from samplers.solver import Solver


def invert(
    denoiser: DenoiserLike,
    x0: Tensor,
    grid: Grid,
    sampler: str | Solver = "heun",
    *,
    condition: Condition = NONE,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """The x at the grid's first level that the solver leads back to x0 (Song et al. 2021, section 4.3).

    Any deterministic solver on the reversed grid: the probability-flow ODE upwards. The round trip differs by
    the solver's error, which falls with its order. x0 is taken as the sample at the cleanest level with
    noise, so keep that level low. ValueError for a stochastic solver.
    """
    upwards = grid.reversed()
    options |= {"start": upwards[0].alpha * x0, "condition": condition, "progress": progress}
    return sample(sampler, denoiser, upwards, **options)
