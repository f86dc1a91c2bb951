"""The coordinate in which a Runge-Kutta method integrates the probability-flow ODE.

With u = x / n(level) and r = sigma / n(level) the ODE reads du/dr = slope(x0, eps), on every schedule. A first-order step
is the same map in all of them (DDIM); methods of higher order are not, so that the coordinate is a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion import Estimate, NoiseLevel
from diffusion.level import linear


@dataclass(frozen=True)
class Coordinate:
    """norm: n(level) > 0; slope: du/dr from an estimate; `step` goes along a straight line in (r, u)."""

    norm: Callable[[NoiseLevel], float]
    slope: Callable[[Estimate], Tensor]

    def r(self, level: NoiseLevel) -> float:
        return level.sigma / self.norm(level)

    def step(self, x: Tensor, slope: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        """x_s, where the straight line of that slope through x_t leads."""
        norm_s = self.norm(s)
        return linear(norm_s / self.norm(t), norm_s * (self.r(s) - self.r(t)), x, slope)


# Flow time, r in [0, 1]: finite at both ends of every schedule (Liu et al. 2022).
FLOW_TIME = Coordinate(lambda level: level.alpha + level.sigma, lambda estimate: estimate.combine(-1.0, 1.0))
# EDM's sigma, r in [0, inf): pure noise of a schedule with alpha = 0 lies outside (Karras et al. 2022, eq. 4).
RATIO = Coordinate(lambda level: level.alpha, lambda estimate: estimate.eps)

COORDINATES = {"flow_time": FLOW_TIME, "ratio": RATIO}
