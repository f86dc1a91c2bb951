"""Plots of results: figures against steps, costs, each other, real data and noise."""

from __future__ import annotations

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


# How samples were drawn -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """How the samples of a result were drawn. calls and seconds are per image, NaN if unknown."""

    model: str
    sampler: str
    steps: int
    guidance: float
    calls: float
    seconds: float


def how_drawn(results: Sequence[Result]) -> list[How | None]:
    """Per result; None if no model of ours drew it. Models are named by the last part of their path if
    unique."""
    models = [_model(result.samples) if result.samples.get("settings") else None for result in results]
    names = _model_names(model for model in models if model)
    return [
        _how(result.samples, names[model]) if model else None
        for result, model in zip(results, models, strict=True)
    ]


def _model(samples: Mapping[str, Any]) -> tuple[str, str]:
    """Where its files are and, since they may be overwritten, the SHA-256 of their contents."""
    settings = samples["settings"]
    known = (
        samples.get("model"),
        settings.get("run"),
        settings.get("weights"),
        samples.get("origin"),
        "model",
    )
    path = next(filter(None, known))
    name = ", ".join(map(str, path)) if isinstance(path, (list, tuple)) else str(path)
    return name, str(settings.get("fingerprint") or "")


def _model_names(models: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    models = unique(models)
    names, paths = short_names(path for path, _ in models), [path for path, _ in models]
    return {
        (path, sha256): f"{names[path]} {sha256[:8]}" if paths.count(path) > 1 else names[path]
        for path, sha256 in models
    }


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Paths, also of several files, by their last parts, and hashes by their first digits, where unique."""
    names = unique(names)
    short = {
        name: f"{name[:8]}..." if is_hash(name) else ", ".join(Path(p).name or p for p in name.split(", "))
        for name in names
    }
    return {name: short[name] if list(short.values()).count(short[name]) == 1 else name for name in names}


def is_hash(value: Any) -> bool:
    """Whether a value is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _how(samples: Mapping[str, Any], model: str) -> How:
    settings = samples["settings"]
    guidance = settings.get("guidance")
    calls, seconds = (
        float(cost) if (cost := samples.get(name)) is not None and 0 < cost < math.inf else math.nan
        for name in COSTS
    )
    sampler, steps = str(settings.get("sampler") or "sampler"), int(settings.get("steps") or 0)
    return How(model, sampler, steps, 1.0 if guidance is None else float(guidance), calls, seconds)


# The plots --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A result's figure, and how its samples were drawn."""

    result: Result
    figure: Scored
    how: How | None

    def cost(self, name: str) -> float:
        """By its name in COSTS; NaN if unknown."""
        return math.nan if self.how is None else float(getattr(self.how, name))

    @property
    def loss(self) -> float:
        """Lower is better."""
        return self.figure.value if self.figure.better == "lower" else -self.figure.value


class Marks:
    """Colours by model (by sampler if there is one model), markers by sampler; more guidance is emptier."""

    def __init__(self, hows: Iterable[How | None]) -> None:
        known = [how for how in hows if how is not None]
        self.several_models = len({how.model for how in known}) > 1
        self.colors = colors_of(self._colored(how) for how in known)
        samplers = unique(how.sampler for how in known)
        self.markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(samplers)}
        self.guidances = sorted({how.guidance for how in known})

    def _colored(self, how: How) -> str:
        return how.model if self.several_models else how.sampler

    def color(self, how: How) -> str:
        return self.colors[self._colored(how)]

    def fill(self, guidance: float) -> float:
        """From 1, full, for the least guidance to 0, hollow, for the most."""
        return 1 - self.guidances.index(guidance) / max(1, len(self.guidances) - 1)

    def line(self, axes: Any, points: Sequence[tuple[float, float]], hows: Sequence[How]) -> None:
        """A line through points in this order, and markers on discs, so that no line shines through."""
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
            fill = (MUTED, self.fill(guidance))
            axes.plot([], [], "o", ms=6, mfc=fill, mec=MUTED, mew=1.5, label=guidance_name(guidance))


def steps_plot(results: Sequence[Result], metric: str) -> Figure:
    """A metric against steps: a column of panels per model, a row per guidance scale, a line per sampler.

    The band is real data, the dotted line noise; bars are 95 % confidence intervals. Of results that cannot
    be compared, only the set with most drawn ones is shown. ValueError if a model drew none.
    """
    points = _largest_set(results, metric)
    made = [(point, how) for point in points if (how := point.how)]
    if not made:
        raise ValueError("no result was drawn by a model: there are no steps to plot its figures against")
    names, guidances = unique(how.model for _, how in made), sorted({how.guidance for _, how in made})
    figure, panels = make_panels(len(guidances), len(names), height=3.1, sharey=True)
    for i, guidance in enumerate(guidances):
        first = True  # panel of its row, which has the labels
        for j, model in enumerate(names):
            axes = panels[i, j]
            part = [(point, how) for point, how in made if (how.model, how.guidance) == (model, guidance)]
            axes.set_visible(bool(part))
            ylabel = _axis_name(metric, points) if first else ""
            label_axes(axes, f"{model} · {guidance_name(guidance)}", xlabel="steps", ylabel=ylabel)
            log_x(axes, sorted({how.steps for _, how in made}))
            _value_axis(axes, metric, points)
            _yardsticks(axes, metric, points)
            axes.tick_params(labelleft=first)
            for sampler in unique(how.sampler for _, how in part):
                line = [(how.steps, point) for point, how in part if how.sampler == sampler]
                _steps_line(axes, metric, sampler, sorted(line, key=lambda pair: pair[0]))
            first = first and not part
    legend(figure, panels.flat)
    return figure


def _steps_line(axes: Any, metric: str, sampler: str, line: Sequence[tuple[int, Point]]) -> None:
    """One sampler's figures over its steps, with their intervals."""
    style = sampler_style(sampler)
    low, middle, high = np.array([_shown_ends(metric, point.figure) for _, point in line]).T
    axes.errorbar(
        [steps for steps, _ in line], middle, yerr=(middle - low, high - middle), color=style.color,
        lw=style.width, ls=style.dashes, marker=style.marker, ms=style.size, mfc=SURFACE if style.hollow else
        style.color, mec=style.color, mew=1.8 if style.hollow else 0, elinewidth=1.2, capsize=0,
        label=literal(sampler), zorder=2 if style.hollow else 3,
    )  # fmt: skip


def nearest_plot(results: Sequence[Result], metric: str = "nearest") -> Figure:
    """Distance to the nearest training image: a line per model and guidance, a band for unseen real data."""
    points = _largest_set(results, metric)
    yardsticks = [point for point in points if point.result.role not in (None, "ceiling")]
    made = [(point, how) for point in points if (how := point.how)]
    order = unique(how.model for _, how in made)
    by_line = sorted(made, key=lambda pair: (order.index(pair[1].model), pair[1].guidance))
    lines = [literal(point.result.name) for point in yardsticks] + unique(
        _line_name(how) for _, how in by_line
    )
    figure, ((axes,),) = make_panels(1, 1, height=0.9 + 0.4 * len(lines))
    bars: dict[str, Any] = dict(elinewidth=1, clip_on=False)
    for i, point in enumerate(yardsticks):
        axes.errorbar(point.figure.value, i, xerr=_bars(point.figure), fmt="D", ms=5, color=MUTED, **bars)
    for point, how in made:
        style = sampler_style(how.sampler)
        hollow: dict[str, Any] = (
            dict(mfc="none", mew=1.6, zorder=2) if style.hollow else dict(mew=0, zorder=3)
        )
        axes.errorbar(
            point.figure.value, lines.index(_line_name(how)) + style.offset, xerr=_bars(point.figure),
            fmt=style.marker, ms=0.8 * style.size, color=style.color, label=literal(how.sampler), **hollow,
            **bars,
        )  # fmt: skip
    xlabel = "Euclidean distance to the nearest training image (0: an exact copy)"
    label_axes(axes, title="", xlabel=xlabel, grid="x")
    if (real := _yardstick(points, "held_out", "floor")) is not None:
        axes.axvspan(*ends_or_value(real.figure), color=MUTED, alpha=0.3, lw=0)
        axes.axvline(real.figure.value, color=MUTED, lw=1)
    shown = [point.figure.value for point in (*yardsticks, *(point for point, _ in made))]
    end = 1.2 * max((value for value in shown if math.isfinite(value)), default=1.0)
    if (noise := _yardstick(points, "ceiling")) is not None:  # too far off for a scale that shows the rest
        text = f"{literal(noise.result.name)} {noise.figure.value:.2f} →"
        axes.annotate(text, (end, -0.4), ha="right", va="center", color=MUTED)
    axes.set_yticks(range(len(lines)), lines)
    axes.set(ylim=(len(lines) - 0.4, -0.6), xlim=(0, end))
    axes.tick_params(axis="y", length=0, pad=10, labelcolor=INK, labelsize=9.5)
    legend(figure, [axes])
    return figure


def _line_name(how: How) -> str:
    return literal(f"{how.model} · {guidance_name(how.guidance)}")


def pareto_plot(results: Sequence[Result], metrics: Sequence[str]) -> Figure:
    """A row of panels per metric: against network calls and against seconds per image, where these are known.

    Lines join the steps of one model, sampler and guidance; bars are 95 % confidence intervals. The step line
    joins what nothing cheaper beats. Results without a cost are labelled lines. Of results that cannot be
    compared in a metric, its row shows the set with most drawn ones. ValueError if no cost is known.
    """
    rows = [_largest_set(results, metric) for metric in metrics]
    costs = [cost for cost in COSTS if any(math.isfinite(point.cost(cost)) for row in rows for point in row)]
    if not costs:
        raise ValueError("no result says how many network calls it took: there are no costs to plot against")
    figure, panels = make_panels(len(rows), len(costs), height=3.9)
    marks = Marks(point.how for row in rows for point in row)
    for row, metric, axes in zip(rows, metrics, panels, strict=True):
        for panel, cost in zip(axes, costs, strict=True):
            _cost_panel(panel, metric, row, cost, marks)
            label_axes(panel, title=f"{metric_name(metric)} against {COSTS[cost]}", xlabel=COSTS[cost])
            if panel is not axes[0]:
                panel.sharey(axes[0])
        axes[0].set_ylabel(_axis_name(metric, row))
        _value_axis(axes[0], metric, row)
    marks.explain(panels[0, 0])
    legend(figure, [panels[0, 0]], columns=6)
    return figure


def trade_off_plot(results: Sequence[Result], distance: str, score: str) -> Figure:
    """A Frechet distance against a CLIP score or an accuracy: a line per model and sampler over guidance.

    Each line is of its most steps. All of `results` must be comparable in both.
    """
    judged = [result for result in results if result.role is None]
    pairs = _of_most_steps(list(zip(_points(judged, distance), _points(judged, score), strict=True)))
    figure, ((axes,),) = make_panels(1, 1, height=4.4)
    marks = Marks(point.how for point, _ in pairs)
    lines: dict[tuple[str, str], list[tuple[How, tuple[float, float]]]] = {}
    for a, b in pairs:
        place, color = (b.figure.value, a.figure.value), INK if a.how is None else marks.color(a.how)
        bars: dict[str, Any] = dict(fmt="none", ecolor=color, elinewidth=1.1, alpha=0.6, zorder=1)
        axes.errorbar(*place, _bars(a.figure), _bars(b.figure), **bars)
        if a.how is None:
            axes.plot(*place, "*", ms=11, color=INK, zorder=4)
            axes.annotate(
                literal(a.result.name), place, (0, 8), textcoords="offset points", ha="center", fontsize=8.5,
                color=INK, zorder=5,
            )  # fmt: skip
        else:
            lines.setdefault((a.how.model, a.how.sampler), []).append((a.how, place))
    for line in lines.values():
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
    """Those of most steps of each model and sampler, and all that were not drawn here."""
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


# Their parts ------------------------------------------------------------------------------------------------


def _points(results: Sequence[Result], metric: str) -> list[Point]:
    hows = how_drawn(results)
    return [Point(result, result.figures[metric], how) for result, how in zip(results, hows, strict=True)]


def _largest_set(results: Sequence[Result], metric: str) -> list[Point]:
    """Of the sets of results that can be compared in a metric, the one with most costs."""

    def known_costs(points: Sequence[Point]) -> int:
        return sum(math.isfinite(point.cost(cost)) for point in points for cost in COSTS)

    sets = [_points(part, metric) for part in comparable_parts(results, metric)]
    return max(sets, key=known_costs, default=[])


def _cost_panel(axes: Any, metric: str, points: Sequence[Point], cost: str, marks: Marks) -> None:
    placed = [p for p in points if math.isfinite(p.cost(cost)) and math.isfinite(p.figure.value)]
    lines: dict[tuple[str, str, float], list[tuple[How, Point]]] = {}
    bars: dict[str, Any] = dict(fmt="none", elinewidth=1.1, alpha=0.6, zorder=1.5)
    for point in placed:
        how = point.how
        assert how is not None
        bar = _bars(point.figure)
        axes.errorbar(point.cost(cost), point.figure.value, yerr=bar, ecolor=marks.color(how), **bars)
        lines.setdefault((how.model, how.sampler, how.guidance), []).append((how, point))
    for line in lines.values():
        line.sort(key=lambda pair: pair[0].steps)
        marks.line(axes, [(p.cost(cost), p.figure.value) for _, p in line], [how for how, _ in line])
    costs = sorted({point.cost(cost) for point in placed})
    if front := pareto_front(placed, lambda p: p.cost(cost), lambda p: p.loss):
        x, y = [p.cost(cost) for p in front], [p.figure.value for p in front]
        line_style: dict[str, Any] = dict(color=MUTED, lw=3.5, alpha=0.35, zorder=1, label="Pareto front")
        axes.step([*x, costs[-1]], [*y, y[-1]], where="post", **line_style)
    log_x(axes, costs) if cost == "calls" else log_x_round(axes, np.array(costs))
    _yardsticks(axes, metric, points)
    others = [point for point in points if point.how is None and point.result.role is None]
    _lines_across(axes, [point for point in others if math.isfinite(point.figure.value)])


def _lines_across(axes: Any, points: Sequence[Point]) -> None:
    """A labelled line for each result without a cost, with its interval as a band.

    Names alternate between the two ends; the best is on the left, where what is cheap is not good yet.
    """
    for i, point in enumerate(sorted(points, key=lambda p: p.loss)):
        figure = point.figure
        if math.isfinite(figure.low) and math.isfinite(figure.high):
            axes.axhspan(figure.low, figure.high, color=MUTED, alpha=0.15, lw=0, zorder=0)
        axes.axhline(figure.value, color=INK, lw=1, ls=(0, (5, 3)), zorder=0.5)
        x, align = ((0, "left"), (1, "right"))[i % 2]
        axes.annotate(
            literal(point.result.name), (x, figure.value), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha=align, va="bottom", fontsize=8.5, color=INK,
        )  # fmt: skip


def _bars(figure: Scored) -> np.ndarray | None:
    """How far the interval reaches below and above the value, (2, 1); None if unknown."""
    if not (math.isfinite(figure.low) and math.isfinite(figure.high)):
        return None
    return np.array([[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]])


def _yardstick(points: Sequence[Point], *roles: Role) -> Point | None:
    """The first row of the first of these roles that exists."""
    finite = [point for point in points if math.isfinite(point.figure.value)]
    return next((point for role in roles for point in finite if point.result.role == role), None)


def _yardsticks(axes: Any, metric: str, points: Sequence[Point]) -> None:
    """Real data as a band, noise as a dotted line, or in words where a line would flatten the rest.

    Real data is what no model has seen or, where that lacks the metric, what is scored as samples are.
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
        place: dict[str, Any] = dict(xy=(1, 1), xytext=(-2, -3), va="top")
        if below:
            place = dict(xy=(1, 0), xytext=(-2, 4), va="bottom")
        axes.annotate(
            f"noise {value:.3g} {'↓' if below else '↑'}", xycoords="axes fraction",
            textcoords="offset points", ha="right", color=MUTED, fontsize=8.5,
            **place,
        )  # fmt: skip
    else:
        y = _shown_ends(metric, noise.figure)[1]
        axes.axhline(y, color=MUTED, lw=1.2, ls=(0, (1, 2)), zorder=0, label="noise")


def ends_or_value(figure: Scored) -> tuple[float, float]:
    """The interval, or the value at both ends if it is unknown."""
    known = math.isfinite(figure.low) and math.isfinite(figure.high)
    return (figure.low, figure.high) if known else (figure.value, figure.value)


def _shown_ends(metric: str, figure: Scored) -> tuple[float, float, float]:
    """low, value, high, clipped to what the axis can show.

    A log axis has no 0: a bar ends at a tenth of its value. A logit axis has neither 0 nor 1: half a picture
    in n.
    """
    low, high = ends_or_value(figure)
    if metric == "accuracy":
        edge = 0.5 / figure.n
        low, value, high = (min(max(end, edge), 1 - edge) for end in (low, figure.value, high))
        return low, value, high
    return max(low, 0.1 * figure.value) if figure.better == "lower" else low, figure.value, high


def _axis_name(metric: str, points: Sequence[Point]) -> str:
    return f"{metric_name(metric)} ({points[0].figure.better} is better)"


def _value_axis(axes: Any, metric: str, points: Sequence[Point]) -> None:
    """Logarithmic if distances differ much; a logit in percent for accuracy, to stretch the top."""
    shown = [point.figure.value for point in points if point.result.role != "ceiling"]
    values = np.array([value for value in shown if math.isfinite(value)])
    if metric == "accuracy":
        axes.set_yscale("logit")
        axes.yaxis.set_major_locator(FixedLocator(LOGIT_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif points[0].figure.better == "lower" and len(values) and 0 < 4 * values.min() < values.max():
        log_y(axes, values)
    axes.margins(y=0.08)
