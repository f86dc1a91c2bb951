"""What a solver is: a short generator (denoiser, x, grid) -> Steps. History lives inside the generator, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from diffusion import DenoiserLike, Grid, NoiseLevel


class Step(NamedTuple):
    """One finished step.

    index  0 for the first step
    level  the level reached; the last is the grid's terminal row
    x      the sample at that level
    x0     the denoiser's estimate of clean data that the step used
    """

    index: int
    level: NoiseLevel
    x: Tensor
    x0: Tensor


class Solver(Protocol):
    """Stochastic solvers take `noise=`; others have options of their own, all by keyword."""

    def __call__(self, denoiser: DenoiserLike, x: Tensor, grid: Grid, /, **options: Any) -> Iterator[Step]: ...
