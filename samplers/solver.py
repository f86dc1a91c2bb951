"""What a solver is: a short generator (denoiser, x, grid) -> Steps. History lives inside the generator, and
nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from diffusion import Estimate, NoiseLevel


class Step(NamedTuple):
    """One finished step.

    i         0 for the first step
    level     the level reached; the last is the grid's terminal row
    x         the sample at that level
    estimate  what the denoiser said of the sample that the step began with
    """

    i: int
    level: NoiseLevel
    x: Tensor
    estimate: Estimate

    @property
    def x0(self) -> Tensor:
        """The estimate of clean data, made when it is asked for."""
        return self.estimate.x0


Solver = Callable[..., Iterator[Step]]
"""(denoiser, x, grid, **options) -> Steps. Stochastic solvers take `noise=`; others have options of their
own, by keyword.

A solver leaves gradients on, for those who want them through it; `sample` turns them off.
"""
