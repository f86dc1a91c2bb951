"""Deterministic inversion: the noise that a sampler would make a given image from."""

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
    """x at the grid's first level, from which the same solver on the same grid leads back to x0 (Song et al.
    2021, section 4.3).

    The probability-flow ODE, run upwards: any deterministic solver, as it stands, on the reversed grid. There
    and back differ by the solver's own error, which falls with its order. x0 stands for the sample at the
    cleanest level with noise, so let that lie low. ValueError for a stochastic solver, whose steps nothing
    undoes.
    """
    upwards = grid.reversed()
    return sample(
        sampler,
        denoiser,
        upwards,
        start=upwards[0].alpha * x0,
        condition=condition,
        progress=progress,
        **options,
    )
