"""Tables of results, for the page and as Markdown. What cannot be compared never shares a column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.drawing import guidance_name, unique
from eval.page import NOTHING, decimals, minus, number
from eval.plots import How, ends_or_value, how_drawn, is_hash, metric_name
from eval.results import Result, Role, Scored, comparable_parts

TAGS: dict[Role, str] = {"floor": "floor", "held_out": "real, unseen", "ceiling": "ceiling"}


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    rank  "best" of its column, "tied" if its interval overlaps that of the best, or ""
    bar   percent of the way from noise (0) to real data (100), on a logarithmic scale
    """

    text: str
    interval: str = ""
    rank: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """A metric, with as many decimals in every row. best: of the samples; real, noise: the yardsticks."""

    metric: str
    heading: str
    better: str
    digits: int
    best: Scored | None
    real: Scored | None
    noise: Scored | None

    def cell(self, result: Result) -> Cell:
        """The figure of one row."""
        figure = result.figures.get(self.metric)
        if figure is None or not math.isfinite(figure.value):
            return Cell(NOTHING)
        ends = (figure.low, figure.value, figure.high)
        low, value, high = (minus(f"{end:.{self.digits}f}") for end in ends)
        interval = f"{low} to {high}" if math.isfinite(figure.low) and math.isfinite(figure.high) else ""
        if result.role:
            return Cell(value, interval)
        return Cell(value, interval, self._rank(figure), self._bar(figure))

    def _rank(self, figure: Scored) -> str:
        if self.best is None:
            return ""
        if figure.value == self.best.value:
            return "best"
        (low, high), (best_low, best_high) = ends_or_value(figure), ends_or_value(self.best)
        return "tied" if low <= best_high and best_low <= high else ""

    def _bar(self, figure: Scored) -> float | None:
        if self.real is None or self.noise is None or self.better != "lower":
            return None
        real, noise = self.real.value, self.noise.value
        if not 0 < real < noise or figure.value <= 0:
            return None
        return round(100 * min(1.0, max(0.0, math.log(noise / figure.value) / math.log(noise / real))), 1)


@dataclass(frozen=True)
class Row:
    """A result in a table.

    short   its name below that of its model
    detail  how it was drawn, as far as its name does not say so
    tag     of a yardstick
    notes   in words; the page numbers them
    """

    name: str
    short: str
    detail: str
    tag: str
    cells: tuple[Cell, ...]
    calls: str
    seconds: str
    n: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Results that can be compared in every column.

    apart   how it differs from the other tables
    groups  rows by model, yardsticks first
    """

    results: tuple[Result, ...]
    apart: tuple[str, ...]
    columns: tuple[Column, ...]
    groups: Mapping[str, tuple[Row, ...]]

    @property
    def rows(self) -> list[Row]:
        """Those of all groups."""
        return [row for rows in self.groups.values() for row in rows]


def make_tables(results: Sequence[Result]) -> list[Table]:
    """As few tables as hold only what can be compared, in the order of their first results."""
    metrics = unique(name for result in results for name in result.figures)
    hows = dict(zip((result.name for result in results), how_drawn(results), strict=True))
    sets = _comparable_sets([result for result in results if result.figures], metrics)
    return [_table(members, _differences(members, sets, metrics), metrics, hows) for members in sets]


def _comparable_sets(results: Sequence[Result], metrics: Sequence[str]) -> list[list[Result]]:
    """Each result joins the first set that it can be compared with in all the metrics that both have."""
    part_of: dict[str, dict[str, int]] = {result.name: {} for result in results}
    for metric in metrics:
        for i, part in enumerate(comparable_parts(results, metric)):
            for result in part:
                part_of[result.name][metric] = i
    sets: list[tuple[dict[str, int], list[Result]]] = []
    for result in results:
        own = part_of[result.name]
        for parts, members in sets:
            if all(parts.get(metric, i) == i for metric, i in own.items()):
                parts.update(own)
                members.append(result)
                break
        else:
            sets.append((dict(own), [result]))
    return [members for _, members in sets]


def _differences(
    members: Sequence[Result], sets: Sequence[Sequence[Result]], metrics: Sequence[str]
) -> tuple[str, ...]:
    """A line for each metric whose basis differs between the sets: what differs, as in this set."""
    lines = []
    for metric in metrics:
        bases = [flat(basis) for other in sets if (basis := _basis(other, metric))]
        own = flat(_basis(members, metric))
        keys = unique(key for basis in bases for key in basis)
        differing = [key for key in keys if any(basis.get(key) != own.get(key) for basis in bases)]
        if own and differing:
            entries = "; ".join(f"{key} {as_text(own.get(key))}" for key in differing)
            lines.append(f"{metric_name(metric)}: {entries}")
    return tuple(lines)


def _basis(results: Iterable[Result], metric: str) -> Mapping[str, Any]:
    return next((result.basis(metric) for result in results if metric in result.figures), {})


def _table(
    members: Sequence[Result], apart: tuple[str, ...], metrics: Sequence[str], hows: Mapping[str, How | None]
) -> Table:
    there = unique(name for result in members for name in result.figures)
    columns = tuple(_column(metric, members) for metric in metrics if metric in there)
    models = unique(how.model for result in members if (how := hows[result.name]))
    members = sorted(members, key=lambda result: _order(result, hows[result.name], models))
    groups: dict[str, list[Row]] = {}
    for result in members:
        how = hows[result.name]
        group = "What samples are judged by" if result.role else how.model if how else ""
        groups.setdefault(group, []).append(_row(result, how, columns))
    return Table(tuple(members), apart, columns, {model: tuple(rows) for model, rows in groups.items()})


def _order(result: Result, how: How | None, models: Sequence[str]) -> tuple[int, str, float, int]:
    """Yardsticks, then rows by model, sampler, guidance and steps, then what was not drawn here."""
    if result.role:
        return -1, "", 0.0, 0
    if how is None:
        return len(models), "", 0.0, 0
    return models.index(how.model), how.sampler, how.guidance, how.steps


def _column(metric: str, members: Sequence[Result]) -> Column:
    figures = [(result.role, result.figures[metric]) for result in members if metric in result.figures]
    ranked = [figure for role, figure in figures if role is None and math.isfinite(figure.value)]
    better, first = figures[0][1].better, dict(reversed(figures))
    spreads = [(high - low) / 2 for low, high in map(ends_or_value, ranked)]
    digits = decimals([figure.value for figure in ranked], spreads)
    best = None
    if len({figure.value for figure in ranked}) > 1 and better != "neither":  # equal figures have no best
        best = (min if better == "lower" else max)(ranked, key=lambda figure: figure.value)
    real, noise = first.get("held_out") or first.get("floor"), first.get("ceiling")
    return Column(metric, metric_name(metric), better, digits, best, real, noise)


def _row(result: Result, how: How | None, columns: Sequence[Column]) -> Row:
    steps = f"{how.steps} step{'s' * (how.steps != 1)}" if how and how.steps else ""
    guided = guidance_name(how.guidance) if how and how.guidance != 1 else ""
    detail = ", ".join(filter(None, (how.sampler, steps, guided))) if how else ""
    own_name = how is None or not result.name.startswith(f"{how.model}, {how.sampler}, ")
    sizes = unique(
        f"{f.n:,}" + (f" × {f.extra['parts']:g}" if "parts" in f.extra else "")  # noqa: RUF001
        for f in result.figures.values()
    )
    return Row(
        name=result.name,
        short=result.name if own_name else detail,
        detail=detail if own_name else "",
        tag=TAGS[result.role] if result.role else "",
        cells=tuple(column.cell(result) for column in columns),
        calls=number(how.calls, 4) if how else NOTHING,
        seconds=number(how.seconds) if how else NOTHING,
        n=" or ".join(sizes),
        notes=row_notes(result),
    )


def row_notes(result: Result) -> tuple[str, ...]:
    """What a reader of a row should know."""
    random = [metric_name(name) for name, figure in result.figures.items() if figure.random]
    return (*result.notes, *(f"random stand-in weights: {name} means nothing" for name in random))


def random_metrics(results: Sequence[Result]) -> list[str]:
    """The metrics that networks with random weights computed in some result."""
    return unique(metric for result in results for metric, figure in result.figures.items() if figure.random)


# As Markdown ------------------------------------------------------------------------------------------------


def markdown_table(results: Sequence[Result]) -> str:
    """The tables as Markdown that also reads well as plain text. ValueError as for the page."""
    check_results(results)
    tables = make_tables(results)
    parts = []
    if random := random_metrics(results):
        names = ", ".join(_escaped(metric_name(metric)) for metric in random)
        parts.append(
            f"**RANDOM STAND-IN NETWORKS computed {names}: these numbers mean nothing outside a test.**"
        )
    for i, table in enumerate(tables, 1):
        if len(tables) > 1:
            parts.append(f"Table {i} of {len(tables)}, not to be compared with the others.")
        parts += [_escaped(line) for line in table.apart]
        head = ["", *(_markdown_heading(column) for column in table.columns), "calls", "s/image", "n"]
        parts.append(_aligned([head, *(_markdown_row(row) for row in table.rows)]))
    parts.append(
        "**Bold**: best of its column; `~`: its 95 % interval overlaps that of the best. In brackets: 95 % "
        "confidence interval."
    )
    return "\n\n".join(parts) + "\n"


def check_results(results: Sequence[Result]) -> None:
    """ValueError for results that no report can be made of."""
    if not any(result.figures for result in results):
        raise ValueError("there is nothing to report: give at least one result with a figure")
    names = [result.name for result in results]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two results are named {twice[0]!r}: give each a name of its own")


def _markdown_heading(column: Column) -> str:
    return _escaped(column.heading) + (f" ({column.better} is better)" if column.better != "neither" else "")


def _markdown_row(row: Row) -> list[str]:
    cells = []
    for cell in row.cells:
        text = {"best": f"**{cell.text}**", "tied": f"{cell.text} ~", "": cell.text}[cell.rank]
        cells.append(f"{text} ({cell.interval})" if cell.interval else text)
    return [_escaped(row.name), *cells, row.calls, row.seconds, row.n]


def _escaped(text: str) -> str:
    """Text on one line, without Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\|<>*`[]" else c for c in " ".join(text.split()))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head. Numbers are aligned to the right."""
    first, *widths = (max(3, *map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for name, *cells in rows:
        padded = [name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|" + "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in widths)]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


# Plain values -----------------------------------------------------------------------------------------------


def flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Nested names joined by spaces: {"extractor": {"network": "clip"}} -> {"extractor network": "clip"}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{within}{name} ") if isinstance(value, Mapping) else {f"{within}{name}": value}
    return found


def as_text(value: Any, whole: bool = False) -> str:
    """A plain value in words; hashes and long lists are cut unless `whole`."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(item, whole)}" for key, item in flat(value).items())
    if isinstance(value, (list, tuple)):
        shown = value if whole or len(value) <= 4 else value[:3]
        more = "" if len(shown) == len(value) else f" and {len(value) - len(shown):,} more"
        parts = ["×".join(map(str, v)) if isinstance(v, (list, tuple)) else as_text(v, whole) for v in shown]  # noqa: RUF001
        return ", ".join(parts) + more or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value[:8]}..." if is_hash(value) and not whole else str(value)
