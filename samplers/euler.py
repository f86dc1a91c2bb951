"""Euler's method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid
from samplers.coordinate import FLOW_TIME
from samplers.solver import Step


def euler(denoiser: DenoiserLike, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Euler in flow time: follow the velocity (Liu et al. 2022; Karras et al. 2022, alg. 1). Order 1.

    With u = x / (alpha + sigma) and r = sigma / (alpha + sigma), the ODE is du/dr = eps - x0 on every
    schedule, finite at both ends. A step lands exactly where DDIM does, and where Euler in sigma/alpha does.
    """
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        x = FLOW_TIME.step(x, FLOW_TIME.slope(estimate), t, s)
        yield Step(i, s, x, estimate)
