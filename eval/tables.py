"""Tables of results, for the page and as Markdown. What cannot be compared never shares a column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.drawing import guidance_name, unique
from eval.page import NOTHING, decimals, minus, number
from eval.plots import How, drawn, ends_or_value, is_hash, metric_name
from eval.results import Result, Role, Scored, comparable_parts

TAGS: dict[Role, str] = {"floor": "floor", "held_out": "real, unseen", "ceiling": "ceiling"}


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    rank  "best" of its column, "tied" where its interval overlaps that of the best, or ""
    bar   in percent, where on the way from noise (0) to real data (100) a distance lies, on a logarithmic
          scale
    """

    text: str
    interval: str = ""
    rank: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """A metric: with the same number of decimals in every row. best: of the samples; real, noise: what the
    yardsticks have."""

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
        low, value, high = (
            minus(f"{end:.{self.digits}f}") for end in (figure.low, figure.value, figure.high)
        )
        interval = f"{low} to {high}" if math.isfinite(figure.low) and math.isfinite(figure.high) else ""
        return (
            Cell(value, interval)
            if result.role
            else Cell(value, interval, self._rank(figure), self._bar(figure))
        )

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
    """A result in a table. short: its name below that of its model; detail: what the name does not say of how
    it was drawn;
    tag: of a yardstick; notes: in words, which the page numbers.
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
    """Results that can be compared in every column. apart: what sets it off from other tables; groups: rows
    by model, yardsticks first."""

    results: tuple[Result, ...]
    apart: tuple[str, ...]
    columns: tuple[Column, ...]
    groups: Mapping[str, tuple[Row, ...]]

    @property
    def rows(self) -> list[Row]:
        """Of all groups."""
        return [row for rows in self.groups.values() for row in rows]


def make_tables(results: Sequence[Result], metrics: Sequence[str] | None = None) -> list[Table]:
    """As few tables as hold only what can be compared, in the order of their first results; of these metrics,
    or of all."""
    metrics = unique(name for result in results for name in result.figures) if metrics is None else metrics
    hows = dict(zip((result.name for result in results), drawn(results), strict=True))
    sets = _comparable_sets(
        [result for result in results if any(metric in result.figures for metric in metrics)], metrics
    )
    return [_table(members, _apart(members, sets, metrics), metrics, hows) for members in sets]


def _comparable_sets(results: Sequence[Result], metrics: Sequence[str]) -> list[list[Result]]:
    """Each result joins the first set that it can be compared with in all the metrics which both have."""
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


def _apart(
    members: Sequence[Result], sets: Sequence[Sequence[Result]], metrics: Sequence[str]
) -> tuple[str, ...]:
    """A line for each metric whose basis differs between the sets: the entries that differ, as they are in
    this one."""
    lines = []
    for metric in metrics:
        bases = [flat(basis) for other in sets if (basis := _basis(other, metric))]
        own = flat(_basis(members, metric) or {})
        keys = unique(key for basis in bases for key in basis)
        differing = [key for key in keys if any(basis.get(key) != own.get(key) for basis in bases)]
        if own and differing:
            lines.append(
                f"{metric_name(metric)}: {'; '.join(f'{key} {as_text(own.get(key))}' for key in differing)}"
            )
    return tuple(lines)


def _basis(results: Iterable[Result], metric: str) -> Mapping[str, Any] | None:
    return next((result.basis(metric) for result in results if metric in result.figures), None)


def _table(
    members: Sequence[Result], apart: tuple[str, ...], metrics: Sequence[str], hows: Mapping[str, How | None]
) -> Table:
    columns = tuple(
        _column(metric, members) for metric in metrics if any(metric in result.figures for result in members)
    )
    models = unique(how.model for result in members if (how := hows[result.name]))
    members = sorted(members, key=lambda result: _order(result, hows[result.name], models))
    groups: dict[str, list[Row]] = {}
    for result in members:
        how = hows[result.name]
        group = "What samples are judged by" if result.role else how.model if how else ""
        groups.setdefault(group, []).append(_row(result, how, columns))
    return Table(tuple(members), apart, columns, {model: tuple(rows) for model, rows in groups.items()})


def _order(result: Result, how: How | None, models: Sequence[str]) -> tuple[int, str, float, int]:
    """Of rows: yardsticks, then by model and how it drew; what was not drawn here comes last, in its own
    order."""
    if result.role:
        return -1, "", 0.0, 0
    return (
        (models.index(how.model), how.sampler, how.guidance, how.steps) if how else (len(models), "", 0.0, 0)
    )


def _column(metric: str, members: Sequence[Result]) -> Column:
    figures = [(result.role, result.figures[metric]) for result in members if metric in result.figures]
    ranked = [figure for role, figure in figures if role is None and math.isfinite(figure.value)]
    better = figures[0][1].better
    digits = decimals(
        [figure.value for figure in ranked],
        [(high - low) / 2 for low, high in map(ends_or_value, ranked)],
        most=6,
    )
    best = None
    if (
        len({figure.value for figure in ranked}) > 1 and better != "neither"
    ):  # what is equal in all is best in none
        best = (min if better == "lower" else max)(ranked, key=lambda figure: figure.value)
    first = dict(reversed(figures))
    return Column(
        metric,
        metric_name(metric),
        better,
        digits,
        best,
        first.get("held_out") or first.get("floor"),
        first.get("ceiling"),
    )


def _row(result: Result, how: How | None, columns: Sequence[Column]) -> Row:
    steps = f"{how.steps} step{'s' * (how.steps != 1)}" if how and how.steps else ""
    guided = guidance_name(how.guidance) if how and how.guidance != 1 else ""
    detail = ", ".join(filter(None, (how.sampler, steps, guided))) if how else ""
    own = how is None or not result.name.startswith(
        f"{how.model}, {how.sampler}, "
    )  # not the name that says just that
    sizes = unique(
        f"{f.n:,}" + (f" × {f.extra['parts']:g}" if "parts" in f.extra else "")  # noqa: RUF001
        for f in result.figures.values()
    )
    return Row(
        name=result.name,
        short=result.name if own else detail,
        detail=detail if own else "",
        tag=TAGS[result.role] if result.role else "",
        cells=tuple(column.cell(result) for column in columns),
        calls=number(how.calls, 4) if how else NOTHING,
        seconds=number(how.seconds) if how else NOTHING,
        n=" or ".join(sizes),
        notes=notes_of(result),
    )


def notes_of(result: Result) -> tuple[str, ...]:
    """What a reader of a row should know."""
    random = tuple(
        f"random stand-in weights: {metric_name(name)} means nothing"
        for name, f in result.figures.items()
        if f.random
    )
    return (*result.notes, *random)


def random_metrics(results: Sequence[Result]) -> list[str]:
    """The metrics that networks with random weights computed in some result."""
    return unique(metric for result in results for metric, figure in result.figures.items() if figure.random)


# As Markdown ------------------------------------------------------------------------------------------------


def markdown_table(results: Sequence[Result], metrics: Sequence[str] | None = None) -> str:
    """The tables as Markdown that also reads well as plain text; of these metrics, or of all. ValueError as
    for the page."""
    check_results(results)
    tables = make_tables(results, metrics)
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
    marks = {"best": ("**", "**"), "tied": ("", " ~"), "": ("", "")}
    cells = []
    for cell in row.cells:
        before, after = marks[cell.rank]
        cells.append(f"{before}{cell.text}{after}" + (f" ({cell.interval})" if cell.interval else ""))
    return [_escaped(row.name), *cells, row.calls, row.seconds, row.n]


def _escaped(text: str) -> str:
    """Text on one line in which Markdown and HTML find nothing to act on."""
    return "".join(f"\\{c}" if c in "\\|<>*`[]" else c for c in " ".join(text.split()))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head. Numbers to the right."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


# Plain values -----------------------------------------------------------------------------------------------


def flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Nested names joined by spaces: {"extractor": {"network": "clip"}} -> {"extractor network": "clip"}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{within}{name} ") if isinstance(value, Mapping) else {f"{within}{name}": value}
    return found


def as_text(value: Any, whole: bool = False) -> str:
    """A plain value in words. A hash by its first digits, a long list by its first entries, unless
    `whole`."""
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
