"""The classical Runge-Kutta method on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid
from samplers.coordinate import FLOW_TIME as C
from samplers.solver import Step


def rk4(denoiser: DenoiserLike, x: Tensor, grid: Grid) -> Iterator[Step]:
    """Runge-Kutta 4 (Kutta 1901) in flow time, du/dr = eps - x0: slopes at the start, twice halfway, at the end. Order 4.

    Four calls a step. The step that reaches clean data is DDIM's, one call: a network says nothing of the noise in data. That step is
    of order 1, so that the last level with noise should lie low.
    """
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        if s.sigma > 0:
            r = (C.r(t) + C.r(s)) / 2
            middle = grid.between(r / (1 - r))
            k1 = C.slope(estimate)
            k2 = C.slope(denoiser(C.step(x, k1, t, middle), middle))
            k3 = C.slope(denoiser(C.step(x, k2, t, middle), middle))
            k4 = C.slope(denoiser(C.step(x, k3, t, s), s))
            x = C.step(x, (k1 + 2 * (k2 + k3) + k4) / 6, t, s)
        else:
            x = estimate.at(s)
        yield Step(i, s, x, estimate)
