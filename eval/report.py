"""The report of an evaluation: one HTML file, readable offline, and its tables as text.

Nothing is measured here. `make_report` makes tables, plots, pictures and lines to cite of the results in a
folder. What cannot be compared never shares a column.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from torch import Tensor

from eval.drawing import svg, unique
from eval.page import NOTHING, decimals, number, picture_address, write_page
from eval.plots import (
    AGREEMENT,
    DISTANCE,
    ends_or_value,
    how_drawn,
    is_hash,
    main_metrics,
    metric_name,
    nearest_plot,
    pareto_plot,
    save_pareto,
    steps_plot,
    trade_off_plot,
)
from eval.results import Result, Scored, read_result
from eval.runs import Run, describe_runs
from eval.settings import ScoreParams
from eval.tables import (
    Table,
    as_text,
    check_results,
    flat,
    make_tables,
    markdown_table,
    random_metrics,
    row_notes,
)
from eval.targets import Target
from models.files.writing import replacing
from samplers.pictures import open_picture
from train.data.names import is_hidden

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACROSS = 372  # CSS pixels that a small sheet may be magnified to
STORED = 1600  # pixels of a sheet's longer side that a page keeps


@dataclass(frozen=True)
class Story:
    """What a report holds besides its results.

    summary  paragraphs, with a blank line between them
    images   real ones (N, 3, H, W) in [-1, 1], on which the forward process of the runs is shown
    facts    entries of the last section
    """

    title: str = "Scores"
    summary: str = ""
    targets: Sequence[Target] = ()
    runs: Sequence[Run] = ()
    images: Tensor | None = None
    facts: Mapping[str, str] | None = None


def result_files(folder: str | Path) -> list[Path]:
    """The results in a folder, in the order of their names."""
    return sorted(file for file in Path(folder, "results").glob("*.json") if not is_hidden(file.name))


def make_report(folder: str | Path, files: Sequence[Path] | None = None, story: Story | None = None) -> Path:
    """Write folder/report.html, results.md and, if costs are known, pareto.png. Returns the page's path.

    files  of results, in the order of the tables; None: `result_files`

    The sheet of NAME.json is NAME.png beside it. Results of one name are told apart by the names of their
    files. ValueError if there are no results, or a file is not a result.
    """
    folder = Path(folder)
    files = result_files(folder) if files is None else files
    if not files:
        raise ValueError(f"{folder} has no results/*.json: plain-diffusion eval writes them")
    results, sheets = [read_result(file) for file in files], {}
    names = [result.name for result in results]
    for i, file in enumerate(files):
        if names.count(names[i]) > 1:
            results[i] = replace(results[i], name=f"{names[i]} ({file.stem})")
        if (sheet := file.with_suffix(".png")).exists():
            sheets[results[i].name] = sheet
    write_report(folder / "report.html", results, sheets, story or Story(f"Scores: {folder.resolve().name}"))
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(markdown_table(results), encoding="utf-8")
    if _has_costs(results):
        save_pareto(folder, results)
    return folder / "report.html"


def write_report(
    path: str | Path, results: Sequence[Result], sheets: Mapping[str, Path], story: Story | None = None
) -> Path:
    """Write the page to `path`, whole or not at all. All text is escaped; the page fetches and runs nothing.

    results  in the order of the tables, with different names
    sheets   PNG files of sample pictures, by the result's name

    ValueError for no results, two of one name, or a sheet that cannot be read as a picture; OSError for files
    that cannot be read or written.
    """
    check_results(results)
    story = story or Story()
    tables = make_tables(results)
    listed = [result for table in tables for result in table.results]
    figures = [figure for result in results for figure in result.figures.values()]
    metrics = unique(name for result in results for name in result.figures)
    shared, own = _fingerprints(listed)
    notes = unique(note for result in results for note in row_notes(result))
    write_page(
        path,
        Path(__file__).parent / "templates" / "report.html.j2",
        title=story.title,
        paragraphs=[part for part in story.summary.split("\n\n") if part.strip()],
        cards=_cards(tables, story.targets),
        random=[metric_name(metric) for metric in random_metrics(results)],
        targets=[_target(target) for target in story.targets],
        met=sum(target.met for target in story.targets),
        results=len(results),
        parts=any("parts" in figure.extra for figure in figures),
        bars=any(cell.bar is not None for table in tables for row in table.rows for cell in row.cells),
        tables=tables,
        metrics=metrics,
        networks=unique(figure.basis.get("extractor", {}).get("network") for figure in figures),
        bases=[_basis(metric, results) for metric in metrics],
        notes={note: i for i, note in enumerate(notes, 1)},
        devices=_devices(results),
        plots=_plots(tables),
        sheets=[_sheet(result.name, sheets[result.name]) for result in listed if result.name in sheets],
        runs=describe_runs(story.runs, story.images),
        shared={**shared, **(story.facts or {})},
        fingerprints=own,
        citations={result.name: [cite(metric, result) for metric in result.figures] for result in listed},
    )
    return Path(path)


# The first lines --------------------------------------------------------------------------------------------


def _cards(tables: Sequence[Table], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Large numbers for the head of the page: targets met, and the best of each main metric."""
    cards = []
    if targets:
        missed = [target.name for target in targets if not target.met]
        detail = f"missed: {'; '.join(missed)}" if missed else "every promise kept"
        met = f"{len(targets) - len(missed)} of {len(targets)}"
        cards.append({"label": "targets met", "value": met, "detail": detail, "bad": bool(missed)})
    table = tables[0]
    for i, column in enumerate(table.columns):
        if column.best is None or column.metric not in main_metrics(table.results):
            continue
        row = next(row for row in table.rows if row.cells[i].rank == "best")
        yardsticks = (("real data", column.real), ("noise", column.noise))
        parts = [row.name, *(f"{name} {number(figure.value)}" for name, figure in yardsticks if figure)]
        card = {"label": f"best {column.heading}", "value": row.cells[i].text, "bad": False}
        cards.append({**card, "detail": " · ".join(parts)})
    return cards


def _target(target: Target) -> dict[str, Any]:
    bound = ("≤ " if target.at_most else "≥ ") + number(target.limit)
    value = f"{target.value:.3f}" if math.isfinite(target.value) else NOTHING
    return {"name": target.name, "value": value, "bound": bound, "met": target.met, "note": target.note}


# What figures depend on -------------------------------------------------------------------------------------


def cite(metric: str, result: Result) -> str:
    """A figure on one line: "FID (clean, 50,000 samples vs. reference sha256 1234abcd..., inception
    f58cb9b6...) = 12.34 [12.1, 12.6]"."""
    figure = result.figures[metric]
    low, high = ends_or_value(figure)
    digits = decimals([figure.value], [(high - low) / 2]) if math.isfinite(figure.value) else 0
    samples = f"{figure.n:,} samples"
    if "parts" in figure.extra:
        samples = f"mean over {figure.extra['parts']:g} x {samples}"
    if reference := _reference(figure):
        samples += f" vs. reference {reference}"
    basis = ", ".join(filter(None, (_protocol(figure), samples, _network(figure))))
    interval = f" [{figure.low:.{digits}f}, {figure.high:.{digits}f}]" if low < high else ""
    version = result.facts.get("plain-diffusion")
    program = f", plain-diffusion {version}" if version is not None else ""
    return f"{metric_name(metric)} ({basis}) = {figure.value:.{digits}f}{interval}{program}"


def _protocol(figure: Scored) -> str:
    return as_text(figure.basis["protocol"]) if figure.basis.get("protocol") else ""


def _reference(figure: Scored) -> str:
    reference = figure.basis.get("reference")
    if isinstance(reference, Mapping):
        reference = reference.get("sha256") or as_text(reference)
    return f"{'sha256 ' if is_hash(reference) else ''}{as_text(reference)}" if reference else ""


def _network(figure: Scored) -> str:
    extractor = figure.basis.get("extractor")
    if not isinstance(extractor, Mapping) or not extractor:
        return ""
    name = f"{extractor.get('network', 'network')} {as_text(extractor.get('weights', ''))}".strip()
    return f"{name} with RANDOM WEIGHTS" if figure.random else name


def _basis(metric: str, results: Sequence[Result]) -> dict[str, str]:
    """What the figures of a metric are computed from, column by column."""
    figures = [result.figures[metric] for result in results if metric in result.figures]
    columns: dict[str, Callable[[Scored], str]] = {
        "samples": lambda figure: f"{figure.n:,}",
        "network": _network,
        "protocol": _protocol,
        "reference": _reference,
    }
    texts = {
        name: " or ".join(unique(filter(None, map(text, figures)))) or NOTHING
        for name, text in columns.items()
    }
    return {"name": metric_name(metric), **texts}


def _devices(results: Sequence[Result]) -> list[str]:
    """Where the seconds of results were measured."""
    hows = zip(results, how_drawn(results), strict=True)
    timed = [result for result, how in hows if how and math.isfinite(how.seconds)]
    return unique(result.facts.get("device", "an unknown device") for result in timed)


def _fingerprints(results: Sequence[Result]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """All that figures depend on, with whole hashes: what all results share, and each result's own."""
    entries = {
        result.name: {name: as_text(value, whole=True) for name, value in _fingerprint(result).items()}
        for result in results
    }
    first, *others = entries.values()
    shared = {
        name: value
        for name, value in first.items()
        if others and all(other.get(name) == value for other in others)
    }
    own = {
        result: {name: value for name, value in entry.items() if name not in shared}
        for result, entry in entries.items()
    }
    return shared, own


def _fingerprint(result: Result) -> dict[str, Any]:
    found = {f"samples: {name}": value for name, value in flat(result.samples).items() if value is not None}
    for metric, figure in result.figures.items():
        entries = {**flat(figure.basis), **figure.extra}
        found |= {f"{metric_name(metric)}: {name}": value for name, value in entries.items()}
    usual = flat(asdict(ScoreParams(samples="", metric="fid")))
    settings = flat(result.settings)
    found |= {f"asked for: {name}": value for name, value in settings.items() if value != usual.get(name)}
    return found | dict(result.facts)


# Plots and pictures -----------------------------------------------------------------------------------------


def _plots(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Plots of all tables: the kind, which chooses the caption, the title, and the drawing."""
    plots = []
    for i, table in enumerate(tables, 1):
        for k, (kind, title, figure) in enumerate(_table_plots(table)):
            title += f" (table {i})" if len(tables) > 1 else ""
            plots.append(
                {"kind": kind, "title": title, "markup": Markup(svg(figure, f"plot-{i}-{k}", title))}
            )
    return plots


def _table_plots(table: Table) -> Iterator[tuple[str, str, Figure]]:
    """Main metrics against steps and costs, distances against agreement, and the nearest training images."""
    mains = {
        metric: [result for result in table.results if metric in result.figures]
        for metric in main_metrics(table.results)
    }
    for metric, results in mains.items():
        if len({how.steps for how in how_drawn(results) if how and how.steps}) > 1:
            yield "steps", f"{metric_name(metric)} against steps", steps_plot(results, metric)
    for metric, results in mains.items():
        if _has_costs(results):
            yield "cost", f"{metric_name(metric)} and its cost", pareto_plot(results, [metric])
    for distance, score in product(filter(DISTANCE.search, mains), filter(AGREEMENT.search, mains)):
        both = [result for result in mains[distance] if score in result.figures and not result.role]
        if len(both) > 1:
            title = f"{metric_name(distance)} against {metric_name(score)}"
            yield "trade-off", title, trade_off_plot(both, distance, score)
    if near := [result for result in table.results if "nearest" in result.figures]:
        yield "nearest", "Distance to the nearest training image", nearest_plot(near)


def _has_costs(results: Sequence[Result]) -> bool:
    """Whether the cost of a result with a main metric is known."""
    metrics = main_metrics(results)
    return any(
        how is not None and not (math.isnan(how.calls) and math.isnan(how.seconds))
        for result, how in zip(results, how_drawn(results), strict=True)
        if any(metric in result.figures for metric in metrics)
    )


def _sheet(name: str, path: Path) -> dict[str, Any]:
    """A sheet for the page: a small one magnified by a whole number, a large one reduced, as JPEG."""
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
