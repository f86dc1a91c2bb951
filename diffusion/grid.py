"""Time grids: the levels a solver visits, from noise to data. Built once, immutable, the terminal row
included.

Spacing, terminal rule and initial noise scale are properties of the grid, never of a solver, and nobody looks
a step up by its time value or recomputes a stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from diffusion.level import NoiseLevel
from diffusion.schedule import Schedule
from diffusion.spacing import FEW_STEPS, SPACINGS
from diffusion.spec import check_call, lookup

MAX_STEPS = 100_000  # more is a slip: their table alone would take minutes, and then the memory


@dataclass(frozen=True)
class Grid:
    """Levels with strictly falling sigma/alpha; the last is where sampling ends, usually data (alpha 1, sigma
    0).

    `reversed` makes the one kind of grid on which they rise.

    initial_scale  standard deviation of the noise a sample starts from at the first level
    schedule       where the levels are from, and those between them that some solvers ask at
    begun_at       for few-step spacings (turbo, lcm), which are spaced anew from where image to image begins:
                   the grid from a share of the schedule's time on; None where the last steps of the grid
                   itself are taken
    """

    levels: tuple[NoiseLevel, ...]
    initial_scale: float
    schedule: Schedule
    begun_at: Callable[[float], Grid] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise ValueError(
                "a grid needs at least 2 levels, the one to start from and the one to end at: steps must be "
                ">= 1"
            )
        rises = self.rises
        for i, (t, s) in enumerate(pairwise(self.levels)):
            if not (t.alpha >= 0 and s.alpha >= 0 and t.alpha + t.sigma + s.alpha + s.sigma < math.inf):
                raise ValueError(
                    f"levels need finite alpha >= 0 and sigma >= 0, but step {i} goes from {t} to {s}"
                )
            if not s.sigma >= 0:
                raise ValueError(f"a level's sigma must not be negative, but it is {s.sigma:g} at t={s.t:g}")
            below, above = (t, s) if rises else (s, t)
            if not below.sigma * above.alpha < above.sigma * below.alpha:
                raise ValueError(
                    f"noise must fall at every step of a grid, but step {i} goes from t={t.t:g} "
                    f"(sigma/alpha {t.ratio:g}) "
                    f"to t={s.t:g} ({s.ratio:g}): fewer steps, another spacing or another t_end avoid such "
                    "a step"
                )

    @property
    def rises(self) -> bool:
        """Whether noise grows along the grid, which only `reversed` makes it do."""
        first, last = self.levels[0], self.levels[-1]
        return last.sigma * first.alpha > first.sigma * last.alpha

    @property
    def steps(self) -> int:
        """Network calls of a first-order solver: one less than there are levels."""
        return len(self.levels) - 1

    def reversed(self) -> Grid:
        """The levels with noise from the cleanest to the noisiest: for inversion and likelihood, which run
        the ODE upwards."""
        noisy = tuple(level for level in self.levels if level.sigma > 0)[::-1]
        if len(noisy) < 2:
            raise ValueError(
                "a grid runs upwards between levels with noise, and this one has a single one: take more "
                "steps"
            )
        return Grid(noisy, noisy[0].sigma, self.schedule)

    def tail(self, share: float) -> Grid:
        """The last part of the grid, `share` in (0, 1] of its steps. Where that falls within a step, the
        level there is its start.

        What is left of that step joins the next one if it is below a twentieth: a sliver of a step is no base
        to extrapolate from. Few-step spacings (turbo, lcm) begin at that share of the schedule's time, and
        take as many of their steps from there as fit.
        """
        if not 0 < share <= 1:
            raise ValueError(f"the share of a grid's steps to take must lie in (0, 1], not {share:g}")
        if self.begun_at is not None and share < 1:
            return self.begun_at(share)
        skipped = (1 - share) * self.steps
        i = min(math.floor(skipped + 1e-9), self.steps - 1)  # 0.3 of 10 steps are 3
        part, cut = self[i:], skipped - i
        if cut <= 1e-9:
            return part
        first = self.schedule.level(part[0].t + cut * (part[1].t - part[0].t))
        left = 2 if cut > 0.95 and part.steps > 1 else 1
        return Grid((first, *part.levels[left:]), first.sigma, self.schedule)

    def between(self, ratio: float) -> NoiseLevel:
        """The level of that sigma/alpha on the grid's schedule, for solvers that ask between two rows."""
        return _level_of(self.schedule, ratio)

    def start(self, noise: Tensor) -> Tensor:
        """The sample to start from, given standard normal noise."""
        return self.initial_scale * noise

    def __len__(self) -> int:
        return len(self.levels)

    def __iter__(self) -> Iterator[NoiseLevel]:
        return iter(self.levels)

    @overload
    def __getitem__(self, index: int) -> NoiseLevel: ...
    @overload
    def __getitem__(self, index: slice) -> Grid: ...
    def __getitem__(self, index: int | slice) -> NoiseLevel | Grid:
        """One level, or the part of the grid that a slice names (image-to-image starts in the middle)."""
        if isinstance(index, slice):
            levels = self.levels[index]
            kept_start = bool(levels) and levels[0] == self.levels[0]
            return Grid(
                levels, self.initial_scale if kept_start or not levels else levels[0].sigma, self.schedule
            )
        return self.levels[index]


@lru_cache(maxsize=4096)
def _level_of(schedule: Schedule, ratio: float) -> NoiseLevel:
    """Kept, since a grid is walked more than once and a schedule's tensors are slow for one number."""
    return schedule.level(float(schedule.t_from_ratio(ratio)))


def time_grid(
    schedule: Schedule,
    steps: int | None = None,
    spacing: str | Sequence[float] | Tensor = "linspace",
    *,
    t_start: float | None = None,
    t_end: float | None = None,
    shift: float = 1.0,
    whole: bool = False,
    terminal: Literal["data", "t_min"] = "data",
    initial: Literal["noise", "unit"] = "noise",
    **options: Any,
) -> Grid:
    """The grid of `steps` steps on a schedule.

    spacing   a name in SPACINGS, with its own options, or the times themselves, noisiest first
    t_start, t_end  the noisiest and the cleanest time with noise; default the schedule's t_max and t_min
    shift     multiply every level's sigma/alpha by this (SD3: 3.0); the network is told the shifted t
    whole     round times to training indices, as DDIM and DDPM pipelines do (DiscreteVP)
    terminal  where the last step lands: clean data, or the schedule's t_min (`set_alpha_to_one=False`
              elsewhere)
    initial   what a sample starts from: "noise", sigma * n, what a perfect x_T holds besides its trace of
              data; or "unit", norm(alpha, sigma) * n. Published pipelines use the first for linspace and
              trailing, the second for leading.

    Raises ValueError for unknown names, steps < 1, and levels that do not fall.
    """
    begun_at = None
    if isinstance(spacing, str):
        start, end = (
            schedule.t_max if t_start is None else t_start,
            schedule.t_min if t_end is None else t_end,
        )
        t = _spaced(schedule, steps, spacing, start, end, options)
        if room := FEW_STEPS.get(spacing):

            def begun_at(share: float) -> Grid:
                least = end + (schedule.t_max - schedule.t_data) / 1000
                later = max(least, schedule.t_data + share * (start - schedule.t_data))
                fitting = min(len(t), room(schedule, later, end, **options))
                how: dict[str, Any] = {
                    "shift": shift,
                    "whole": whole,
                    "terminal": terminal,
                    "initial": initial,
                }
                return time_grid(schedule, fitting, spacing, t_start=later, t_end=end, **how, **options)

    else:
        if t_start is not None or t_end is not None or options:
            raise ValueError("an explicit list of times leaves nothing to t_start, t_end or spacing options")
        t = torch.as_tensor(spacing, dtype=torch.float64, device="cpu")
        if t.ndim != 1:
            raise ValueError(f"spacing is a name or a list of times, not {spacing!r}")
        if steps is not None and steps != len(t):
            raise ValueError(f"steps={steps}, but the list holds {len(t)} times; leave steps out")
    t = schedule.shift_t(t, shift)
    if whole:
        if schedule.rows is None:
            raise ValueError(
                "whole=True rounds to training indices, which only a table such as DiscreteVP has"
            )
        t = t.round()
    levels = [
        NoiseLevel(*row)
        for row in zip(t.tolist(), schedule.alpha(t).tolist(), schedule.sigma(t).tolist(), strict=True)
    ]
    if not levels or levels[-1].sigma > 0:
        levels.append(
            lookup(
                "terminal rule",
                terminal,
                {"data": schedule.terminal, "t_min": schedule.level(schedule.t_min)},
            )
        )
    first = levels[0]
    scale = lookup(
        "initial noise", initial, {"noise": first.sigma, "unit": math.hypot(first.alpha, first.sigma)}
    )
    return Grid(tuple(levels), scale, schedule, begun_at)


def _spaced(
    schedule: Schedule, steps: int | None, spacing: str, t_start: float, t_end: float, options: dict[str, Any]
) -> Tensor:
    function = lookup("spacing", spacing, SPACINGS)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, not {steps!r}")
    if steps > MAX_STEPS:
        raise ValueError(f"steps must be at most {MAX_STEPS}, not {steps}")
    if not (math.isfinite(t_start) and math.isfinite(t_end)):
        raise ValueError(f"a grid runs between finite times, not from t_start={t_start:g} to t_end={t_end:g}")
    if not t_start > t_end:
        raise ValueError(
            f"a grid runs from noise to data: t_start={t_start:g} must be greater than t_end={t_end:g}"
        )
    return function(schedule, steps, t_start, t_end, **check_call(f"{spacing} spacing", function, 4, options))
