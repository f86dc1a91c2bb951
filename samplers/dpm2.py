"""DPM2: the midpoint method in log sigma."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid
from samplers.coordinate import RATIO
from samplers.exponential import halfway, has_lambda
from samplers.solver import Step


def dpm2(denoiser: DenoiserLike, x: Tensor, grid: Grid) -> Iterator[Step]:
    """DPM2 (Karras et al. 2022, app. C): the slope halfway in log(sigma/alpha) for the whole step. Order 2.

    DPM-Solver-2 of Lu et al. 2022; two calls a step. Steps from pure noise or to data have no halfway point:
    there it is DDIM, one call.
    """
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        if has_lambda(t) and has_lambda(s):
            middle = grid.between(halfway(t, s))
            x = RATIO.step(x, denoiser(estimate.at(middle), middle).eps, t, s)
        else:
            x = estimate.at(s)
        yield Step(i, s, x, estimate)
