"""The figures of the report, one function each. Drawn through matplotlib's Figure, never through pyplot's global state.

`save_figure` writes a figure for a README or a talk. `svg` makes it part of a page: its colours become CSS variables, so that
one drawing serves light and dark, and its text stays text.
"""

# ruff: noqa: RUF001  (Greek letters are meant)

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatterSciNotation, LogLocator, NullLocator
from PIL import Image
from torch import Tensor

from diffusion import Schedule, time_grid
from eval.convergence import Curve
from eval.score import Metric, Score, Spread, reference
from models.files import replacing
from samplers.pictures import tile, to_uint8

# Light colours by name; the page's style sheet holds the dark ones under the same names. The series are Okabe and Ito's (2008).
PALETTE = {
    "ink": "#1c2128", "muted": "#66707b", "grid": "#e4e7eb", "surface": "#fefefe",
    "blue": "#0072b2", "vermilion": "#d55e00", "green": "#009e73", "purple": "#b8609a", "orange": "#d18f00", "sky": "#3d9fd6",
}  # fmt: skip
SERIES = ("blue", "vermilion", "green", "purple", "orange", "sky")
WIDTH = 11.0  # inches; a page shows a figure of this width at its full measure
INK, MUTED, GRID, SURFACE = (PALETTE[name] for name in ("ink", "muted", "grid", "surface"))


@dataclass(frozen=True)
class Style:
    """How a sampler is drawn, on every figure alike."""

    color: str
    marker: str
    size: float
    width: float
    dashes: Any = "-"
    hollow: bool = False
    offset: float = -0.2  # of its own from a line that samplers share, in lines


# DDIM and Euler are the same numbers. So DDIM is a wide band with large rings, and Euler a thin dashed line with dots inside them.
STYLES = {
    "ddpm": Style(PALETTE["vermilion"], "s", 5.5, 1.8),
    "ddim": Style(PALETTE["sky"], "o", 11, 4.5, hollow=True, offset=0.1),
    "euler": Style(PALETTE["ink"], "o", 4, 1.4, (0, (3, 2)), offset=0.1),
    "consistency": Style(PALETTE["green"], "D", 6, 1.8, offset=0),
}
# Kinds of spacings with their colour, and the rows of each on the picture of grids: (name there, spacing, options).
GRIDS: dict[tuple[str, str], tuple[tuple[str, str, dict[str, Any]], ...]] = {
    ("even in time", "blue"): tuple((name, name, {}) for name in ("linspace", "trailing", "sgm_uniform", "simple", "leading")),
    ("shifted to more noise", "orange"): (("linspace, shift=3", "linspace", {"shift": 3.0}), ("mu_shift, mu=1.15", "mu_shift", {})),
    ("even in noise", "vermilion"): (("karras", "karras", {}), ("log_snr = exponential", "log_snr", {})),
    ("a curve of its own", "purple"): (("beta", "beta", {}), ("linear_quadratic", "linear_quadratic", {})),
    ("fitted to a model", "green"): tuple((f"align_your_steps, {t}", "align_your_steps", {"table": t}) for t in ("sd1", "sdxl", "svd")),
}
AXIS_NAMES = {
    "frechet": "Fréchet distance (lower is better)",
    "kernel": "Kernel distance (lower is better)",
    "accuracy": "Label accuracy (higher is better)",
    "nearest": "Distance to the nearest training image",
    "copies": "Share of near-copies",
}


# ----------------------------------------------------------------------------------------------------------------- quality


def quality_plot(scores: Sequence[Score], metric: Metric = "frechet") -> Figure:
    """A metric against the number of steps: a column per model, a row per guidance scale, a line per sampler.

    The band is real data, the dotted line noise. Bars are one standard deviation over seeds.
    """
    made = [s for s in scores if s.kind == "model"]
    models, guidances = _unique(s.model for s in made), sorted({s.guidance for s in made})
    figure, panels = _panels(len(guidances), len(models), height=3.1, sharey=True)
    for (i, guidance), (j, model) in itertools.product(enumerate(guidances), enumerate(models)):
        axes, part = panels[i, j], [s for s in made if (s.model, s.guidance) == (model, guidance)]
        axes.set_visible(bool(part))
        first = not any((s.model, s.guidance) == (left, guidance) for s in made for left in models[:j])
        _axes(axes, title=f"{model} · {guidance_name(guidance)}", xlabel="steps", ylabel=AXIS_NAMES[metric] if first else "")
        _quality_scale(axes, made, metric)
        _references(axes, scores, metric)
        axes.tick_params(labelleft=first)
        for sampler in _unique(s.sampler for s in part):
            _line(axes, [s for s in part if s.sampler == sampler], metric)
    _legend(figure, panels.flat)
    return figure


def trade_offs_plot(scores: Sequence[Score]) -> Figure:
    """Frechet distance against the network calls it costs, and against the label accuracy it comes with; a colour per model.

    The step line joins the rows that nothing cheaper beats. Filled markers have no guidance, hollow ones have.
    """
    made = [s for s in scores if s.kind == "model"]
    figure, ((cost, labels),) = _panels(1, 2, height=3.9, sharey=True)
    for axes in (cost, labels):
        for model, color in _colors(s.model for s in made).items():
            for score in (s for s in made if s.model == model):
                style, x = _style(score.sampler), score.calls if axes is cost else 100 * score.accuracy.mean
                face = color if score.guidance == 1 else SURFACE
                axes.plot(x, score.frechet.mean, style.marker, ms=6, mfc=face, mec=color, mew=1.4, label=model, zorder=3)
    for sampler in _unique(s.sampler for s in made):
        cost.plot([], [], _style(sampler).marker, ms=6, color=MUTED, label=sampler)
    if any(s.guidance != 1 for s in made):
        cost.plot([], [], "o", ms=6, mfc=SURFACE, mec=MUTED, mew=1.4, label="guided")
    front = _front(made)
    cost.step([s.calls for s in front], [s.frechet.mean for s in front], where="post", color=MUTED, lw=1, zorder=1)
    _axes(cost, title="What quality costs", xlabel="network calls per sample", ylabel=AXIS_NAMES["frechet"])
    _log_x(cost, sorted({s.calls for s in made}))
    _axes(labels, title="Likeness and label", xlabel="label accuracy, % (further right is better)")
    for axes in (cost, labels):
        _quality_scale(axes, made, "frechet", steps=False)
        _references(axes, scores, "frechet")
    _legend(figure, [cost])
    return figure


def nearest_plot(scores: Sequence[Score]) -> Figure:
    """Distance to the nearest training image: a line per reference, and per model and guidance scale; a marker per row of the table."""
    near = [s for s in scores if math.isfinite(s.nearest.mean)]
    within = [s for s in near if s.kind != "ceiling"]
    made = sorted((s for s in near if s.kind == "model"), key=lambda s: (_unique(s.model for s in scores).index(s.model), s.guidance))
    lines = _unique(_nearest_name(s) for s in [*(s for s in within if s.kind != "model"), *made, *near])
    figure, ((axes,),) = _panels(1, 1, height=0.9 + 0.4 * len(lines))
    for score in within:
        style, y = _style(score.sampler), lines.index(_nearest_name(score))
        shape = dict(fmt=style.marker, ms=0.8 * style.size, color=style.color) if score.sampler else dict(fmt="D", ms=5, color=MUTED)
        axes.errorbar(
            score.nearest.mean, y + style.offset * bool(score.sampler), xerr=score.nearest.std, mfc="none" if style.hollow else None,
            mew=1.6 if style.hollow else 0, elinewidth=1, label=score.sampler or "_reference", zorder=2 if style.hollow else 3,
            clip_on=False, **shape,
        )  # fmt: skip
    _axes(axes, title="", xlabel="Euclidean distance to the nearest training image (0: an exact copy)", grid="x")
    unseen = reference(scores, "floor", "nearest")
    if unseen is not None:
        axes.axvspan(unseen.mean - unseen.std, unseen.mean + unseen.std, color=MUTED, alpha=0.3, lw=0)
        axes.axvline(unseen.mean, color=MUTED, lw=1)
    end = 1.2 * max((s.nearest.mean + s.nearest.std for s in within), default=1.0)
    for score in near:  # noise lies so far off that a scale with room for it would hide the rest
        if score.kind == "ceiling":
            axes.annotate(f"{score.nearest.mean:.2f} →", (end, lines.index(_nearest_name(score))), ha="right", va="center", color=MUTED)
    axes.set_yticks(range(len(lines)), lines)
    axes.set(ylim=(len(lines) - 0.4, -0.6), xlim=(0, end))
    axes.tick_params(axis="y", length=0, pad=10, labelcolor=INK, labelsize=9.5)
    _legend(figure, [axes])
    return figure


def _nearest_name(score: Score) -> str:
    return f"{score.model} · {guidance_name(score.guidance)}" if score.kind == "model" else score.model


# ---------------------------------------------------------------------------------------------------- training and schedules


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss and gradient norm of each training run: the logged values faint, their moving average over 5 % of the run bold."""
    rows = [key for key in ("loss", "grad_norm") if any(key in line for lines in curves.values() for line in lines)]
    figure, panels = _panels(len(rows), len(curves), height=2.3)
    for j, (name, color) in enumerate(_colors(curves).items()):
        for i, key in enumerate(rows):
            axes = panels[i, j]
            points = [(line["step"], line[key]) for line in curves[name] if key in line and math.isfinite(line[key])]
            _axes(axes, title=name if i == 0 else "", xlabel="step" if i == len(rows) - 1 else "")
            if points:
                steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
                every = max(1, len(steps) // 500)  # more points than pixels only make the file large
                axes.plot(steps[::every], values[::every], color=color, lw=0.6, alpha=0.4)
                axes.plot(steps[::every], smooth(values)[::every], color=color, lw=2)
                _log_y(axes, values[values > 0])
            if j == 0:
                axes.set_ylabel({"loss": "loss", "grad_norm": "gradient norm"}[key])
    return figure


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Moving average over `share` of the values: centred, narrower at the start, which is steep, one-sided at the end, which is noisy."""
    i = np.arange(len(values))
    before = np.minimum(i, round(share * len(values) / 2))
    after = np.minimum(before, i[::-1])
    total = np.concatenate(([0.0], np.cumsum(values)))
    return np.asarray((total[i + after + 1] - total[i - before]) / (before + after + 1))


def schedule_plot(schedules: Mapping[str, Schedule]) -> Figure:
    """alpha and sigma, and the log signal-to-noise ratio they amount to, over each schedule's own span of time."""
    figure, ((factors, snr),) = _panels(1, 2, height=3.0)
    share = torch.linspace(0, 1, 301, dtype=torch.float64)
    for (name, schedule), color in zip(schedules.items(), _colors(schedules).values(), strict=True):
        t = schedule.t_data + share * (schedule.t_max - schedule.t_data)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        factors.plot(share, alpha, color=color, lw=2, label=name)
        factors.plot(share, sigma, color=color, lw=2, ls=(0, (4, 2)))
        inside = (alpha > 0) & (sigma > 0)
        snr.plot(share[inside], 2 * (alpha / sigma)[inside].log(), color=color, lw=2)
    where = "share of the schedule's time, from data (0) to noise (1)"
    _axes(factors, title="Factor of the data, α (solid), and of the noise, σ (dashed)", xlabel=where)
    _axes(snr, title="log signal-to-noise ratio, log(α²/σ²)", xlabel=where)
    snr.axhline(0, color=MUTED, lw=1)
    snr.annotate("as much data as noise", (0, 0), (4, -4), textcoords="offset points", va="top", color=MUTED, fontsize=8.5)
    snr.set_ylim(-14, 14)
    _legend(figure, [factors])
    return figure


# ----------------------------------------------------------------------------------------------------------------- solvers


def convergence_plot(curves: Sequence[Curve]) -> Figure:
    """Error against network calls, a panel per grid and one for Brownian paths; a colour per order stated, a marker per solver."""
    names = _unique(curve.grid for curve in curves if not curve.strong)
    parts = [(name, [c for c in curves if c.grid == name and not c.strong]) for name in names]
    parts += [("Brownian path", part)] if (part := [c for c in curves if c.strong]) else []
    figure, (panels,) = _panels(1, len(parts), height=4.2)
    colors = {order: PALETTE[color] for order, color in zip((1, 2, 3, 4), ("vermilion", "blue", "green", "purple"), strict=True)}
    markers = dict(zip(_unique(curve.sampler for curve in curves), "os^vDPX<>*hpd8", strict=False))
    for axes, (title, part) in zip(panels, parts, strict=True):
        strong = part[0].strong
        for curve in part:
            axes.plot(
                curve.calls, curve.error, color=colors[curve.stated], marker=markers[curve.sampler], ms=5, lw=1.3, mfc=SURFACE, mew=1.2,
                label=curve.sampler, ls=(0, (4, 2)) if strong else "-",
            )  # fmt: skip
        for order in {curve.stated for curve in part}:
            x, y = max((curve.calls[-1], curve.error[-1]) for curve in part if curve.stated == order)
            axes.annotate(
                f"order {order}", (x, y), (8, -3), textcoords="offset points", color=colors[order], fontsize=8.5, fontweight="bold"
            )
        _axes(axes, title, "network calls", "mean distance from twice the steps" if strong else "mean error" * (axes is panels[0]))
        _log_x(axes, [8, 32, 128, 512, 2048])
        _log_y(axes, np.concatenate([curve.error for curve in part]))
        if not strong:
            axes.yaxis.set_major_formatter(LogFormatterSciNotation())
        axes.set_xlim(right=5 * max(curve.calls[-1] for curve in part))  # room for the names of the orders
    _legend(figure, panels, columns=7)
    return figure


def grids_plot(schedules: Mapping[str, Schedule], steps: int = 12) -> Figure:
    """The levels that every spacing visits, a panel per schedule and a row per spacing: a dot per network call, then a ring at data.

    The README's picture is `save_figure(grids_plot({"Stable Diffusion's table": DiscreteVP.scaled_linear(), "Rectified flow":
    RectifiedFlow()}), "notebooks/pictures/grids.png")`.
    """
    rows = [(kind, color, *row) for (kind, color), part in GRIDS.items() for row in part]
    figure, (panels,) = _panels(1, len(schedules), height=0.7 + 0.28 * len(rows), sharey=True)
    for axes, (title, schedule) in zip(panels, schedules.items(), strict=True):
        time_grid(schedule, steps)  # a number of steps that no grid can have is an error, not a picture without dots
        for y, (kind, color, _, spacing, options) in enumerate(rows):
            axes.plot([], [], "o", ms=6.5, color=PALETTE[color], label=kind)  # in the legend even where no row of its kind can be drawn
            try:
                grid = time_grid(schedule, steps, spacing, **_inside(schedule, spacing), **options)
            except ValueError:  # all that these options leave to go wrong
                axes.annotate("would start at more noise than there is", (0.98, y), va="center", color=MUTED, fontsize=8.5)
                continue
            share = [level.sigma / (level.alpha + level.sigma) for level in grid]
            axes.plot([share[0], 0], [y, y], color=GRID, lw=1, zorder=1)
            axes.plot(share[:-1], [y] * steps, "o", ms=6.5, color=PALETTE[color], mec=SURFACE, mew=0.7, clip_on=False, zorder=3)
            axes.plot(share[-1], y, "o", ms=9.5, mfc="none", mec=MUTED, mew=1.1, clip_on=False, zorder=2)
        axes.plot([], [], "o", ms=9.5, mfc="none", mec=MUTED, mew=1.1, label="data")
        _axes(axes, title=f"{title} · {steps} steps", xlabel="share of noise, σ/(α+σ): sampling goes from 1 to 0", grid="x")
        axes.set_yticks(range(len(rows)), [name for _, _, name, _, _ in rows])
        axes.set(xlim=(1.01, -0.025), ylim=(len(rows) - 0.5, -0.6))
        axes.tick_params(axis="y", length=0, pad=8, labelcolor=INK, labelsize=9.5)
    _legend(figure, panels)
    return figure


def _inside(schedule: Schedule, spacing: str) -> dict[str, Any]:
    """The range for spacings that cannot begin at pure noise or end at data itself, where a schedule does."""
    ends: dict[str, Any] = {}
    if spacing in ("karras", "log_snr", "leading") and schedule.level(schedule.t_min).sigma == 0:
        ends["t_end"] = 0.001 * schedule.t_max
    if spacing in ("karras", "log_snr") and schedule.level(schedule.t_max).alpha == 0:
        ends["t_start"] = 0.999 * schedule.t_max
    return ends


# ------------------------------------------------------------------------------------------------------------------- output


def save_figure(figure: Figure, path: str | Path, dpi: int = 200) -> None:
    """Write a figure as PNG on white, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an <svg> element for a page: palette colours as var(--...), text as text, ids that begin with `name`.

    The same figure gives the same text. `description` is what a screen reader says in its place.
    """
    buffer = io.StringIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once: a second time would move everything by a rounding error
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    # Several figures share one page; and matplotlib's own ids are not always those of the last time.
    ids = {old: f"{name}-{i}" for i, old in enumerate(re.findall(r'\bid="([^"]+)"', text))}
    text = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', lambda match: match[1] + ids[match[2]], text)
    known = {color: f"var(--{key}, {color})" for key, color in PALETTE.items()}
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: known.get(match[0], match[0]), text)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(description)}">'
    return head + re.sub(r"^<svg[^>]*>", "", text).replace("xlink:href", "href")


def picture(images: Tensor, columns: int) -> bytes:
    """Images (N, C, H, W) in [-1, 1] as one PNG, row by row at their own size, one clear pixel between them. C is 1 or 3.

    Values outside [-1, 1] are clipped. Magnifying is left to whoever shows it.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"a picture needs images (N, 1 or 3, H, W), not {tuple(images.shape)}")
    colours = images.detach().cpu().float().expand(-1, 3, -1, -1)
    opaque = torch.cat([colours, torch.ones_like(colours[:, :1])], 1)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(tile(opaque, columns, fill=-1)[None])[0].permute(1, 2, 0).numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def guidance_name(scale: float) -> str:
    """How a guidance scale is written: 1 is none, 0 leaves the condition out."""
    return "unconditional" if scale == 0 else "no guidance" if scale == 1 else f"guidance {scale:g}"


# -------------------------------------------------------------------------------------------------------------------- parts


def _panels(rows: int, columns: int, height: float, sharey: bool = False) -> tuple[Figure, Any]:
    """A figure of full width and its axes as an array (rows, columns); `height` is that of one row, in inches."""
    figure = Figure(figsize=(WIDTH, height * max(rows, 1) + 0.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    return figure, figure.subplots(max(rows, 1), max(columns, 1), squeeze=False, sharey=sharey)


def _axes(axes: Any, title: str, xlabel: str, ylabel: str = "", grid: str = "y") -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel)
    axes.yaxis.label.set(fontsize=9, color=MUTED)
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis=grid, color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def _line(axes: Any, part: Sequence[Score], metric: Metric) -> None:
    """One sampler's scores over its steps, in its style, with a bar for the spread over seeds."""
    part = sorted(part, key=lambda s: s.steps)
    style = _style(part[0].sampler)
    low, middle, high = np.array([_ends(getattr(s, metric), metric, s.n) for s in part]).T
    axes.errorbar(
        [s.steps for s in part], middle, yerr=(middle - low, high - middle), color=style.color, lw=style.width, ls=style.dashes,
        marker=style.marker, ms=style.size, mfc=SURFACE if style.hollow else style.color, mec=style.color,
        mew=1.8 if style.hollow else 0, elinewidth=1.2, capsize=0, label=part[0].sampler, zorder=2 if style.hollow else 3,
    )  # fmt: skip


def _quality_scale(axes: Any, made: Sequence[Score], metric: Metric, steps: bool = True) -> None:
    """Log axes for steps and for distances; a logit axis in percent for accuracy."""
    if steps:
        _log_x(axes, sorted({s.steps for s in made}))
    if metric == "accuracy":
        axes.set_yscale("logit")
        axes.yaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    else:
        _log_y(axes, np.array([value for s in made if (value := getattr(s, metric).mean) > 0 and math.isfinite(value)]))
    axes.yaxis.set_minor_locator(NullLocator())


def _references(axes: Any, scores: Sequence[Score], metric: Metric) -> None:
    """Real data as a band of mean +- spread, noise as a dotted line where it is near enough not to flatten the rest, else in words."""
    real, noise = reference(scores, "floor", metric), reference(scores, "ceiling", metric)
    n = max((s.n for s in scores), default=1)
    if real is not None:
        low, middle, high = _ends(real, metric, n)
        axes.axhspan(low, high, color=MUTED, alpha=0.3, lw=0, zorder=0)
        axes.axhline(middle, color=MUTED, lw=1, zorder=0, label="real digits")
    if noise is None:
        return
    made = [getattr(s, metric).mean for s in scores if s.kind == "model"]
    accuracy = metric == "accuracy"
    if made and (min(made) > noise.mean + 0.5 if accuracy else 4 * max(made) < noise.mean):
        text = f"pure noise {100 * noise.mean:.0f} % ↓" if accuracy else f"pure noise {noise.mean:.3g} ↑"
        place = dict(xy=(1, 0), xytext=(-2, 4), va="bottom") if accuracy else dict(xy=(1, 1), xytext=(-2, -3), va="top")
        axes.annotate(text, xycoords="axes fraction", textcoords="offset points", ha="right", color=MUTED, fontsize=8.5, **place)
    else:
        axes.axhline(_ends(noise, metric, n)[1], color=MUTED, lw=1.2, ls=(0, (1, 2)), zorder=0, label="pure noise")


def _ends(spread: Spread, metric: Metric, n: int) -> tuple[float, float, float]:
    """mean - std, mean, mean + std, inside what the axis can show.

    A log axis has no 0, so a bar ends at a tenth of its value; a logit axis has neither 0 nor 1, so half an image in n is kept.
    """
    low, middle, high = spread.mean - spread.std, spread.mean, spread.mean + spread.std
    if metric in ("frechet", "kernel"):
        return max(low, 0.1 * middle), middle, high
    if metric == "accuracy":
        low, middle, high = (min(max(value, 0.5 / n), 1 - 0.5 / n) for value in (low, middle, high))
    return low, middle, high


def _front(made: Sequence[Score]) -> list[Score]:
    """The scores that no cheaper one reaches, from the cheapest on."""
    front: list[Score] = []
    for score in sorted((s for s in made if math.isfinite(s.frechet.mean)), key=lambda s: (s.calls, s.frechet.mean)):
        if not front or score.frechet.mean < front[-1].frechet.mean:
            front.append(score)
    return front


def _log_x(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    kept = [tick for i, tick in enumerate(ticks) if i == 0 or tick >= 1.25 * ticks[i - 1]]  # nearer ones would overlap
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))


def _log_y(axes: Any, values: np.ndarray) -> None:
    """Round numbers as ticks: 1, 2, 5 within two decades, powers of ten beyond."""
    if len(values) == 0:
        return
    axes.set_yscale("log", nonpositive="mask")
    narrow = values.max() < 100 * values.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _legend(figure: Figure, panels: Iterable[Any], columns: int = 8) -> None:
    """One legend above the panels, each name once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside upper left", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK,
            handlelength=2.6, columnspacing=2.2,
        )  # fmt: skip


def _style(sampler: str) -> Style:
    """A sampler's own style, or for one without, a colour and marker that its name always gets."""
    if sampler in STYLES:
        return STYLES[sampler]
    place = sum(map(ord, sampler))
    return Style(PALETTE[("purple", "orange", "blue")[place % 3]], "^vPX"[place % 4], 6.5, 1.8)


def _colors(names: Iterable[str]) -> dict[str, str]:
    return {name: PALETTE[SERIES[i % len(SERIES)]] for i, name in enumerate(_unique(names))}


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"
