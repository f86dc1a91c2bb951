"""The figures of the report, one function each."""

# ruff: noqa: RUF001  (Greek letters are meant)

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffusion import Schedule
from eval.digits.score import Metric, Score, Spread, reference
from eval.drawing import (
    INK,
    MUTED,
    SURFACE,
    colors_of,
    guidance_name,
    label_axes,
    legend,
    log_x,
    log_y,
    make_panels,
    pareto_front,
    sampler_style,
    unique,
)
from plain_diffusion.extras import extra

with extra("plots"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
    models, guidances = unique(s.model for s in made), sorted({s.guidance for s in made})
    figure, panels = make_panels(len(guidances), len(models), height=3.1, sharey=True)
    for (i, guidance), (j, model) in itertools.product(enumerate(guidances), enumerate(models)):
        axes, part = panels[i, j], [s for s in made if (s.model, s.guidance) == (model, guidance)]
        axes.set_visible(bool(part))
        first = not any((s.model, s.guidance) == (left, guidance) for s in made for left in models[:j])
        label_axes(axes, title=f"{model} · {guidance_name(guidance)}", xlabel="steps", ylabel=AXIS_NAMES[metric] if first else "")
        _quality_scale(axes, made, metric)
        _references(axes, scores, metric)
        axes.tick_params(labelleft=first)
        for sampler in unique(s.sampler for s in part):
            _line(axes, [s for s in part if s.sampler == sampler], metric)
    legend(figure, panels.flat)
    return figure


def trade_offs_plot(scores: Sequence[Score]) -> Figure:
    """Frechet distance against the network calls it costs, and against the label accuracy it comes with; a colour per model.

    The step line joins the rows that nothing cheaper beats. Filled markers have no guidance, hollow ones have.
    """
    made = [s for s in scores if s.kind == "model"]
    figure, ((cost, labels),) = make_panels(1, 2, height=3.9, sharey=True)
    for axes in (cost, labels):
        for model, color in colors_of(s.model for s in made).items():
            for score in (s for s in made if s.model == model):
                style, x = sampler_style(score.sampler), score.calls if axes is cost else 100 * score.accuracy.mean
                face = color if score.guidance == 1 else SURFACE
                axes.plot(x, score.frechet.mean, style.marker, ms=6, mfc=face, mec=color, mew=1.4, label=model, zorder=3)
    for sampler in unique(s.sampler for s in made):
        cost.plot([], [], sampler_style(sampler).marker, ms=6, color=MUTED, label=sampler)
    if any(s.guidance != 1 for s in made):
        cost.plot([], [], "o", ms=6, mfc=SURFACE, mec=MUTED, mew=1.4, label="guided")
    front = pareto_front(made, lambda s: s.calls, lambda s: s.frechet.mean)
    cost.step([s.calls for s in front], [s.frechet.mean for s in front], where="post", color=MUTED, lw=1, zorder=1)
    label_axes(cost, title="What quality costs", xlabel="network calls per sample", ylabel=AXIS_NAMES["frechet"])
    log_x(cost, sorted({s.calls for s in made}))
    label_axes(labels, title="Likeness and label", xlabel="label accuracy, % (further right is better)")
    for axes in (cost, labels):
        _quality_scale(axes, made, "frechet", steps=False)
        _references(axes, scores, "frechet")
    legend(figure, [cost])
    return figure


def nearest_plot(scores: Sequence[Score]) -> Figure:
    """Distance to the nearest training image: a line per reference, and per model and guidance scale; a marker per row of the table."""
    near = [s for s in scores if math.isfinite(s.nearest.mean)]
    within = [s for s in near if s.kind != "ceiling"]
    made = sorted((s for s in near if s.kind == "model"), key=lambda s: (unique(s.model for s in scores).index(s.model), s.guidance))
    lines = unique(_nearest_name(s) for s in [*(s for s in within if s.kind != "model"), *made, *near])
    figure, ((axes,),) = make_panels(1, 1, height=0.9 + 0.4 * len(lines))
    for score in within:
        style, y = sampler_style(score.sampler), lines.index(_nearest_name(score))
        shape = dict(fmt=style.marker, ms=0.8 * style.size, color=style.color) if score.sampler else dict(fmt="D", ms=5, color=MUTED)
        axes.errorbar(
            score.nearest.mean, y + style.offset * bool(score.sampler), xerr=score.nearest.std, mfc="none" if style.hollow else None,
            mew=1.6 if style.hollow else 0, elinewidth=1, label=score.sampler or "_reference", zorder=2 if style.hollow else 3,
            clip_on=False, **shape,
        )  # fmt: skip
    label_axes(axes, title="", xlabel="Euclidean distance to the nearest training image (0: an exact copy)", grid="x")
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
    legend(figure, [axes])
    return figure


def _nearest_name(score: Score) -> str:
    return f"{score.model} · {guidance_name(score.guidance)}" if score.kind == "model" else score.model


# ---------------------------------------------------------------------------------------------------- training and schedules


def loss_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss and gradient norm of each training run: the logged values faint, their moving average over 5 % of the run bold."""
    rows = [key for key in ("loss", "grad_norm") if any(key in line for lines in curves.values() for line in lines)]
    figure, panels = make_panels(len(rows), len(curves), height=2.3)
    for j, (name, color) in enumerate(colors_of(curves).items()):
        for i, key in enumerate(rows):
            axes = panels[i, j]
            points = [(line["step"], line[key]) for line in curves[name] if key in line and math.isfinite(line[key])]
            label_axes(axes, title=name if i == 0 else "", xlabel="step" if i == len(rows) - 1 else "")
            if points:
                steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
                every = max(1, len(steps) // 500)  # more points than pixels only make the file large
                axes.plot(steps[::every], values[::every], color=color, lw=0.6, alpha=0.4)
                axes.plot(steps[::every], smooth(values)[::every], color=color, lw=2)
                log_y(axes, values[values > 0])
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
    figure, ((factors, snr),) = make_panels(1, 2, height=3.0)
    share = torch.linspace(0, 1, 301, dtype=torch.float64)
    for (name, schedule), color in zip(schedules.items(), colors_of(schedules).values(), strict=True):
        t = schedule.t_data + share * (schedule.t_max - schedule.t_data)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        factors.plot(share, alpha, color=color, lw=2, label=name)
        factors.plot(share, sigma, color=color, lw=2, ls=(0, (4, 2)))
        inside = (alpha > 0) & (sigma > 0)
        snr.plot(share[inside], 2 * (alpha / sigma)[inside].log(), color=color, lw=2)
    where = "share of the schedule's time, from data (0) to noise (1)"
    label_axes(factors, title="Factor of the data, α (solid), and of the noise, σ (dashed)", xlabel=where)
    label_axes(snr, title="log signal-to-noise ratio, log(α²/σ²)", xlabel=where)
    snr.axhline(0, color=MUTED, lw=1)
    snr.annotate("as much data as noise", (0, 0), (4, -4), textcoords="offset points", va="top", color=MUTED, fontsize=8.5)
    snr.set_ylim(-14, 14)
    legend(figure, [factors])
    return figure


# -------------------------------------------------------------------------------------------------------------------- parts


def _line(axes: Any, part: Sequence[Score], metric: Metric) -> None:
    """One sampler's scores over its steps, in its style, with a bar for the spread over seeds."""
    part = sorted(part, key=lambda s: s.steps)
    style = sampler_style(part[0].sampler)
    low, middle, high = np.array([_ends(getattr(s, metric), metric, s.n) for s in part]).T
    axes.errorbar(
        [s.steps for s in part], middle, yerr=(middle - low, high - middle), color=style.color, lw=style.width, ls=style.dashes,
        marker=style.marker, ms=style.size, mfc=SURFACE if style.hollow else style.color, mec=style.color,
        mew=1.8 if style.hollow else 0, elinewidth=1.2, capsize=0, label=part[0].sampler, zorder=2 if style.hollow else 3,
    )  # fmt: skip


def _quality_scale(axes: Any, made: Sequence[Score], metric: Metric, steps: bool = True) -> None:
    """Log axes for steps and for distances; a logit axis in percent for accuracy."""
    if steps:
        log_x(axes, sorted({s.steps for s in made}))
    if metric == "accuracy":
        axes.set_yscale("logit")
        axes.yaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    else:
        log_y(axes, np.array([value for s in made if (value := getattr(s, metric).mean) > 0 and math.isfinite(value)]))
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
