"""Time grids: the levels that a solver visits, from noise to data, including the terminal row. Immutable.

Spacing, terminal rule and initial noise scale belong to the grid, never to a solver. Nobody looks up a step
by its time or recomputes a stride.
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

MAX_STEPS = 100_000  # more is a slip, and would take minutes and much memory


@dataclass(frozen=True)
class Grid:
    """Levels with strictly falling sigma/alpha. The last one is where sampling ends, usually data (sigma 0).

    Only `reversed` makes a grid on which sigma/alpha rises.

    initial_scale  standard deviation of the noise that sampling starts from at the first level
    schedule       the schedule of the levels; some solvers ask it for levels in between
    respaced       for few-step spacings (turbo, lcm): the grid that starts at a share of the schedule's time,
                   for image to image; None if `tail` takes the last steps of this grid
    """

    levels: tuple[NoiseLevel, ...]
    initial_scale: float
    schedule: Schedule
    respaced: Callable[[float], Grid] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise ValueError("a grid needs at least 2 levels, its start and its end: steps must be >= 1")
        rises = self.rises
        for i, (t, s) in enumerate(pairwise(self.levels)):
            if not (t.alpha >= 0 and s.alpha >= 0 and t.alpha + t.sigma + s.alpha + s.sigma < math.inf):
                raise ValueError(f"levels need finite alpha, sigma >= 0, but step {i} goes from {t} to {s}")
            if not s.sigma >= 0:
                raise ValueError(f"a level's sigma must not be negative, but it is {s.sigma:g} at t={s.t:g}")
            below, above = (t, s) if rises else (s, t)
            if not below.sigma * above.alpha < above.sigma * below.alpha:
                step = f"t={t.t:g} (sigma/alpha {t.ratio:g}) to t={s.t:g} ({s.ratio:g})"
                raise ValueError(
                    f"noise must fall at every step of a grid, but step {i} goes from {step}: "
                    "use fewer steps, another spacing or another t_end"
                )

    @property
    def rises(self) -> bool:
        """Whether noise grows along the grid (see `reversed`)."""
        first, last = self.levels[0], self.levels[-1]
        return last.sigma * first.alpha > first.sigma * last.alpha

    @property
    def steps(self) -> int:
        """The number of steps: network calls of a first-order solver."""
        return len(self.levels) - 1

    def reversed(self) -> Grid:
        """The levels with noise, cleanest first: inversion and likelihood run the ODE upwards."""
        noisy = tuple(level for level in self.levels if level.sigma > 0)[::-1]
        if len(noisy) < 2:
            raise ValueError("only one level of this grid has noise, and reversed needs two: take more steps")
        return Grid(noisy, noisy[0].sigma, self.schedule)

    def tail(self, share: float) -> Grid:
        """The last part of the grid, `share` in (0, 1] of its steps; it may start within a step.

        If less than a twentieth of that step remains, it is merged with the next one: extrapolation from so
        short a step is unstable. Few-step spacings (turbo, lcm) instead start at that share of the schedule's
        time, and take as many of their steps as fit.
        """
        if not 0 < share <= 1:
            raise ValueError(f"the share of a grid's steps must lie in (0, 1], not {share:g}")
        if self.respaced is not None and share < 1:
            return self.respaced(share)
        skipped = (1 - share) * self.steps
        i = min(math.floor(skipped + 1e-9), self.steps - 1)  # 0.3 of 10 steps is 3
        part, cut = self[i:], skipped - i
        if cut <= 1e-9:
            return part
        first = self.schedule.level(part[0].t + cut * (part[1].t - part[0].t))
        left = 2 if cut > 0.95 and part.steps > 1 else 1
        return Grid((first, *part.levels[left:]), first.sigma, self.schedule)

    def between(self, ratio: float) -> NoiseLevel:
        """The level of that sigma/alpha, for solvers that evaluate between two rows."""
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
        """One level, or a part of the grid."""
        if isinstance(index, slice):
            levels = self.levels[index]
            starts_later = levels and levels[0] != self.levels[0]
            return Grid(levels, levels[0].sigma if starts_later else self.initial_scale, self.schedule)
        return self.levels[index]


@lru_cache(maxsize=4096)
def _level_of(schedule: Schedule, ratio: float) -> NoiseLevel:
    """Cached: grids are walked more than once, and a schedule's tensors are slow for one number."""
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
    """A grid of `steps` steps on a schedule.

    spacing   a name in SPACINGS, whose own options are `options`, or a list of times, noisiest first
    t_start, t_end  the noisiest time and the cleanest one with noise; default: the schedule's t_max and t_min
    shift     multiplies the sigma/alpha of every level (SD3: 3.0); the network gets the shifted t
    whole     round times to training indices, as DDIM and DDPM pipelines do (DiscreteVP)
    terminal  where the last step ends: clean data, or the schedule's t_min (`set_alpha_to_one=False` in
              diffusers)
    initial   the start: "noise", sigma * n, which is x_T without its trace of data; or "unit", norm(alpha,
              sigma) * n. Published pipelines use "noise" for linspace and trailing, "unit" for leading

    ValueError for unknown names, steps < 1, and levels that do not fall.
    """
    respaced = None
    if isinstance(spacing, str):
        start = schedule.t_max if t_start is None else t_start
        end = schedule.t_min if t_end is None else t_end
        t = _spaced(schedule, steps, spacing, start, end, options)
        if room := FEW_STEPS.get(spacing):

            def respaced(share: float) -> Grid:
                least = end + (schedule.t_max - schedule.t_data) / 1000
                later = max(least, schedule.t_data + share * (start - schedule.t_data))
                fitting = min(len(t), room(schedule, later, end, **options))
                rest: dict[str, Any] = dict(shift=shift, whole=whole, terminal=terminal, initial=initial)
                return time_grid(schedule, fitting, spacing, t_start=later, t_end=end, **rest, **options)

    else:
        if t_start is not None or t_end is not None or options:
            raise ValueError("a list of times takes no t_start, t_end or spacing options: leave them out")
        t = torch.as_tensor(spacing, dtype=torch.float64, device="cpu")
        if t.ndim != 1:
            raise ValueError(f"spacing is a name or a list of times, not {spacing!r}")
        if steps is not None and steps != len(t):
            raise ValueError(f"steps={steps}, but the list holds {len(t)} times; leave steps out")
    t = schedule.shift_t(t, shift)
    if whole:
        if schedule.rows is None:
            raise ValueError("whole=True rounds to training indices: only a table such as DiscreteVP has any")
        t = t.round()
    columns = t.tolist(), schedule.alpha(t).tolist(), schedule.sigma(t).tolist()
    levels = [NoiseLevel(*row) for row in zip(*columns, strict=True)]
    if not levels or levels[-1].sigma > 0:
        ends = {"data": schedule.terminal, "t_min": schedule.level(schedule.t_min)}
        levels.append(lookup("terminal rule", terminal, ends))
    first = levels[0]
    scales = {"noise": first.sigma, "unit": math.hypot(first.alpha, first.sigma)}
    return Grid(tuple(levels), lookup("initial noise", initial, scales), schedule, respaced)


def _spaced(
    schedule: Schedule, steps: int | None, spacing: str, t_start: float, t_end: float, options: dict[str, Any]
) -> Tensor:
    function = lookup("spacing", spacing, SPACINGS)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, not {steps!r}")
    if steps > MAX_STEPS:
        raise ValueError(f"steps must be at most {MAX_STEPS}, not {steps}")
    if not (math.isfinite(t_start) and math.isfinite(t_end)):
        raise ValueError(f"a grid needs finite times, not t_start={t_start:g} and t_end={t_end:g}")
    if not t_start > t_end:
        raise ValueError(f"a grid falls from noise to data: t_start={t_start:g} is not above t_end={t_end:g}")
    return function(schedule, steps, t_start, t_end, **check_call(f"{spacing} spacing", function, 4, options))
