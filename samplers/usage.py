"""The sampling defaults of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion import Grid
from models import Model
from samplers.solver import Solver


@dataclass(frozen=True)
class Usage:
    """How to sample a model.

    steps  None if the grid is a list of times
    grid   settings of `time_grid`; {} for its defaults
    """

    sampler: str | Solver
    steps: int | None
    grid: dict[str, Any]
    guidance: float

    def levels(self, model: Model, size: tuple[int, int] | None = None) -> Grid:
        """The grid, for images of `size` (height, width) in pixels if it depends on that."""
        factor = 1 if size is None else model.require("vae").factor
        return model.grid(self.steps, size and (size[0] // factor, size[1] // factor), **self.grid)


def usage(
    model: Model,
    sampler: str | Solver | None = None,
    steps: int | None = None,
    grid: Mapping[str, Any] | None = None,
    guidance: float | None = None,
) -> Usage:
    """Fills in None from `model.spec["sampling"]`, else 50 steps of DDIM (distilled: 2 of `consistency`).

    A None within `grid` is not given; if nothing is given, the grid is the model's own. Guidance 0 is off, as
    1 is, for a network meant to be sampled without: its publishers write 0.
    """
    default = model.spec.get("sampling", {})
    own = {name: value for name, value in (grid or {}).items() if value is not None}
    own = own or dict(model.spec.get("grid", {}))
    if steps is None and isinstance(own.get("spacing", ""), str):
        steps = default.get("steps", 2 if model.distilled else 50)
    if sampler is None:
        sampler = default.get("sampler", "consistency" if model.distilled else "ddim")
    if guidance is None or (guidance == 0 and default.get("guidance") == 1):
        guidance = default.get("guidance", 1.0)
    return Usage(sampler, steps, own, guidance)
