"""DPM-Solver++(3M): three estimates, two of them remembered."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid
from samplers import exponential
from samplers.exponential import Node, halfway, has_lambda, spread
from samplers.solver import Step


def dpmpp_3m(denoiser: DenoiserLike, x: Tensor, grid: Grid) -> Iterator[Step]:
    """DPM-Solver++(3M) (Lu et al. 2022b, eq. 12): x0 on the parabola of the last three estimates. Order 3.

    The parabola is in lambda. Two things differ from the publication, and order 3 needs both: the parabola's
    full second derivative, where the published formula takes half; and a first step that looks ahead like
    `dpmpp_2s`, one call more in all, where a DDIM step would leave order 2. Steps from pure noise or to data
    are DDIM.
    """
    nodes: list[Node] = []
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        if has_lambda(t) and has_lambda(s):
            nodes = [(t, estimate.x0), *nodes][:3]
            if len(nodes) == 1:
                middle = grid.between(halfway(t, s))
                nodes = [(middle, denoiser(estimate.at(middle), middle).x0), *nodes]
            x = exponential.step(x, t, s, spread(nodes, s))
        else:
            x = estimate.at(s)
        yield Step(i, s, x, estimate)
