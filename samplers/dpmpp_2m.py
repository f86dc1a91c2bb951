"""DPM-Solver++(2M): two estimates, the last one remembered."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid
from samplers import exponential
from samplers.exponential import Node, midpoint
from samplers.solver import Step


def dpmpp_2m(denoiser: DenoiserLike, x: Tensor, grid: Grid) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2): x0 extrapolated from the last two estimates. Order 2.

    x_s = sigma_s/sigma_t x_t + (alpha_s - alpha_t sigma_s/sigma_t) D, with D = x0 + h/(2 h') (x0 - x0'),
    primes for the step before: the line through both estimates, halfway. The first step, and steps from pure
    noise or to data, have D = x0, which is DDIM.
    """
    last: Node | None = None
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        node = t, estimate.x0
        x = exponential.step(x, t, s, [midpoint(node, last, s)])
        last = node
        yield Step(i, s, x, estimate)
