"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid
from diffusion.spec import lookup
from samplers.coordinate import COORDINATES
from samplers.solver import Step


def heun(denoiser: DenoiserLike, x: Tensor, grid: Grid, *, coordinate: str = "flow_time") -> Iterator[Step]:
    """Heun (Karras et al. 2022, alg. 1): the mean of the slopes at both ends of the step. Order 2.

    coordinate  "flow_time", finite at both ends of every schedule, or "ratio", EDM's and k-diffusion's sigma

    Two calls a step. The step that reaches clean data is Euler's, one call: a network does not know the noise
    in data. So is a step from pure noise in "ratio".
    """
    c = lookup("coordinate", coordinate, COORDINATES)
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        x_s = estimate.at(s)  # an Euler step, the same in every coordinate
        if s.sigma > 0 and min(c.norm(t), c.norm(s)) > 0:
            x_s = c.step(x, (c.slope(estimate) + c.slope(denoiser(x_s, s))) / 2, t, s)
        x = x_s
        yield Step(i, s, x, estimate)
