"""The report of an evaluation: one HTML file, readable offline, and a table as text. What cannot be compared never shares a column.

Nothing is measured here. `report_of` turns the results in a folder into tables, figures, pictures and lines to cite.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eval.drawing import guidance_name, svg, unique
from eval.figures import METRICS
from eval.page import NOTHING, decimals, minus, number, picture_address, write_page
from eval.report_plots import (
    CLIP_SCORE,
    DISTANCE,
    How,
    drawn,
    is_hash,
    main_metrics,
    metric_name,
    pareto_plot,
    save_pareto,
    trade_off_plot,
)
from eval.results import Result, Scored, comparable_parts, read_result
from models.files.writing import replacing
from samplers.pictures import open_picture
from train.data.names import is_hidden

ACROSS = 372  # CSS pixels that a small sheet may be magnified to
STORED = 1600  # pixels of a sheet's longer side that a page keeps


def result_files(folder: str | Path) -> list[Path]:
    """Those that a report is made of, in the order of their names."""
    return sorted(file for file in Path(folder, "results").glob("*.json") if not is_hidden(file.name))


def report_of(folder: str | Path) -> Path:
    """Read folder/results/*.json in the order of their names; write folder/report.html, results.md and, where costs are known, pareto.png.

    The sheet of NAME.json is NAME.png beside it. Results of one name are told apart by the names of their files. Returns the page's
    path. ValueError where there are no results or a file holds none.
    """
    folder = Path(folder)
    files = result_files(folder)
    if not files:
        raise ValueError(f"{folder} has no results/*.json: plain-diffusion eval writes them")
    results = [read_result(file) for file in files]
    names = [result.name for result in results]
    results = [
        replace(result, name=f"{result.name} ({file.stem})") if names.count(result.name) > 1 else result
        for result, file in zip(results, files, strict=True)
    ]
    sheets = {result.name: file.with_suffix(".png") for result, file in zip(results, files, strict=True)}
    write_scores_report(
        folder / "report.html",
        results,
        {name: sheet for name, sheet in sheets.items() if sheet.exists()},
        title=f"Scores: {folder.resolve().name}",
    )
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(markdown_table(results), encoding="utf-8")
    if _has_costs(results):
        save_pareto(folder, results)
    return folder / "report.html"


def write_scores_report(path: str | Path, results: Sequence[Result], sheets: Mapping[str, Path], title: str = "Scores") -> Path:
    """Write the page to `path`, whole or not at all, and return it. All text is escaped; the page fetches nothing and runs nothing.

    results  in the order of the tables, each of a name of its own
    sheets   PNG files by the name of the result they are pictures of

    ValueError for no results, two of one name, a sheet that is no picture; OSError where a file cannot be read or written.
    """
    _check(results)
    path = Path(path)
    tables = make_tables(results)
    notes = unique(note for result in results for note in _notes(result))
    listed = [result for table in tables for result in table.results]
    appendix = _appendix(listed)
    write_page(
        path,
        Path(__file__).parent / "templates" / "scores.html.j2",
        title=title,
        paragraphs=_what_was_measured(results, tables),
        random=[_random_words(metric, results) for metric in _random_metrics(results)],
        tables=tables,
        notes={note: i for i, note in enumerate(notes, 1)},
        warnings=_warnings(results),
        plots=_plots(results, tables),
        sheets=[_sheet(result.name, sheets[result.name]) for result in listed if result.name in sheets],
        common=_in_common(appendix),
        appendix=_apart(appendix),
        citations={result.name: [cite(metric, result) for metric in result.figures] for result in listed},
    )
    return path


def _check(results: Sequence[Result]) -> None:
    if not any(result.figures for result in results):
        raise ValueError("there is nothing to report: give at least one result with a figure")
    names = [result.name for result in results]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two results are named {twice[0]!r}: give each a name of its own")


# -------------------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Cell:
    """One figure of a table. rank: "best" of its column, "tied" where its interval overlaps that of the best, or ""."""

    text: str
    interval: str
    rank: str = ""


@dataclass(frozen=True)
class Column:
    """A metric: with the same number of decimals in every row."""

    metric: str
    heading: str
    better: str
    digits: int
    best: Scored | None

    def cell(self, result: Result) -> Cell:
        figure = result.figures.get(self.metric)
        if figure is None or not math.isfinite(figure.value):
            return Cell(NOTHING, "")
        low, high = minus(f"{figure.low:.{self.digits}f}"), minus(f"{figure.high:.{self.digits}f}")
        known = math.isfinite(figure.low) and math.isfinite(figure.high)
        return Cell(minus(f"{figure.value:.{self.digits}f}"), f"{low} to {high}" if known else "", self._rank(figure))

    def _rank(self, figure: Scored) -> str:
        if self.best is None:
            return ""
        if figure.value == self.best.value:
            return "best"
        low, high = _ends(figure)
        best_low, best_high = _ends(self.best)
        return "tied" if low <= best_high and best_low <= high else ""


@dataclass(frozen=True)
class Row:
    """A result in a table. short: its name below that of its model; detail: what the name does not say of how it was drawn;
    notes: in words, which the page numbers.
    """

    name: str
    short: str
    detail: str
    cells: tuple[Cell, ...]
    calls: str
    seconds: str
    n: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Results that can be compared in every column. apart: what sets it off from the other tables; groups: rows by model."""

    results: tuple[Result, ...]
    apart: tuple[str, ...]
    columns: tuple[Column, ...]
    groups: Mapping[str, tuple[Row, ...]]

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.groups.values() for row in rows]


def make_tables(results: Sequence[Result], metrics: Sequence[str] | None = None) -> list[Table]:
    """As few tables as hold only what can be compared, in the order of their first results; of these metrics, or of all."""
    metrics = unique(name for result in results for name in result.figures) if metrics is None else metrics
    hows = dict(zip((result.name for result in results), drawn(results), strict=True))
    sets = _comparable_sets([result for result in results if any(metric in result.figures for metric in metrics)], metrics)
    return [_table(members, _apart_from(members, sets, metrics), metrics, hows) for members in sets]


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


def _apart_from(members: Sequence[Result], sets: Sequence[Sequence[Result]], metrics: Sequence[str]) -> tuple[str, ...]:
    """The entries of the metrics' bases that differ between the sets, as they are in this one; what metrics share is listed once."""
    differing: dict[str, list[str]] = {}
    there = [metric for metric in metrics if _basis(members, metric)]
    for metric in there:
        bases = [flat(basis) for other in sets if (basis := _basis(other, metric)) is not None]
        own = flat(_basis(members, metric) or {})
        for key in unique(key for basis in bases for key in basis):
            if any(basis.get(key) != own.get(key) for basis in bases):
                differing.setdefault(f"{key} {as_text(own.get(key))}", []).append(metric)
    return tuple(f"{_together(group, there)} here: {'; '.join(entries)}" for group, entries in _by_metrics(differing).items())


def _by_metrics(holders: Mapping[str, Sequence[str]]) -> dict[tuple[str, ...], list[str]]:
    """Groups texts by the metrics that they apply to, those of most metrics first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for words, metrics in holders.items():
        groups.setdefault(tuple(metrics), []).append(words)
    return dict(sorted(groups.items(), key=lambda group: -len(group[0])))


def _together(group: Sequence[str], metrics: Sequence[str]) -> str:
    """Some of the metrics, by their names."""
    names = [metric_name(metric) for metric in group]
    everything = len(group) == len(metrics) > 1
    return "All figures" if everything else " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _basis(results: Iterable[Result], metric: str) -> Mapping[str, Any] | None:
    return next((result.basis(metric) for result in results if metric in result.figures), None)


def _table(members: Sequence[Result], apart: tuple[str, ...], metrics: Sequence[str], hows: Mapping[str, How | None]) -> Table:
    columns = tuple(_column(metric, members) for metric in metrics if any(metric in result.figures for result in members))
    models = unique(how.model for result in members if (how := hows[result.name]))
    members = sorted(members, key=lambda result: _order(hows[result.name], models))
    groups: dict[str, list[Row]] = {}
    for result in members:
        how = hows[result.name]
        groups.setdefault(how.model if how else "", []).append(_row(result, how, columns))
    return Table(tuple(members), apart, columns, {model: tuple(rows) for model, rows in groups.items()})


def _order(how: How | None, models: Sequence[str]) -> tuple[int, str, float, int]:
    """Of rows: by model, then how it drew; what was not drawn here comes last, in its own order."""
    return (models.index(how.model), how.sampler, how.guidance, how.steps) if how else (len(models), "", 0.0, 0)


def _column(metric: str, members: Sequence[Result]) -> Column:
    figures = [result.figures[metric] for result in members if metric in result.figures]
    finite = [figure for figure in figures if math.isfinite(figure.value)]
    digits = decimals([figure.value for figure in finite], [(high - low) / 2 for low, high in map(_ends, finite)], most=6)
    best = None
    if len(finite) > 1:  # a single one is compared with nothing
        best = min(finite, key=lambda figure: figure.value) if figures[0].better == "lower" else max(finite, key=lambda f: f.value)
    return Column(metric, metric_name(metric), figures[0].better, digits, best)


def _row(result: Result, how: How | None, columns: Sequence[Column]) -> Row:
    sizes = [figure.n for figure in result.figures.values()]
    steps = f"{how.steps} step{'s' * (how.steps != 1)}" if how and how.steps else ""
    detail = ", ".join(filter(None, (how.sampler, steps, guidance_name(how.guidance)))) if how else ""
    own = how is None or not result.name.startswith(f"{how.model}, {how.sampler}, ")  # not the name that says just that
    return Row(
        name=result.name,
        short=result.name if own else detail,
        detail=detail if own else "",
        cells=tuple(column.cell(result) for column in columns),
        calls=number(how.calls, 4) if how else NOTHING,
        seconds=number(how.seconds) if how else NOTHING,
        n=" to ".join(f"{n:,}" for n in unique([min(sizes), max(sizes)])),
        notes=_notes(result),
    )


def _ends(figure: Scored) -> tuple[float, float]:
    """The interval, or the value at both ends where none is known."""
    known = math.isfinite(figure.low) and math.isfinite(figure.high)
    return (figure.low, figure.high) if known else (figure.value, figure.value)


def _notes(result: Result) -> tuple[str, ...]:
    random = tuple(f"random stand-in weights: {metric_name(name)} means nothing" for name, f in result.figures.items() if f.random)
    return (*result.notes, *random)


def markdown_table(results: Sequence[Result], metrics: Sequence[str] | None = None) -> str:
    """The tables as Markdown that also reads well as plain text; of these metrics, or of all. ValueError as for the page."""
    _check(results)
    tables = make_tables(results, metrics)
    parts = []
    for i, table in enumerate(tables, 1):
        head = [f"Table {i} of {len(tables)}, not to be compared with the others. {_escaped(line)}" for line in table.apart[:1]]
        head += [_escaped(line) for line in table.apart[1:]]
        lines = [_markdown_row(row) for row in table.rows]
        parts.append("\n\n".join([*head, _aligned([_markdown_head(table), *lines])]))
    if random := _random_metrics(results):
        names = ", ".join(_escaped(metric_name(metric)) for metric in random)
        parts.insert(0, f"**RANDOM STAND-IN NETWORKS computed {names}: these numbers mean nothing outside a test.**")
    parts.append("**Bold**: best of its column; `~`: its 95 % interval overlaps that of the best. In brackets: 95 % confidence interval.")
    return "\n\n".join(parts) + "\n"


def _markdown_head(table: Table) -> list[str]:
    return ["", *(f"{_escaped(column.heading)} ({column.better} is better)" for column in table.columns), "calls", "s/image", "n"]


def _markdown_row(row: Row) -> list[str]:
    marks = {"best": ("**", "**"), "tied": ("", " ~"), "": ("", "")}
    cells = [f"{marks[cell.rank][0]}{cell.text}{marks[cell.rank][1]}{f' ({cell.interval})' if cell.interval else ''}" for cell in row.cells]
    return [_escaped(row.name), *cells, row.calls, row.seconds, row.n]


def _escaped(text: str) -> str:
    """Text on one line in which Markdown and HTML find nothing to act on."""
    return "".join(f"\\{c}" if c in "\\|<>*`[]" else c for c in " ".join(text.split()))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head. Numbers to the right."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]) + " |"
        for row in rows
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


# ------------------------------------------------------------------------------------------------------------ in words


def flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Nested names joined by spaces: {"extractor": {"network": "clip"}} -> {"extractor network": "clip"}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{within}{name} ") if isinstance(value, Mapping) else {f"{within}{name}": value}
    return found


def as_text(value: Any, whole: bool = False) -> str:
    """A plain value in words. A hash by its first digits, a long list by its first entries, unless `whole`."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(item, whole)}" for key, item in flat(value).items())
    if isinstance(value, (list, tuple)):
        shown = value if whole or len(value) <= 4 else value[:3]
        more = "" if len(shown) == len(value) else f" and {len(value) - len(shown):,} more"
        return ", ".join("×".join(map(str, v)) if isinstance(v, (list, tuple)) else as_text(v, whole) for v in shown) + more or "none"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value[:8]}..." if is_hash(value) and not whole else str(value)


def cite(metric: str, result: Result) -> str:
    """A figure on one line: "FID (clean, 50,000 samples vs. reference sha256 1234abcd..., inception f58cb9b6...) = 12.34 [12.1, 12.6]"."""
    figure = result.figures[metric]
    low, high = _ends(figure)
    digits = decimals([figure.value], [(high - low) / 2], most=6) if math.isfinite(figure.value) else 0
    interval = f" [{figure.low:.{digits}f}, {figure.high:.{digits}f}]" if low < high else ""
    version = result.facts.get("plain-diffusion")
    return (
        f"{metric_name(metric)} ({_listed(_circumstances(figure))}) = {figure.value:.{digits}f}{interval}"
        f"{f', plain-diffusion {version}' if version else ''}"
    )


def _circumstances(figure: Scored) -> dict[str, str]:
    """Protocol, samples, reference and network of a figure in words, as far as its basis has them."""
    basis, extractor, reference = figure.basis, figure.basis.get("extractor"), figure.basis.get("reference")
    words = {"protocol": as_text(basis["protocol"])} if basis.get("protocol") else {}
    words["samples"] = f"{figure.n:,} samples"
    if isinstance(reference, Mapping):
        reference = reference.get("sha256") or as_text(reference)
    if reference:
        words["reference"] = f"vs. reference {'sha256 ' if is_hash(reference) else ''}{as_text(reference)}"
    if isinstance(extractor, Mapping) and extractor:
        random = " with RANDOM WEIGHTS" if figure.random else ""
        words["network"] = f"{extractor.get('network', 'network')} {as_text(extractor.get('weights', ''))}".strip() + random
    return words


def _listed(words: Mapping[str, str]) -> str:
    """Circumstances on one line; the reference belongs to the samples."""
    return ", ".join(words.values()).replace("samples, vs.", "samples vs.")


def _what_was_measured(results: Sequence[Result], tables: Sequence[Table]) -> list[str]:
    """In paragraphs: how many results, on what all figures rest, and on what those of some metrics do."""
    first = f"{len(results)} result{'s' * (len(results) != 1)}"
    if len(tables) > 1:
        first += f", which cannot all be compared with each other: there are {len(tables)} tables, and no rank across them"
    metrics = unique(name for result in results for name in result.figures)
    ways = {metric: [_circumstances(part[0].figures[metric]) for part in comparable_parts(results, metric)] for metric in metrics}
    shared = _shared([way for found in ways.values() for way in found]) if len(metrics) > 1 else {}
    holders: dict[str, list[str]] = {}
    for metric, found in ways.items():
        if words := _any_of([{name: value for name, value in way.items() if name not in shared} for way in found]):
            holders.setdefault(words, []).append(metric)
    everywhere = [f"{_together(metrics, metrics)}: {_listed(shared)}"] if shared else []
    return [f"{first}.", *everywhere, *(f"{_together(group, metrics)}: {words}" for words, group in holders.items())]


def _shared(ways: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The circumstances that are the same in all ways."""
    return {name: value for name, value in ways[0].items() if all(way.get(name) == value for way in ways)}


def _any_of(ways: Sequence[Mapping[str, str]]) -> str:
    """What is the same in all ways, and then what is not, way by way."""
    shared = _shared(ways)
    others = unique(_listed({name: value for name, value in way.items() if name not in shared}) for way in ways)
    return "; ".join(filter(None, (_listed(shared), " or ".join(filter(None, others)))))


def _random_metrics(results: Sequence[Result]) -> list[str]:
    return unique(metric for result in results for metric, figure in result.figures.items() if figure.random)


def _random_words(metric: str, results: Sequence[Result]) -> str:
    rows = sum(metric in result.figures and result.figures[metric].random for result in results)
    return f"{metric_name(metric)} of {rows} result{'s' * (rows != 1)}"


def _warnings(results: Sequence[Result]) -> list[str]:
    """What a reader must know before comparing rows."""
    timed = [r for r, how in zip(results, drawn(results), strict=True) if how and math.isfinite(how.seconds)]
    devices = unique(result.facts.get("device", "a device that is not known") for result in timed)
    if len(devices) > 1:
        return [f"Seconds were measured on {' and on '.join(devices)}: compare network calls instead."]
    return []


# ------------------------------------------------------------------------------------------------------------ the pictures


@dataclass(frozen=True)
class Plot:
    title: str
    caption: str
    markup: Markup


def _has_costs(results: Sequence[Result]) -> bool:
    """Whether a result with a figure that is plotted says what its samples cost."""
    metrics = main_metrics(results)
    return any(
        how and not (math.isnan(how.calls) and math.isnan(how.seconds)) and any(metric in result.figures for metric in metrics)
        for result, how in zip(results, drawn(results), strict=True)
    )


def _plots(results: Sequence[Result], tables: Sequence[Table]) -> list[Plot]:
    """Per table: its main metrics against what they cost, and Frechet distances against CLIP scores."""
    plots: list[Plot] = []
    for i, table in enumerate(tables, 1):
        where = f" (table {i})" if len(tables) > 1 else ""
        for metric in main_metrics(table.results):
            of_metric = [result for result in table.results if metric in result.figures]
            if _has_costs(of_metric):
                title, name = f"{metric_name(metric)} and its cost{where}", f"cost-{i}-{len(plots)}"
                plots.append(Plot(title, COST_CAPTION, Markup(svg(pareto_plot(of_metric, [metric]), name, title))))
        for distance, score in _pairs(table):
            both = [result for result in table.results if {distance, score} <= result.figures.keys()]
            if len(both) > 1:
                title, name = f"{metric_name(distance)} against {metric_name(score)}{where}", f"trade-off-{i}-{len(plots)}"
                plots.append(Plot(title, TRADE_OFF_CAPTION, Markup(svg(trade_off_plot(both, distance, score), name, title))))
    return plots


COST_CAPTION = (
    "A line per model, sampler and guidance over its steps; bars are 95 % confidence intervals. The broad step line joins what nothing "
    "cheaper beats. Dashed lines are results that were not drawn here, at no known cost. Costs are on a logarithmic axis."
)
TRADE_OFF_CAPTION = (
    "A line per model and sampler over guidance, each of its most steps; bars are 95 % confidence intervals. More guidance usually buys "
    "agreement with the prompt at the price of likeness to real pictures: best is where the distance is low and the score high. Stars "
    "were not drawn here."
)


def _pairs(table: Table) -> list[tuple[str, str]]:
    names = [column.metric for column in table.columns]
    return [(distance, score) for distance in names if DISTANCE.search(distance) for score in names if CLIP_SCORE.search(score)]


def _sheet(name: str, path: Path) -> dict[str, object]:
    """A sheet within the page: a small one magnified by a whole number, a large one made smaller, and then stored as JPEG."""
    try:
        image = open_picture(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the picture sheet of {name!r}: {error}") from None
    buffer = io.BytesIO()
    kind = "JPEG" if max(image.size) > STORED else "PNG"
    image.thumbnail((STORED, STORED))
    image.save(buffer, kind, quality=90)
    times = min(10, max(1, ACROSS // image.width))
    address = picture_address(buffer.getvalue(), kind.lower())
    return {"name": name, "source": address, "width": image.width * times, "pixels": image.width <= ACROSS}


# ------------------------------------------------------------------------------------------------------------ the appendix


def _appendix(results: Sequence[Result]) -> dict[str, dict[str, str]]:
    """Per result all that its figures depend on, hashes whole."""
    return {result.name: {name: as_text(value, whole=True) for name, value in _fingerprint(result).items()} for result in results}


def _fingerprint(result: Result) -> dict[str, Any]:
    found = {f"samples: {name}": value for name, value in flat(result.samples).items() if value is not None}
    for metric, figure in result.figures.items():
        found |= {f"{metric_name(metric)}: {name}": value for name, value in flat(figure.basis).items()}
        found |= {f"{metric_name(metric)}: {name}": value for name, value in figure.extra.items()}
    found |= {f"asked for: {name}": value for name, value in flat(_asked_for(result)).items() if value is not None}
    return found | dict(result.facts)


def _asked_for(result: Result) -> dict[str, Any]:
    """The settings, without protocol and extractors that no figure is of."""
    asked = dict(result.settings)
    if not any("protocol" in figure.basis for figure in result.figures.values()):
        asked.pop("protocol", None)
    if isinstance(extractors := asked.get("extractors"), Mapping) and result.figures.keys() <= METRICS.keys():
        of = {METRICS[metric].output[0] for metric in result.figures}
        used = {asked.get(name, name) for name in of}  # "features" and "classifier" stand for what the settings say
        asked["extractors"] = {name: value for name, value in extractors.items() if name in used}
    return asked


def _in_common(appendix: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Entries that all results share; none of a single result."""
    first, *others = appendix.values()
    return {name: value for name, value in first.items() if others and all(other.get(name) == value for other in others)}


def _apart(appendix: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Per result the entries that not all share."""
    common = _in_common(appendix)
    return {result: {name: value for name, value in entries.items() if name not in common} for result, entries in appendix.items()}
