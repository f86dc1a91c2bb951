"""The coordinate in which a Runge-Kutta method integrates the probability-flow ODE.

With u = x / n(level) and r = sigma / n(level) the ODE is du/dr = slope(x0, eps) on every schedule. A
first-order step is the same in every coordinate (DDIM); methods of higher order differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion import Estimate, Grid, NoiseLevel
from diffusion.level import linear


@dataclass(frozen=True)
class Coordinate:
    """norm: n(level) > 0; slope: du/dr from an estimate; `step` follows a straight line in (r, u)."""

    norm: Callable[[NoiseLevel], float]
    slope: Callable[[Estimate], Tensor]

    def r(self, level: NoiseLevel) -> float:
        return level.sigma / self.norm(level)

    def step(self, x: Tensor, slope: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        """x_s on the straight line of that slope through x_t."""
        norm_s = self.norm(s)
        return linear(norm_s / self.norm(t), norm_s * (self.r(s) - self.r(t)), x, slope)


# Flow time, r in [0, 1]: finite at both ends of every schedule (Liu et al. 2022).
FLOW_TIME = Coordinate(lambda level: level.alpha + level.sigma, lambda estimate: estimate.combine(-1.0, 1.0))
# EDM's sigma, r in [0, inf): pure noise (alpha = 0) lies outside (Karras et al. 2022, eq. 4).
RATIO = Coordinate(lambda level: level.alpha, lambda estimate: estimate.eps)

COORDINATES = {"flow_time": FLOW_TIME, "ratio": RATIO}


def runge_kutta_4(
    f: Callable[[Tensor, NoiseLevel], Tensor], y: Tensor, k1: Tensor, t: NoiseLevel, s: NoiseLevel, grid: Grid
) -> Tensor:
    """One classical Runge-Kutta step of dy/dr = f(y, level) in flow time, with k1 = f(y, t) (Kutta 1901)."""
    r_t, r_s = FLOW_TIME.r(t), FLOW_TIME.r(s)
    h, r = r_s - r_t, (r_t + r_s) / 2
    middle = grid.between(r / (1 - r))
    k2 = f(torch.add(y, k1, alpha=h / 2), middle)
    k3 = f(torch.add(y, k2, alpha=h / 2), middle)
    k4 = f(torch.add(y, k3, alpha=h), s)
    return torch.add(y, k1 + 2 * (k2 + k3) + k4, alpha=h / 6)
