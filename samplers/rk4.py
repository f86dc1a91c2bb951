"""The classical Runge-Kutta method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid, NoiseLevel
from samplers.coordinate import FLOW_TIME as C
from samplers.coordinate import runge_kutta_4
from samplers.solver import Step


def rk4(denoiser: DenoiserLike, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Runge-Kutta 4 (Kutta 1901) in flow time, du/dr = eps - x0: slopes at the start, twice halfway, at the
    end. Order 4.

    Four calls a step. The step that reaches clean data is DDIM's, one call: a network says nothing of the
    noise in data. That step is of order 1, so that the last level with noise should lie low.
    """

    def slope(u: Tensor, level: NoiseLevel) -> Tensor:
        return C.slope(denoiser(C.norm(level) * u, level))

    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        x = (
            C.norm(s) * runge_kutta_4(slope, x / C.norm(t), C.slope(estimate), t, s, grid)
            if s.sigma > 0
            else estimate.at(s)
        )
        yield Step(i, s, x, estimate)
