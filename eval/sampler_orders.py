"""How fast every solver converges: measured against exact answers, table and picture. `python -m eval experiment=sampler_orders`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import BrownianPath, Estimate, Grid, Level, Schedule, build_schedule, initial_noise, time_grid
from diffusion.oracle import GaussianMixture
from diffusion.spec import check_call, check_names, make_params
from samplers import SAMPLERS, network_calls
from samplers.sample import find_sampler

F64 = torch.float64
MIXTURE = GaussianMixture(
    *(torch.tensor(values, dtype=F64) for values in ([[-1.3], [0.4], [1.7]], [0.25, 0.4, 0.2], [0.3, 0.5, 0.2]))
)


def stated_orders(words: str) -> dict[str, int]:
    """The order each solver's docstring states after "Order" (of the ODE) or "Strong order" (on a Brownian path)."""
    found = {name: re.search(rf"\b{words} (\d)", solver.__doc__ or "") for name, solver in SAMPLERS.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def ode_error(sampler: str, grid: Grid, points: int = 25, **options: Any) -> float:
    """Mean distance from the exact solution at the cleanest level with noise: in one dimension the ODE keeps quantiles."""
    u, noisy = torch.linspace(0.02, 0.98, points, dtype=F64), grid[:-1]
    x = MIXTURE.quantile(u, noisy[0])
    for step in find_sampler(sampler)(MIXTURE, x, noisy, **options):
        x = step.x
    return float((x - MIXTURE.quantile(u, noisy[-1])).abs().mean())
