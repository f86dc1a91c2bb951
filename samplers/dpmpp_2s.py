"""DPM-Solver++(2S): one look ahead per step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid
from samplers import exponential
from samplers.exponential import halfway, has_lambda
from samplers.solver import Step


def dpmpp_2s(denoiser: DenoiserLike, x: Tensor, grid: Grid) -> Iterator[Step]:
    """DPM-Solver++(2S) (Lu et al. 2022b, alg. 1, r = 1/2): the x0 at the step's midpoint. Order 2.

    The midpoint is halfway in lambda = log(alpha/sigma); two calls a step. Steps from pure noise or to data
    have none: there it is DDIM, one call.
    """
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        if has_lambda(t) and has_lambda(s):
            middle = grid.between(halfway(t, s))
            x = exponential.step(x, t, s, [(middle, denoiser(estimate.at(middle), middle).x0)])
        else:
            x = estimate.at(s)
        yield Step(i, s, x, estimate)
