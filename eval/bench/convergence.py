"""Convergence of solvers on mixtures whose exact answers are known.

Deterministic solvers are compared with the exact solution of the probability-flow ODE on a mixture in one
dimension, where quantiles are constant. Solvers of the SDE are compared with themselves at twice the steps on
the same Brownian path; the difference is their error (strong order).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusion import NONE, Condition, Estimate, Grid, Level
from diffusion.oracle import GaussianMixture
from samplers import SAMPLERS, network_calls, sample

F64 = torch.float64
MIXTURE = GaussianMixture(
    *(torch.tensor(v, dtype=F64) for v in ([[-1.3], [0.4], [1.7]], [0.25, 0.4, 0.2], [0.3, 0.5, 0.2]))
)
GENTLE = GaussianMixture(*(torch.tensor(v, dtype=F64) for v in ([[-0.6], [0.7]], [0.5, 0.4])))
ROUNDING = 1e-11  # smaller errors are due to rounding, not to the method


@dataclass(frozen=True)
class Curve:
    """One solver on one grid: its error after each number of steps, its stated and its measured order."""

    sampler: str
    grid: str
    stated: int
    strong: bool  # on a Brownian path, where the error is the distance to twice the steps
    steps: tuple[int, ...]
    calls: tuple[int, ...]
    error: tuple[float, ...]
    measured: float = field(init=False)

    def __post_init__(self) -> None:
        seen = [(a, b) for a, b in pairwise(self.error) if b > ROUNDING]
        object.__setattr__(self, "measured", math.log2(seen[-1][0] / seen[-1][1]) if seen else math.nan)


def stated_orders(words: str) -> dict[str, int]:
    """The order in each solver's docstring after "Order" (ODE) or "Strong order" (on a Brownian path)."""
    found = {name: re.search(rf"\b{words} (\d)", solver.__doc__ or "") for name, solver in SAMPLERS.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def ode_curve(sampler: str, stated: int, name: str, grids: Sequence[Grid]) -> Curve:
    """`ode_error` on grids that double their steps."""
    error = tuple(ode_error(sampler, grid) for grid in grids)
    return Curve(sampler, name, stated, False, *_cost(sampler, grids), error)


def ode_error(sampler: str, grid: Grid, **options: Any) -> float:
    """Mean distance over quantiles from the exact solution at the end of a grid between levels with noise."""
    u = torch.linspace(0.02, 0.98, 25, dtype=F64)
    x = sample(sampler, MIXTURE, grid, start=MIXTURE.quantile(u, grid[0]), **options)
    return float((x - MIXTURE.quantile(u, grid[-1])).abs().mean())


def sde_curve(sampler: str, stated: int, name: str, grids: Sequence[Grid], samples: int = 4000) -> Curve:
    """Mean distance between the ends of each grid and the next, with twice the steps on the same paths."""
    ends = [
        sample(sampler, each_number, grid, shape=(max(1, samples // 4),), seeds=range(4), dtype=F64)
        for grid in grids
    ]
    error = tuple(float((a - b).abs().mean()) for a, b in pairwise(ends))
    return Curve(sampler, name, stated, True, *_cost(sampler, grids[:-1]), error)


def _cost(sampler: str, grids: Sequence[Grid]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Steps and network calls on each grid."""
    return tuple(grid.steps for grid in grids), tuple(network_calls(sampler, grid) for grid in grids)


def each_number(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
    """A mixture's denoiser for samples in which every number is an independent sample."""
    x0, eps = GENTLE(x_t.reshape(-1, 1), level)
    return Estimate(x0.view_as(x_t), eps.view_as(x_t))
