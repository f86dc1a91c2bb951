"""Figures of results: against steps, against what they cost, against each other, and against real data and
noise."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.drawing import (
    INK,
    MUTED,
    SURFACE,
    colors_of,
    guidance_name,
    label_axes,
    legend,
    literal,
    log_x,
    log_x_round,
    log_y,
    make_panels,
    pareto_front,
    sampler_style,
    save_figure,
    unique,
)
from eval.metrics.registry import METRICS
from eval.results import Result, Role, Scored, comparable_parts
from plain_diffusion.extras import extra

with extra("plots"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DISTANCE = re.compile(r"(^|_)(s?fid|fd|frechet)(_|$)")
AGREEMENT = re.compile(r"(^|_)(clip_?score|accuracy)(_|$)")
MARKERS = "os^DvPX*<>"
LOGIT_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
COSTS = {"calls": "network calls per image", "seconds": "seconds per image"}


def metric_name(metric: str) -> str:
    """A metric's title; of one that is not known here, its name in words."""
    words = metric.replace("_", " ")
    return METRICS[metric].title if metric in METRICS else words[:1].upper() + words[1:]


def main_metrics(results: Sequence[Result]) -> list[str]:
    """The metrics that are plotted: Frechet distances, and agreement with prompts or classes; where there are
    none, the first there is."""
    names = unique(name for result in results for name in result.figures)
    return [name for name in names if DISTANCE.search(name) or AGREEMENT.search(name)] or names[:1]


# How it was drawn -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """How the samples of a result were drawn. calls and seconds are per image, NaN where they are not
    known."""

    model: str
    sampler: str
    steps: int
    guidance: float
    calls: float
    seconds: float


def drawn(results: Sequence[Result]) -> list[How | None]:
    """Per result; None where no model of ours drew it. Models by the last part of their path, where that
    tells them apart."""
    models = [_model(result.samples) if result.samples.get("settings") else None for result in results]
    names = _model_names(model for model in models if model)
    return [
        _drawn(result.samples, names[model]) if model else None
        for result, model in zip(results, models, strict=True)
    ]


def _model(samples: Mapping[str, Any]) -> tuple[str, str]:
    """Where its files are and, since these may be written anew, the SHA-256 of what is in them."""
    settings = samples["settings"]
    where = (
        samples.get("model")
        or settings.get("run")
        or settings.get("weights")
        or samples.get("origin")
        or "model"
    )
    return ", ".join(map(str, where)) if isinstance(where, (list, tuple)) else str(where), str(
        settings.get("fingerprint") or ""
    )


def _model_names(models: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    models = unique(models)
    names, places = short_names(place for place, _ in models), [place for place, _ in models]
    return {
        (place, sha): f"{names[place]} {sha[:8]}" if places.count(place) > 1 else names[place]
        for place, sha in models
    }


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Paths, of several files also, by their last parts, and hashes by their first digits, where no two names
    become the same."""
    names = unique(names)
    short = {
        name: f"{name[:8]}..." if is_hash(name) else ", ".join(Path(p).name or p for p in name.split(", "))
        for name in names
    }
    return {name: short[name] if list(short.values()).count(short[name]) == 1 else name for name in names}


def is_hash(value: Any) -> bool:
    """Whether a value is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _drawn(samples: Mapping[str, Any], model: str) -> How:
    settings = samples["settings"]
    guidance = settings.get("guidance")
    return How(
        model=model,
        sampler=str(settings.get("sampler") or "sampler"),
        steps=int(settings.get("steps") or 0),
        guidance=1.0 if guidance is None else float(guidance),
        calls=_above_zero(samples.get("calls")),
        seconds=_above_zero(samples.get("seconds")),
    )


def _above_zero(value: float | None) -> float:
    return float(value) if value is not None and 0 < value < math.inf else math.nan


# The figures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A result's figure, and how its samples came about."""

    result: Result
    figure: Scored
    how: How | None

    def cost(self, name: str) -> float:
        """By its name in COSTS; NaN where it is not known."""
        return math.nan if self.how is None else float(getattr(self.how, name))

    @property
    def loss(self) -> float:
        """Lower is better."""
        return self.figure.value if self.figure.better == "lower" else -self.figure.value


class Marks:
    """Which colour, marker and filling mean what: a colour per model (of a single one, per sampler), a marker
    per sampler.

    The fuller a marker, the less guidance.
    """

    def __init__(self, hows: Iterable[How | None]) -> None:
        known = [how for how in hows if how is not None]
        self.several_models = len({how.model for how in known}) > 1
        self.colors = colors_of(self._colored(how) for how in known)
        self.markers = {
            name: MARKERS[i % len(MARKERS)] for i, name in enumerate(unique(how.sampler for how in known))
        }
        self.guidances = sorted({how.guidance for how in known})

    def _colored(self, how: How) -> str:
        return how.model if self.several_models else how.sampler

    def color(self, how: How) -> str:
        return self.colors[self._colored(how)]

    def fill(self, guidance: float) -> float:
        """From 1, full, for the least guidance to 0, hollow, for the most."""
        return 1 - self.guidances.index(guidance) / max(1, len(self.guidances) - 1)

    def line(self, axes: Any, points: Sequence[tuple[float, float]], hows: Sequence[How]) -> None:
        """A line through points in this order, and their markers; on a disc of the surface, so that no line
        shines through."""
        color = self.color(hows[0])
        axes.plot(*zip(*points, strict=True), color=color, lw=1.5, alpha=0.75, zorder=2)
        for (x, y), how in zip(points, hows, strict=True):
            shape = dict(marker=self.markers[how.sampler], ms=6.5, ls="none", mew=1.5)
            axes.plot(x, y, mfc=SURFACE, mec=SURFACE, zorder=3, **shape)
            axes.plot(x, y, mfc=(color, self.fill(how.guidance)), mec=color, zorder=3.5, **shape)

    def explain(self, axes: Any) -> None:
        """Entries for the legend."""
        for name, color in self.colors.items():
            marker = "none" if self.several_models else self.markers[name]
            axes.plot([], [], color=color, lw=2.2, marker=marker, ms=6, label=literal(name))
        for name, marker in self.markers.items() if self.several_models and len(self.markers) > 1 else ():
            axes.plot([], [], marker, ms=6, color=MUTED, label=literal(name))
        for guidance in self.guidances if len(self.guidances) > 1 else ():
            axes.plot(
                [],
                [],
                "o",
                ms=6,
                mfc=(MUTED, self.fill(guidance)),
                mec=MUTED,
                mew=1.5,
                label=guidance_name(guidance),
            )


def steps_plot(results: Sequence[Result], metric: str) -> Figure:
    """A metric against the number of steps: a column of panels per model, a row per guidance scale, a line
    per sampler.

    The band is real data, the dotted line noise; bars are 95 % confidence intervals. Of results that cannot
    be compared, the part with most that were drawn. ValueError where none was.
    """
    points = _largest_part(results, metric)
    made = [point for point in points if point.how]
    if not made:
        raise ValueError(
            "no result was drawn by a model in a number of steps: there is nothing to plot quality against"
        )
    hows = [point.how for point in made if point.how]
    names, guidances = unique(how.model for how in hows), sorted({how.guidance for how in hows})
    figure, panels = make_panels(len(guidances), len(names), height=3.1, sharey=True)
    for (i, guidance), (j, model) in itertools.product(enumerate(guidances), enumerate(names)):
        axes = panels[i, j]
        part = [(p, how) for p in made if (how := p.how) and (how.model, how.guidance) == (model, guidance)]
        axes.set_visible(bool(part))
        first = not any((how.model, how.guidance) == (left, guidance) for how in hows for left in names[:j])
        label_axes(
            axes,
            f"{model} · {guidance_name(guidance)}",
            xlabel="steps",
            ylabel=_axis_name(metric, made) if first else "",
        )
        log_x(axes, sorted({how.steps for how in hows}))
        _value_axis(axes, metric, points)
        _yardsticks(axes, metric, points)
        axes.tick_params(labelleft=first)
        for sampler in unique(how.sampler for _, how in part):
            line = sorted(
                ((how.steps, point) for point, how in part if how.sampler == sampler),
                key=lambda pair: pair[0],
            )
            _steps_line(axes, metric, sampler, line)
    legend(figure, panels.flat)
    return figure


def _steps_line(axes: Any, metric: str, sampler: str, line: Sequence[tuple[int, Point]]) -> None:
    """One sampler's figures over its steps, in its style, with their intervals."""
    style = sampler_style(sampler)
    low, middle, high = np.array([_shown_ends(metric, point.figure) for _, point in line]).T
    axes.errorbar(
        [steps for steps, _ in line], middle, yerr=(middle - low, high - middle), color=style.color,
        lw=style.width, ls=style.dashes,
        marker=style.marker, ms=style.size, mfc=SURFACE if style.hollow else style.color, mec=style.color,
        mew=1.8 if style.hollow else 0, elinewidth=1.2, capsize=0, label=literal(sampler),
        zorder=2 if style.hollow else 3,
    )  # fmt: skip


def nearest_plot(results: Sequence[Result], metric: str = "nearest") -> Figure:
    """Distance to the nearest training image: a line per model and guidance scale, a marker per result; the
    band is unseen real data."""
    points = _largest_part(results, metric)
    yardsticks = [point for point in points if point.result.role not in (None, "ceiling")]
    made = [(point, how) for point in points if (how := point.how)]
    order = unique(how.model for _, how in made)
    lines = [literal(point.result.name) for point in yardsticks]
    lines += unique(
        _line_name(how)
        for _, how in sorted(made, key=lambda pair: (order.index(pair[1].model), pair[1].guidance))
    )
    figure, ((axes,),) = make_panels(1, 1, height=0.9 + 0.4 * len(lines))
    for i, point in enumerate(yardsticks):
        axes.errorbar(
            point.figure.value,
            i,
            xerr=_bars(point.figure),
            fmt="D",
            ms=5,
            color=MUTED,
            elinewidth=1,
            clip_on=False,
        )
    for point, how in made:
        style = sampler_style(how.sampler)
        shape = dict(
            fmt=style.marker, ms=0.8 * style.size, color=style.color, mfc="none" if style.hollow else None
        )
        axes.errorbar(
            point.figure.value, lines.index(_line_name(how)) + style.offset, xerr=_bars(point.figure),
            elinewidth=1, clip_on=False,
            mew=1.6 if style.hollow else 0, label=literal(how.sampler), zorder=2 if style.hollow else 3,
            **shape,
        )  # fmt: skip
    label_axes(
        axes, title="", xlabel="Euclidean distance to the nearest training image (0: an exact copy)", grid="x"
    )
    if (real := _yardstick(points, "held_out", "floor")) is not None:
        axes.axvspan(*ends_or_value(real.figure), color=MUTED, alpha=0.3, lw=0)
        axes.axvline(real.figure.value, color=MUTED, lw=1)
    shown = [point.figure.value for point in (*yardsticks, *(point for point, _ in made))]
    end = 1.2 * max((value for value in shown if math.isfinite(value)), default=1.0)
    if (
        noise := _yardstick(points, "ceiling")
    ) is not None:  # so far off that a scale with room for it would hide the rest
        axes.annotate(
            f"{literal(noise.result.name)} {noise.figure.value:.2f} →",
            (end, -0.4),
            ha="right",
            va="center",
            color=MUTED,
        )
    axes.set_yticks(range(len(lines)), lines)
    axes.set(ylim=(len(lines) - 0.4, -0.6), xlim=(0, end))
    axes.tick_params(axis="y", length=0, pad=10, labelcolor=INK, labelsize=9.5)
    legend(figure, [axes])
    return figure


def _line_name(how: How) -> str:
    return literal(f"{how.model} · {guidance_name(how.guidance)}")


def pareto_plot(results: Sequence[Result], metrics: Sequence[str]) -> Figure:
    """A row of panels per metric: against network calls and against seconds per image, as far as these are
    known.

    Lines join the steps of one model, sampler and guidance; bars are 95 % confidence intervals. The step line
    joins what nothing cheaper beats. Results that were not drawn here are labelled lines. Of results that
    cannot be compared in a metric, its row shows the part with most that were drawn. ValueError where none
    was.
    """
    rows = [_largest_part(results, metric) for metric in metrics]
    costs = [cost for cost in COSTS if any(math.isfinite(point.cost(cost)) for row in rows for point in row)]
    if not costs:
        raise ValueError(
            "no result says how many network calls it took: there is nothing to plot quality against"
        )
    figure, panels = make_panels(len(rows), len(costs), height=3.9)
    marks = Marks(point.how for row in rows for point in row)
    for (i, row), metric in zip(enumerate(rows), metrics, strict=True):
        for j, cost in enumerate(costs):
            _cost_panel(panels[i, j], metric, row, cost, marks)
            label_axes(panels[i, j], title=f"{metric_name(metric)} against {COSTS[cost]}", xlabel=COSTS[cost])
            if j:
                panels[i, j].sharey(panels[i, 0])
        panels[i, 0].set_ylabel(_axis_name(metric, row))
        _value_axis(panels[i, 0], metric, row)
    marks.explain(panels[0, 0])
    legend(figure, [panels[0, 0]], columns=6)
    return figure


def trade_off_plot(results: Sequence[Result], distance: str, score: str) -> Figure:
    """A Frechet distance against a CLIP score or an accuracy: a line per model and sampler over guidance,
    each of its most steps.

    All of `results` must be comparable in both.
    """
    judged = [result for result in results if result.role is None]
    pairs = _of_most_steps(list(zip(_points(judged, distance), _points(judged, score), strict=True)))
    figure, ((axes,),) = make_panels(1, 1, height=4.4)
    marks = Marks(point.how for point, _ in pairs)
    for a, b in pairs:
        place, color = (b.figure.value, a.figure.value), INK if a.how is None else marks.color(a.how)
        axes.errorbar(
            *place,
            _bars(a.figure),
            _bars(b.figure),
            fmt="none",
            ecolor=color,
            elinewidth=1.1,
            alpha=0.6,
            zorder=1,
        )
        if a.how is None:
            axes.plot(*place, "*", ms=11, color=INK, zorder=4)
            axes.annotate(
                literal(a.result.name),
                place,
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=INK,
                zorder=5,
            )
    for key in unique((how.model, how.sampler) for a, _ in pairs if (how := a.how)):
        line = [
            (how, (b.figure.value, a.figure.value))
            for a, b in pairs
            if (how := a.how) and (how.model, how.sampler) == key
        ]
        line.sort(key=lambda pair: pair[0].guidance)
        marks.line(axes, [place for _, place in line], [how for how, _ in line])
    labels = [_axis_name(metric, [pair[i] for pair in pairs]) for i, metric in enumerate((distance, score))]
    label_axes(axes, title="", xlabel=labels[1], ylabel=labels[0], grid="both")
    _value_axis(axes, distance, [a for a, _ in pairs])
    axes.margins(x=0.08)
    marks.explain(axes)
    legend(figure, [axes], columns=6)
    return figure


def _of_most_steps(pairs: Sequence[tuple[Point, Point]]) -> list[tuple[Point, Point]]:
    """Of each model and sampler those drawn in the most steps; and all that were not drawn here."""
    most: dict[tuple[str, str], int] = {}
    for point, _ in pairs:
        if point.how:
            key = (point.how.model, point.how.sampler)
            most[key] = max(most.get(key, 0), point.how.steps)
    return [(a, b) for a, b in pairs if a.how is None or a.how.steps == most[a.how.model, a.how.sampler]]


def save_pareto(folder: str | Path, results: Sequence[Result]) -> Path:
    """Write `pareto_plot` of the main metrics as folder/pareto.png, for a README or a talk."""
    path = Path(folder) / "pareto.png"
    save_figure(pareto_plot(results, main_metrics(results)), path)
    return path


# Parts ------------------------------------------------------------------------------------------------------


def _points(results: Sequence[Result], metric: str) -> list[Point]:
    return [
        Point(result, result.figures[metric], how)
        for result, how in zip(results, drawn(results), strict=True)
    ]


def _largest_part(results: Sequence[Result], metric: str) -> list[Point]:
    """Of the results that can be compared in a metric, the part with most that were drawn."""
    return max((_points(part, metric) for part in comparable_parts(results, metric)), key=_count, default=[])


def _count(points: Sequence[Point]) -> int:
    return sum(math.isfinite(point.cost(cost)) for point in points for cost in COSTS)


def _cost_panel(axes: Any, metric: str, points: Sequence[Point], cost: str, marks: Marks) -> None:
    placed = [
        point for point in points if math.isfinite(point.cost(cost)) and math.isfinite(point.figure.value)
    ]
    for point in placed:
        assert point.how is not None
        axes.errorbar(
            point.cost(cost), point.figure.value, yerr=_bars(point.figure), fmt="none",
            ecolor=marks.color(point.how), elinewidth=1.1,
            alpha=0.6, zorder=1.5,
        )  # fmt: skip
    for key in unique((how.model, how.sampler, how.guidance) for point in placed if (how := point.how)):
        line = [(p, how) for p in placed if (how := p.how) and (how.model, how.sampler, how.guidance) == key]
        line.sort(key=lambda pair: pair[1].steps)
        marks.line(axes, [(p.cost(cost), p.figure.value) for p, _ in line], [how for _, how in line])
    costs = sorted({point.cost(cost) for point in placed})
    front = pareto_front(placed, lambda p: p.cost(cost), lambda p: p.loss)
    if front:
        ends = [*((p.cost(cost), p.figure.value) for p in front), (costs[-1], front[-1].figure.value)]
        axes.step(
            *zip(*ends, strict=True),
            where="post",
            color=MUTED,
            lw=3.5,
            alpha=0.35,
            zorder=1,
            label="Pareto front",
        )
    log_x(axes, costs) if cost == "calls" else log_x_round(axes, np.array(costs))
    _yardsticks(axes, metric, points)
    others = [point for point in points if point.how is None and point.result.role is None]
    _lines_across(axes, [point for point in others if math.isfinite(point.figure.value)])


def _lines_across(axes: Any, points: Sequence[Point]) -> None:
    """A labelled line for each result without a cost, with its interval as a band; names take turns at the
    two ends.

    The best is named at the left, where what is cheap is not good yet and leaves room.
    """
    for i, point in enumerate(sorted(points, key=lambda p: p.loss)):
        figure = point.figure
        if math.isfinite(figure.low) and math.isfinite(figure.high):
            axes.axhspan(figure.low, figure.high, color=MUTED, alpha=0.15, lw=0, zorder=0)
        axes.axhline(figure.value, color=INK, lw=1, ls=(0, (5, 3)), zorder=0.5)
        x, align = ((0, "left"), (1, "right"))[i % 2]
        axes.annotate(
            literal(point.result.name), (x, figure.value), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha=align, va="bottom", fontsize=8.5, color=INK,
        )  # fmt: skip


def _bars(figure: Scored) -> np.ndarray | None:
    """How far the interval reaches below and above the value, (2, 1); None where it is not known."""
    if not (math.isfinite(figure.low) and math.isfinite(figure.high)):
        return None
    return np.array([[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]])


def _yardstick(points: Sequence[Point], *roles: Role) -> Point | None:
    """The first row of the first of these roles that there is."""
    return next(
        (
            point
            for role in roles
            for point in points
            if point.result.role == role and math.isfinite(point.figure.value)
        ),
        None,
    )


def _yardsticks(axes: Any, metric: str, points: Sequence[Point]) -> None:
    """Real data as a band with its interval, noise as a dotted line where it is near enough not to flatten
    the rest, else in words.

    Real data is what no model and no judge has seen, where that has the metric, else what is scored as
    samples are.
    """
    if (real := _yardstick(points, "held_out", "floor")) is not None:
        low, middle, high = _shown_ends(metric, real.figure)
        axes.axhspan(low, high, color=MUTED, alpha=0.3, lw=0, zorder=0)
        axes.axhline(middle, color=MUTED, lw=1, zorder=0, label="real data")
    if (noise := _yardstick(points, "ceiling")) is None:
        return
    value, made = noise.figure.value, [point.figure.value for point in points if point.how]
    below = noise.figure.better == "higher"
    if made and (min(made) > value + 0.5 if below else 4 * max(made) < value):
        place = (
            dict(xy=(1, 0), xytext=(-2, 4), va="bottom")
            if below
            else dict(xy=(1, 1), xytext=(-2, -3), va="top")
        )
        axes.annotate(
            f"noise {value:.3g} {'↓' if below else '↑'}", xycoords="axes fraction",
            textcoords="offset points", ha="right", color=MUTED,
            fontsize=8.5, **place,
        )  # fmt: skip
    else:
        axes.axhline(
            _shown_ends(metric, noise.figure)[1], color=MUTED, lw=1.2, ls=(0, (1, 2)), zorder=0, label="noise"
        )


def ends_or_value(figure: Scored) -> tuple[float, float]:
    """The interval, or the value at both ends where none is known."""
    known = math.isfinite(figure.low) and math.isfinite(figure.high)
    return (figure.low, figure.high) if known else (figure.value, figure.value)


def _shown_ends(metric: str, figure: Scored) -> tuple[float, float, float]:
    """low, value, high, inside what the axis can show.

    A log axis has no 0, so a bar ends at a tenth of its value; a logit axis has neither 0 nor 1, so half a
    picture in n is kept.
    """
    low, high = ends_or_value(figure)
    if metric == "accuracy":
        low, value, high = (
            min(max(end, 0.5 / figure.n), 1 - 0.5 / figure.n) for end in (low, figure.value, high)
        )
        return low, value, high
    return (
        (max(low, 0.1 * figure.value), figure.value, high)
        if figure.better == "lower"
        else (low, figure.value, high)
    )


def _axis_name(metric: str, points: Sequence[Point]) -> str:
    return f"{metric_name(metric)} ({points[0].figure.better} is better)"


def _value_axis(axes: Any, metric: str, points: Sequence[Point]) -> None:
    """Logarithmic where distances lie far apart; a logit in percent for accuracy, which stretches towards 100
    %."""
    shown = [point.figure.value for point in points if point.result.role != "ceiling"]
    values = np.array([value for value in shown if math.isfinite(value)])
    if metric == "accuracy":
        axes.set_yscale("logit")
        axes.yaxis.set_major_locator(FixedLocator(LOGIT_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif (
        len(values)
        and points[0].figure.better == "lower"
        and values.min() > 0
        and values.max() > 4 * values.min()
    ):
        log_y(axes, values)
    axes.margins(y=0.08)
