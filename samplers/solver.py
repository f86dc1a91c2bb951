"""A solver is a short generator (denoiser, x, grid) -> Steps, whose history is local to the generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from diffusion import Estimate, NoiseLevel


class Step(NamedTuple):
    """One finished step.

    i         0 for the first step
    level     the level reached; the last one is the grid's terminal row
    x         the sample at that level
    estimate  the denoiser's estimate at the start of the step
    """

    i: int
    level: NoiseLevel
    x: Tensor
    estimate: Estimate

    @property
    def x0(self) -> Tensor:
        """The estimate of clean data, computed when first used."""
        return self.estimate.x0


Solver = Callable[..., Iterator[Step]]
"""(denoiser, x, grid, **options) -> Steps. Stochastic solvers take `noise=` or `path=`.

A solver leaves gradients on, so that one can differentiate through it; `sample` turns them off.
"""
