"""How a model is meant to be sampled, where nobody says otherwise."""

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

    steps  None for a grid that is a list of times, which has its own number
    grid   settings of `time_grid`; {} is that function's defaults
    """

    sampler: str | Solver
    steps: int | None
    grid: dict[str, Any]
    guidance: float

    def levels(self, model: Model, size: tuple[int, int] | None = None) -> Grid:
        """The grid itself; size: height and width of the images in pixels, where it depends on them.
        ValueError for settings of none."""
        factor = 1 if size is None else model.require("vae").factor
        return model.grid(self.steps, size and (size[0] // factor, size[1] // factor), **self.grid)


def usage(
    model: Model,
    sampler: str | Solver | None = None,
    steps: int | None = None,
    grid: Mapping[str, Any] | None = None,
    guidance: float | None = None,
) -> Usage:
    """What is None is what the model is meant for: `model.spec["sampling"]`, else 50 steps of DDIM, or 2
    where it is distilled.

    A setting of the grid that is None is not given; where none is given, the grid is the model's own. A
    guidance of 0 is off, as 1 is, for a network that is meant to be sampled without: 0 is how its publishers
    write that.
    """
    meant = model.spec.get("sampling", {})
    settings = {name: value for name, value in (grid or {}).items() if value is not None} or dict(
        model.spec.get("grid", {})
    )
    if steps is None and isinstance(settings.get("spacing", ""), str):
        steps = meant.get("steps", 2 if model.distilled else 50)
    if sampler is None:
        sampler = meant.get("sampler", "consistency" if model.distilled else "ddim")
    if guidance is None or (guidance == 0 and meant.get("guidance") == 1):
        guidance = meant.get("guidance", 1.0)
    return Usage(sampler, steps, settings, guidance)
