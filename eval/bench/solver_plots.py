"""Figures of solvers and grids."""

# ruff: noqa: RUF001  (Greek letters are meant)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion import Schedule, time_grid
from eval.bench.convergence import Curve
from eval.drawing import (
    GRID,
    INK,
    MUTED,
    PALETTE,
    SURFACE,
    label_axes,
    legend,
    log_x,
    log_y,
    make_panels,
    unique,
)
from plain_diffusion.extras import extra

with extra("plots"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatterSciNotation

# (kind of spacing, colour): rows of the picture of grids, as (label, spacing, options)
GRIDS: dict[tuple[str, str], tuple[tuple[str, str, dict[str, Any]], ...]] = {
    ("even in time", "blue"): tuple(
        (name, name, {}) for name in ("linspace", "trailing", "sgm_uniform", "simple", "leading")
    ),
    ("shifted to more noise", "orange"): (
        ("linspace, shift=3", "linspace", {"shift": 3.0}),
        ("mu_shift, mu=1.15", "mu_shift", {}),
    ),
    ("even in noise", "vermilion"): (("karras", "karras", {}), ("log_snr = exponential", "log_snr", {})),
    ("a curve of its own", "purple"): (("beta", "beta", {}), ("linear_quadratic", "linear_quadratic", {})),
    ("fitted to a model", "green"): tuple(
        (f"align_your_steps, {t}", "align_your_steps", {"table": t}) for t in ("sd1", "sdxl", "svd")
    ),
    ("of distilled models", "sky"): (("lcm", "lcm", {}), ("turbo, stride=0.05", "turbo", {"stride": 0.05})),
}


def convergence_plot(curves: Sequence[Curve]) -> Figure:
    """Error against network calls, with a panel per grid, a colour per order and a marker per solver."""
    names = unique(curve.grid for curve in curves if not curve.strong)
    parts = [(name, [c for c in curves if c.grid == name and not c.strong]) for name in names]
    parts += [("Brownian path", part)] if (part := [c for c in curves if c.strong]) else []
    figure, (panels,) = make_panels(1, len(parts), height=4.2)
    colors = {i + 1: PALETTE[color] for i, color in enumerate(("vermilion", "blue", "green", "purple"))}
    markers = dict(zip(unique(curve.sampler for curve in curves), "os^vDPX<>*hpd8", strict=False))
    for axes, (title, part) in zip(panels, parts, strict=True):
        strong = part[0].strong
        for curve in part:
            axes.plot(
                curve.calls, curve.error, color=colors[curve.stated], marker=markers[curve.sampler], ms=5,
                lw=1.3, mfc=SURFACE, mew=1.2,
                label=curve.sampler, ls=(0, (4, 2)) if strong else "-",
            )  # fmt: skip
        for order in {curve.stated for curve in part}:
            x, y = max((curve.calls[-1], curve.error[-1]) for curve in part if curve.stated == order)
            style = {"color": colors[order], "fontsize": 8.5, "fontweight": "bold"}
            axes.annotate(f"order {order}", (x, y), (8, -3), textcoords="offset points", **style)
        ylabel = "mean distance from twice the steps" if strong else "mean error" * (axes is panels[0])
        label_axes(axes, title, "network calls", ylabel)
        log_x(axes, [8, 32, 128, 512, 2048])
        log_y(axes, np.concatenate([curve.error for curve in part]))
        if not strong:
            axes.yaxis.set_major_formatter(LogFormatterSciNotation())
        axes.set_xlim(right=5 * max(curve.calls[-1] for curve in part))  # room for the names of the orders
    legend(figure, panels, columns=7)
    return figure


def grids_plot(schedules: Mapping[str, Schedule], steps: int = 12) -> Figure:
    """The levels of every spacing, a panel per schedule: a dot per network call, then a ring at data.

    The picture in docs/samplers.md is `save_figure(grids_plot({"Stable Diffusion's table":
    DiscreteVP.scaled_linear(), "Rectified flow": RectifiedFlow()}), "notebooks/pictures/grids.png")`.
    """
    rows = [(kind, color, *row) for (kind, color), part in GRIDS.items() for row in part]
    ring: dict[str, Any] = {"ms": 9.5, "mfc": "none", "mec": MUTED, "mew": 1.1}
    figure, (panels,) = make_panels(1, len(schedules), height=0.7 + 0.28 * len(rows), sharey=True)
    for axes, (title, schedule) in zip(panels, schedules.items(), strict=True):
        time_grid(schedule, steps)  # an impossible number of steps is an error, not a picture without dots
        for y, (kind, color, _, spacing, options) in enumerate(rows):
            dot = {"ms": 6.5, "color": PALETTE[color]}
            axes.plot([], [], "o", label=kind, **dot)  # in the legend even without a row of its kind
            try:
                grid = time_grid(schedule, steps, spacing, **_inside(schedule, spacing), **options)
            except ValueError:  # the only one that these options can raise
                note = "would start at more noise than there is"
                axes.annotate(note, (0.98, y), va="center", color=MUTED, fontsize=8.5)
                continue
            share = [level.sigma / (level.alpha + level.sigma) for level in grid]
            axes.plot([share[0], 0], [y, y], color=GRID, lw=1, zorder=1)
            axes.plot(share[:-1], [y] * steps, "o", mec=SURFACE, mew=0.7, clip_on=False, zorder=3, **dot)
            axes.plot(share[-1], y, "o", clip_on=False, zorder=2, **ring)
        axes.plot([], [], "o", label="data", **ring)
        xlabel = "share of noise, σ/(α+σ): sampling goes from 1 to 0"
        label_axes(axes, title=f"{title} · {steps} steps", xlabel=xlabel, grid="x")
        axes.set_yticks(range(len(rows)), [name for _, _, name, _, _ in rows])
        axes.set(xlim=(1.01, -0.025), ylim=(len(rows) - 0.5, -0.6))
        axes.tick_params(axis="y", length=0, pad=8, labelcolor=INK, labelsize=9.5)
    legend(figure, panels)
    return figure


def _inside(schedule: Schedule, spacing: str) -> dict[str, Any]:
    """Options for spacings that cannot begin at pure noise or end at data, where the schedule does."""
    ends: dict[str, Any] = {}
    if spacing in ("karras", "log_snr", "leading") and schedule.level(schedule.t_min).sigma == 0:
        ends["t_end"] = 0.001 * schedule.t_max
    if spacing in ("karras", "log_snr") and schedule.level(schedule.t_max).alpha == 0:
        ends["t_start"] = 0.999 * schedule.t_max
    return ends
