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
    """Runge-Kutta 4 (Kutta 1901) in flow time, du/dr = eps - x0. Order 4, four calls a step.

    The step that reaches clean data is DDIM's, one call: a network does not know the noise in data. That step
    has order 1, so keep the last level with noise low.
    """

    def slope(u: Tensor, level: NoiseLevel) -> Tensor:
        return C.slope(denoiser(C.norm(level) * u, level))

    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        if s.sigma > 0:
            x = C.norm(s) * runge_kutta_4(slope, x / C.norm(t), C.slope(estimate), t, s, grid)
        else:
            x = estimate.at(s)
        yield Step(i, s, x, estimate)
