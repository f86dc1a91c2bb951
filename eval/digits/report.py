"""The report of a run: one HTML file, readable offline, with every number beside what real data and noise would get.

Nothing is measured here. `write_report` turns scores, curves and pictures into words, tables and figures.
"""

# ruff: noqa: RUF001  (minus signs, dashes and multiplication signs are meant)

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from torch import Tensor

from diffusion import DiscreteVP, NoiseLevel, Schedule, initial_noise, marginal
from eval.digits.plots import loss_plot, nearest_plot, quality_plot, schedule_plot, trade_offs_plot
from eval.digits.score import Metric, Score, Spread, Target, reference
from eval.drawing import guidance_name, picture, svg
from eval.page import NOTHING, decimals, minus, number, picture_address, write_page


@dataclass(frozen=True)
class Gallery:
    """Images (rows * columns, C, H, W) in [-1, 1], row by row. Of samples, the first seeds' and not a choice: the page says so."""

    title: str
    caption: str
    images: Tensor
    columns: int = 10


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: str,
    scores: Sequence[Score],
    targets: Sequence[Target],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    forward: Mapping[str, tuple[Schedule, Tensor]],
    galleries: Sequence[Gallery],
    trajectories: Sequence[Gallery],
    facts: Mapping[str, str],
) -> None:
    """Write the report to `path`, whole or not at all; OSError where the path cannot be written.

    summary       plain text, a blank line between paragraphs
    scores        in the order of the table; reference rows (floor, ceiling) are moved to its head
    curves        per training run the lines of its metrics.jsonl: step, loss, grad_norm, lr, samples_per_second
    forward       per name a schedule and clean images (N, C, H, W) in [-1, 1], which are shown noised at several times
    trajectories  each row of images is one sample from noise to data
    facts         versions, timings, settings: what a reader needs to repeat the run

    A part whose input is empty is left out. All text is escaped.
    """
    write_page(
        path,
        Path(__file__).parent / "templates" / "report.html.j2",
        title=title,
        paragraphs=[part for part in summary.split("\n\n") if part.strip()],
        cards=_cards(scores, targets),
        targets=[_target(target) for target in targets],
        met=sum(target.met for target in targets),
        galleries=[_gallery(gallery, most=372) for gallery in galleries],
        trajectories=[_gallery(gallery, most=1000) for gallery in trajectories],
        table=_table(scores),
        notes=_notes(scores),
        plots=_plots(scores, curves, {name: schedule for name, (schedule, _) in forward.items()}),
        forward=[_forward(name, schedule, images) for name, (schedule, images) in forward.items()],
        training=[_training(name, lines) for name, lines in curves.items()],
        facts=facts,
    )


# ------------------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Card:
    """One large number at the head of the page."""

    label: str
    value: str
    detail: str
    bad: bool = False


def _cards(scores: Sequence[Score], targets: Sequence[Target]) -> list[Card]:
    """Targets met, the lowest Frechet distance, the highest label accuracy, and how near that best row lies to the training set."""
    cards: list[Card] = []
    if targets:
        met = sum(target.met for target in targets)
        missed = "every promise kept" if met == len(targets) else "missed: " + ", ".join(t.name for t in targets if not t.met)
        cards.append(Card("targets met", f"{met} of {len(targets)}", missed, bad=met < len(targets)))
    made = [s for s in scores if s.kind == "model" and math.isfinite(s.frechet.mean) and math.isfinite(s.accuracy.mean)]
    if not made:
        return cards
    best = min(made, key=lambda s: s.frechet.mean)
    right = max(made, key=lambda s: s.accuracy.mean)
    cards.append(Card("lowest Fréchet distance", number(best.frechet.mean), _judged(best, scores, "frechet")))
    cards.append(Card("highest label accuracy", f"{100 * right.accuracy.mean:.1f} %", _judged(right, scores, "accuracy")))
    unseen = reference(scores, "floor", "nearest")
    if unseen is not None:
        detail = "the lowest-Fréchet samples' distance to the nearest training image, over that of unseen real digits; copies would give 0"
        cards.append(Card("novelty", f"{best.nearest.mean / unseen.mean:.2f} ×", detail))
    return cards


def _judged(score: Score, scores: Sequence[Score], metric: Metric) -> str:
    """Which row, and what real data and noise get in its place."""
    unit = (lambda x: f"{100 * x:.1f} %") if metric == "accuracy" else number
    real, noise = reference(scores, "floor", metric), reference(scores, "ceiling", metric)
    beside = [f"{name} {unit(spread.mean)}" for name, spread in (("real digits", real), ("noise", noise)) if spread is not None]
    return " · ".join([_row_name(score), *beside])


def _row_name(score: Score) -> str:
    return f"{score.model}, {score.sampler}, {score.steps} step{'s' * (score.steps != 1)}, {guidance_name(score.guidance)}"


def _target(target: Target) -> dict[str, object]:
    bound = ("≤ " if target.at_most else "≥ ") + number(target.limit)
    value = f"{target.value:.3f}" if math.isfinite(target.value) else NOTHING
    return {"name": target.name, "value": value, "bound": bound, "met": target.met, "note": target.note}


# --------------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Cell:
    """One figure of the table. rank: "best" of its column, "tied" with the best within the spreads, or ""."""

    text: str
    spread: str
    rank: str = ""
    bar: float | None = None  # in percent, where on the way from noise (0) to real data (100) on a log scale


@dataclass(frozen=True)
class Column:
    """How a metric is written: multiplied by `scale`, with the same number of decimals in every row."""

    metric: Metric
    heading: str
    unit: str
    best: str  # "min", "max", or "" where neither is better
    scale: float
    decimals: int
    best_spread: Spread | None

    def cell(self, score: Score, scores: Sequence[Score]) -> Cell:
        spread: Spread = getattr(score, self.metric)
        if not math.isfinite(spread.mean):
            return Cell(NOTHING, "")
        deviation = f"± {spread.std * self.scale:.{self.decimals}f}" if score.seeds > 1 else ""
        bar = _bar(spread.mean, scores) if self.metric == "frechet" and score.kind == "model" else None
        return Cell(minus(f"{spread.mean * self.scale:.{self.decimals}f}"), deviation, self._rank(score, spread), bar)

    def _rank(self, score: Score, spread: Spread) -> str:
        if self.best_spread is None or score.kind != "model":
            return ""
        if spread == self.best_spread:
            return "best"
        return "tied" if abs(spread.mean - self.best_spread.mean) <= math.hypot(spread.std, self.best_spread.std) else ""


def _columns(scores: Sequence[Score]) -> list[Column]:
    made = [s for s in scores if s.kind == "model"]
    kernels = [abs(s.kernel.mean) for s in made if math.isfinite(s.kernel.mean)]
    thousand = bool(kernels) and statistics.median(kernels) < 0.1  # 0.00123 +- 0.00045 is hard to read
    kinds: list[tuple[Metric, str, str, str, float]] = [
        ("frechet", "Fréchet distance", "feature units²", "min", 1),
        ("kernel", "Kernel distance", "× 10⁻³" if thousand else "MMD²", "min", 1000 if thousand else 1),
        ("accuracy", "Label accuracy", "%", "max", 100),
        ("nearest", "Nearest training image", "pixel units", "", 1),
        ("copies", "Near-copies", "%", "", 100),
    ]
    columns = []
    for metric, heading, unit, best, scale in kinds:
        spreads = [getattr(s, metric) for s in made if math.isfinite(getattr(s, metric).mean)]
        sign = -1 if best == "max" else 1
        winner = min(spreads, key=lambda spread: sign * spread.mean) if best and spreads else None
        digits = decimals([s.mean * scale for s in spreads], [s.std * scale for s in spreads])
        columns.append(Column(metric, heading, unit, best, scale, digits, winner))
    return columns


def _bar(value: float, scores: Sequence[Score]) -> float | None:
    real, noise = reference(scores, "floor", "frechet"), reference(scores, "ceiling", "frechet")
    if real is None or noise is None or not 0 < real.mean < noise.mean or value <= 0:
        return None
    return round(100 * min(1.0, max(0.0, math.log(noise.mean / value) / math.log(noise.mean / real.mean))), 1)


def _table(scores: Sequence[Score]) -> dict[str, object]:
    """References first, then one group of rows per model."""
    columns = _columns(scores)
    groups: dict[str, list[dict[str, object]]] = {}
    references = []
    for score in scores:
        row = {
            "score": score,
            "guidance": NOTHING if score.kind != "model" else "off" if score.guidance == 1 else f"{score.guidance:g}",
            "cells": {column.metric: column.cell(score, scores) for column in columns},
            "error": f"{score.kernel_error * columns[1].scale:.{columns[1].decimals}f}" if math.isfinite(score.kernel_error) else "",
            "seconds": number(score.seconds, 2) if score.kind == "model" else NOTHING,
        }
        references.append(row) if score.kind != "model" else groups.setdefault(score.model, []).append(row)
    return {"columns": columns, "references": references, "groups": groups}


def _notes(scores: Sequence[Score]) -> list[str]:
    """What a reader must know before comparing rows."""
    notes = []
    sizes = sorted({s.n for s in scores if math.isfinite(s.frechet.mean)})
    if len(sizes) > 1:
        notes.append(
            f"Sets of {sizes[0]:,} to {sizes[-1]:,} images are compared here. The Fréchet distance falls as sets grow, even between "
            "equal distributions: compare rows of equal N only."
        )
    if any(s.seeds == 1 and s.kind == "model" for s in scores):
        notes.append("Rows with one seed have no spread: do not read small differences between them.")
    return notes


# ------------------------------------------------------------------------------------------------------------ the pictures


def _plots(
    scores: Sequence[Score], curves: Mapping[str, Sequence[Mapping[str, float]]], schedules: Mapping[str, Schedule]
) -> dict[str, Markup]:
    """Every figure there is data for, by name, as markup that needs no escaping."""
    plots: dict[str, Markup] = {}
    if any(score.kind == "model" for score in scores):
        steps = "against the number of sampling steps, per model, guidance scale and sampler; the numbers are in the table"
        plots["frechet"] = Markup(svg(quality_plot(scores), "frechet", f"Fréchet distance {steps}"))
        plots["accuracy"] = Markup(svg(quality_plot(scores, "accuracy"), "accuracy", f"Label accuracy {steps}"))
        plots["trade_offs"] = Markup(svg(trade_offs_plot(scores), "trade-offs", "Fréchet distance against calls and against accuracy"))
    if scores:
        plots["nearest"] = Markup(svg(nearest_plot(scores), "nearest", "Distance to the nearest training image, per model"))
    if curves:
        plots["loss"] = Markup(svg(loss_plot(curves), "loss", "Loss and gradient norm over training steps"))
    if schedules:
        plots["schedules"] = Markup(svg(schedule_plot(schedules), "schedules", "alpha, sigma and log signal-to-noise ratio over time"))
    return plots


def _gallery(gallery: Gallery, most: int) -> dict[str, object]:
    """A picture magnified by a whole number, to at most `most` CSS pixels across."""
    columns = min(gallery.columns, max(1, len(gallery.images)))
    across = columns * (gallery.images.shape[-1] + 1) - 1
    width = across * min(10, max(1, most // across))
    return {"title": gallery.title, "caption": gallery.caption, "source": picture_address(picture(gallery.images, columns)), "width": width}


def _forward(name: str, schedule: Schedule, images: Tensor, columns: int = 8) -> dict[str, object]:
    """Up to three images, clean and at `columns` times from the first to the last a network is trained on; one noise per image."""
    images = images[:3].detach().cpu()
    noise = initial_noise(range(len(images)), images.shape[1:], images.dtype)
    times = [schedule.t_min + (schedule.t_max - schedule.t_min) * i / (columns - 1) for i in range(columns)]
    times = [float(round(t)) for t in times] if isinstance(schedule, DiscreteVP) else times
    levels = [schedule.level(t) for t in times]
    if levels[0].sigma > 0:  # otherwise the first time is clean data already
        levels.insert(0, schedule.terminal)
    return {"name": name, "columns": [_noised(level, images, noise) for level in levels]}


def _noised(level: NoiseLevel, images: Tensor, noise: Tensor) -> dict[str, str]:
    # Only variance-exploding noise outgrows the range a picture can show; elsewhere the divisor is 1.
    x_t = marginal(images, noise, level) / max(1.0, math.hypot(level.alpha, level.sigma))
    log_snr = 2 * level.half_log_snr
    return {
        "source": picture_address(picture(x_t, columns=1)),
        "t": "data" if level.sigma == 0 else f"{level.t:.3g}" if level.t < 100 else f"{level.t:.0f}",
        "alpha": f"{level.alpha:.3f}",
        "sigma": f"{level.sigma:.3f}" if level.sigma < 100 else number(level.sigma),
        "log_snr": minus(f"{log_snr:+.1f}") if math.isfinite(log_snr) else ("+∞" if log_snr > 0 else "−∞"),
    }


def _training(name: str, lines: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """One run in a row: its length, its final loss (mean of the last tenth) and its median speed."""
    losses = [line["loss"] for line in lines if "loss" in line]
    speeds = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "name": name,
        "steps": f"{max((line['step'] for line in lines), default=0):,.0f}",
        "loss": number(statistics.fmean(last), 4) if last else NOTHING,
        "lr": number(max(line["lr"] for line in lines if "lr" in line)) if any("lr" in line for line in lines) else NOTHING,
        "speed": number(statistics.median(speeds)) if speeds else NOTHING,
    }
