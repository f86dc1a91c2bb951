"""What the tests of solvers share: every solver with its options and what it does to noise, and the mixture
they are held to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffusion import (
    Grid,
    NoiseLevel,
)
from eval.bench.convergence import MIXTURE, stated_orders
from samplers import SAMPLERS, Step

F64 = torch.float64
SHAPE = (1, 2, 2)
ORDER, STRONG_ORDER = stated_orders("Order"), stated_orders("Strong order")
MEAN, STD, WEIGHT = MIXTURE.mean, MIXTURE.std, MIXTURE.weight


def last(steps: Iterator[Step]) -> Tensor:
    """x after the last step."""
    *_, step = steps
    return step.x


Rule = Callable[[NoiseLevel, NoiseLevel, Grid], float]
"""(t, s, grid) -> p: x_s holds the noise p eps + sqrt(1 - p^2) z, given the noise eps in x_t and fresh noise
z."""


def kept(t: NoiseLevel, s: NoiseLevel, grid: Grid) -> float:
    """Deterministic solvers: on the exact trajectory the noise never changes."""
    return 1.0


def renewed(share: float) -> Rule:
    """DDIM-eta and, at share 1, DDPM: part of tau, from the ratios themselves, is replaced."""
    return lambda t, s, grid: math.sqrt(1 - share * (1 - (s.ratio / t.ratio) ** 2))


def decayed(eta: float) -> Rule:
    """The reverse SDE: noise dies as (sigma/alpha)^eta."""
    return lambda t, s, grid: (s.ratio / t.ratio) ** eta


def turned(diffusion: float) -> Rule:
    """The SDE of a flow model: noise dies as a power of flow time."""
    return lambda t, s, grid: (s.flow_time / t.flow_time) ** (diffusion / 2)


def churned(churn: float) -> Rule:
    """EDM: noise is raised first, where the schedule has more."""

    def rule(t: NoiseLevel, s: NoiseLevel, grid: Grid) -> float:
        raised = 1 + min(churn / grid.steps, math.sqrt(2) - 1)
        return (
            1 / raised
            if t.ratio * raised <= float(grid.schedule.ratio(grid.schedule.t_max)) and t.alpha > 0
            else 1.0
        )

    return rule


def fresh(t: NoiseLevel, s: NoiseLevel, grid: Grid) -> float:
    """Multistep consistency sampling: all noise is replaced."""
    return 0.0


# Any solver not named here is taken for a deterministic one, and has to follow the exact trajectory.
DISTINCT_SAMPLERS = list({solver: name for name, solver in reversed(SAMPLERS.items())}.values())[
    ::-1
]  # "lcm" is `consistency` again
CASES: dict[str, tuple[str, dict[str, Any], Rule]] = {
    **{name: (name, {}, kept) for name in DISTINCT_SAMPLERS},
    "heun-ratio": ("heun", {"coordinate": "ratio"}, kept),
    "ddim-0.6": ("ddim", {"eta": 0.6}, renewed(0.36)),
    "ddpm": ("ddpm", {}, renewed(1.0)),
    "euler_ancestral": ("euler_ancestral", {}, renewed(1.0)),
    "dpmpp_sde": ("dpmpp_sde", {}, decayed(1.0)),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, decayed(1.0)),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, decayed(1.0)),
    "dpmpp_3m_sde-0.4": ("dpmpp_3m_sde", {"eta": 0.4}, decayed(0.4)),
    "sit_sde": ("sit_sde", {}, turned(1.0)),
    "sit_sde-2.5": ("sit_sde", {"diffusion": 2.5}, turned(2.5)),
    "edm": ("edm", {}, churned(40.0)),
    "consistency": ("consistency", {}, fresh),
}
PATHS = [name for name, solver in SAMPLERS.items() if "path" in inspect.signature(solver).parameters]
