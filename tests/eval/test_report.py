"""The report of an evaluation: nothing ranked that cannot be compared, every number with its interval, whole,
self-contained, escaped."""

# ruff: noqa: RUF001  (dashes are meant)

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import models
from diffusion import SPACINGS, DiscreteVP, RectifiedFlow, Schedule, VarianceExploding, time_grid
from eval.__main__ import after_all
from eval.bench.solver_plots import GRIDS, grids_plot
from eval.drawing import pareto_front, picture, save_figure, svg
from eval.page import number
from eval.plots import (
    how_drawn,
    main_metrics,
    metric_name,
    nearest_plot,
    pareto_plot,
    save_pareto,
    short_names,
    steps_plot,
    trade_off_plot,
)
from eval.report import Story, cite, make_report, write_report
from eval.results import Result, Scored, read_result, write_result
from eval.runs import Run, _forward, smooth
from eval.tables import make_tables, markdown_table
from eval.targets import Target

HOSTILE = "<script>alert('x')</script> & \"co\""


class Page(HTMLParser):
    """Every (tag, attribute, value), every id, and the tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


FID_BASIS: dict[str, Any] = {
    "metric": "fid", "protocol": "clean", "n": 50000, "reference": sha("reference"), "settings": {},
    "extractor": {"network": "inception", "weights": sha("inception"), "prepared": "299 x 299, bicubic, "
                                                                                   "antialiased",
                                                                                       "random": False},
}  # fmt: skip
CLIP_BASIS: dict[str, Any] = {
    "metric": "clip_score", "protocol": "torchmetrics", "n": 50000, "reference": None,
    "settings": {"scale": 100},
    "extractor": {"network": "clip ViT-B-16", "weights": sha("clip"), "prepared": "224 x 224, bicubic",
        "random": False},
}  # fmt: skip
KID_BASIS: dict[str, Any] = {**FID_BASIS, "metric": "kid", "settings": {"subsets": 100, "size": 1000}}
FACTS = {"plain-diffusion": "0.1.0", "torch": "2.15.0", "device": "CPU, 2 threads"}


def fid(value: float, half: float = 0.25, **basis: Any) -> Scored:
    return Scored(value, "lower", basis.get("n", 50000), {**FID_BASIS, **basis}, value - half, value + half)


def result(name: str, figures: dict[str, Scored], **parts: Any) -> Result:
    samples = {
        "origin": f"samples of {name}",
        "n": 50000,
        "sha256": sha(name),
        "sizes": ["32x32"],
        "skipped": [],
    }
    return Result(name, figures, {**samples, **parts.pop("samples", {})}, facts=FACTS, **parts)


def made(model: int, sampler: str, steps: int, guidance: float) -> Result:
    """A result as a sweep would leave it: better with more steps; guidance raises the CLIP score, and beyond
    1.5 also the FID."""
    order = {"euler": 1.0, "heun": 1.9, "dpmpp_2m": 1.7}[sampler]
    calls = steps * (1 + (guidance != 1)) * (1 + (sampler == "heun"))
    value = 4.2 - model + 900 * (1 + 0.2 * model) / steps ** (1 + 0.35 * order) + 1.4 * (guidance - 1.5) ** 2
    clip = 24 + 0.8 * model + 6 * (1 - math.exp(-guidance / 2)) - 20 / steps ** (1 + 0.3 * order)
    figures = {
        "fid": fid(value, 0.05 + 0.02 * value),
        "kid": Scored(value / 4000, "lower", 50000, KID_BASIS, value / 4000 - 2e-4, value / 4000 + 2e-4),
        "clip_score": Scored(clip, "higher", 50000, CLIP_BASIS, clip - 0.11, clip + 0.11),
    }
    settings = {
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "seed": 0,
        "fingerprint": sha(f"model {model}"),
    }
    return result(
        f"{('unet', 'dit')[model]} {sampler} {steps} x{guidance:g}",
        figures,
        samples={
            "settings": settings,
            "calls": calls,
            "seconds": calls * (0.004 + 0.003 * model),
            "origin": f"runs/{('unet', 'dit')[model]}",
        },
        notes=("3 pictures that could not be read were left out",) if steps == 5 else (),
        settings={"metric": ["fid", "kid", "clip_score"], "batch_size": 32},
    )


SWEEP = [
    made(*row) for row in itertools.product((0, 1), ("euler", "heun", "dpmpp_2m"), (5, 10, 25), (1.0, 2.5))
]
CLOSED = result(
    "closed model",
    {"fid": fid(9.7, 0.3), "clip_score": Scored(28.7, "higher", 50000, CLIP_BASIS, 28.6, 28.8)},
)
OTHER = result(
    "unet, as in 2017",
    {"fid": fid(7.77, protocol="tensorflow", n=10000), "clip_score": SWEEP[0].figures["clip_score"]},
)
EVERYTHING = [*SWEEP, CLOSED, OTHER]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation leaves: results, two sheets, and the report made of them."""
    folder = tmp_path_factory.mktemp("evaluation")
    for i, one in enumerate(EVERYTHING):
        write_result(one, folder / "results" / f"{i:02d}.json")
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 255, (35, 35, 3), np.uint8)).save(folder / "results" / "00.png")
    Image.fromarray(noise.integers(0, 255, (200, 1800, 3), np.uint8)).resize((1800, 1800)).save(
        folder / "results" / "01.png"
    )
    (folder / "results" / "._00.json").write_bytes(b"\0\5\26\7")  # as macOS leaves it beside a copy
    make_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees."""
    return " ".join(re.sub(r"<[^>]*>", " ", page[page.index("<main>") :]).split())


def cells(page: str, name: str) -> list[tuple[str, str, str]]:
    """(rank, value, interval) of every figure in the row of that name."""
    row = re.search(rf'<tr><th class="name" scope="row">{re.escape(name)}<.*?</tr>', page, re.DOTALL)
    assert row is not None
    found = re.findall(r'<td class="num stacked ?(\w*) ?"><b>(.*?)</b>(?:<i>(.*?)</i>)?', row[0])
    return [(rank, value, interval) for rank, value, interval in found]


# The page ---------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_or_run(page: str) -> None:
    """All sources are within the page, links lead within it, no scripts, and the policy forbids the rest."""
    parsed = Page(page)
    assert parsed.open == []
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    for tag, name, value in parsed.attributes:
        if name in ("src", "srcset", "data", "action"):
            assert value.startswith("data:"), (tag, name, value[:60])
        if name == "href":
            assert value.startswith("https://arxiv.org/abs/") if value[0] != "#" else value[1:] in ids
    assert not set(re.findall(r"<([a-z]+)", page)) & {"script", "link", "iframe", "object", "embed", "base"}
    assert "default-src 'none'" in page


def test_every_figure_stands_in_its_row_with_its_interval(page: str) -> None:
    """In the order of the metrics; what a result lacks is a dash; calls, seconds per image and n follow."""
    for one in SWEEP:
        f, k, c = (one.figures[name] for name in ("fid", "kid", "clip_score"))
        assert [(value, interval) for _, value, interval in cells(page, one.name)] == [
            (f"{f.value:.2f}", f"{f.low:.2f} to {f.high:.2f}"),
            (f"{k.value:.5f}", f"{k.low:.5f} to {k.high:.5f}"),
            (f"{c.value:.2f}", f"{c.low:.2f} to {c.high:.2f}"),
        ]  # fmt: skip
    assert [value for _, value, _ in cells(page, CLOSED.name)] == ["9.70", "–", "28.70"]
    row = "heun, 25 steps, guidance 2.5"
    assert re.search(re.escape(f"dit heun 25 x2.5 {row}") + r".{0,120} 100 0\.7 50,000", text_of(page))


def test_best_and_tied_by_brute_force(page: str) -> None:
    """Best is the lowest or highest of the column; tied is exactly what has a number in common with the best
    one's interval."""
    table = [one for one in EVERYTHING if one is not OTHER]
    for i, (metric, pick) in enumerate((("fid", min), ("kid", min), ("clip_score", max))):
        figures = {one.name: one.figures[metric] for one in table if metric in one.figures}
        best = pick(figure.value for figure in figures.values())
        interval = next((f.low, f.high) for f in figures.values() if f.value == best)
        ranks = {name: cells(page, name)[i][0] for name in figures}
        for name, f in figures.items():
            overlaps = max(f.low, interval[0]) <= min(f.high, interval[1])
            assert ranks[name] == ("best" if f.value == best else "tied" if overlaps else ""), (metric, name)
        assert {"best", "tied", ""} == set(ranks.values())


def test_what_cannot_be_compared_is_in_tables_apart(page: str) -> None:
    """One by another protocol has the lower FID, and is ranked nowhere; each table says in words what sets it
    apart."""
    tables = make_tables(EVERYTHING)
    assert [{one.name for one in table.results} for table in tables] == [
        {one.name for one in (*SWEEP, CLOSED)},
        {OTHER.name},
    ]
    first = [(how.model, how.sampler, how.guidance, how.steps) for how in how_drawn(tables[0].results) if how]
    assert first == sorted(first, key=lambda how: (how[0] != "unet", *how[1:])), (
        "by model, sampler, guidance and steps"
    )
    assert tables[0].results[-1].name == CLOSED.name
    assert [table.apart for table in tables] == [
        ("FID: protocol clean; n 50000",),
        ("FID: protocol tensorflow; n 10000",),
    ]
    assert [rank for rank, _, _ in cells(page, OTHER.name)] == ["", ""]
    assert "Table 2 of 2 FID: protocol tensorflow; n 10000" in text_of(page)
    assert list(tables[0].groups) == ["unet", "dit", ""]


def test_metrics_in_common_decide_and_each_difference_is_said() -> None:
    """Results without a common metric share a table, since they share no column; nested differences are named
    by their path."""
    kid = result("b", {"kid": Scored(0.1, "lower", 5, KID_BASIS, 0.0, 0.2)})
    assert len(make_tables([result("a", {"fid": fid(1.0)}), kid])) == 1
    other = fid(1.0, extractor={**FID_BASIS["extractor"], "weights": sha("other")})
    first, second = make_tables([result("a", {"fid": fid(1.0)}), result("b", {"fid": other})])
    assert first.apart == (f"FID: extractor weights {sha('inception')[:8]}...",)
    assert second.apart == (f"FID: extractor weights {sha('other')[:8]}...",)


def test_what_each_figure_is_of(tmp_path: Path) -> None:
    """Samples, network, protocol and reference in a line per metric; ways that differ are joined by "or", and
    settings are listed where they are not the usual ones.
    """
    network, reference = f"inception {sha('inception')[:8]}...", f"sha256 {sha('reference')[:8]}..."
    accuracy = {name: value for name, value in FID_BASIS.items() if name not in ("reference", "protocol")}
    figures = {"fid": fid(1.0), "accuracy": Scored(0.5, "higher", 50000, accuracy, 0.4, 0.6)}
    settings = {"features": "digits", "protocol": "clean", "dtype": "bf16", "n": None}
    rows = [result("a", figures, settings=settings), result("b", {"fid": fid(3.0, n=200)})]
    text = text_of(write_report(tmp_path / "r.html", rows, {}).read_text())
    assert f"FID 50,000 or 200 {network} clean {reference} Label accuracy 50,000 {network} – –" in text
    words = ("features digits", "dtype bf16", "protocol clean")
    assert [word for word in words if f"asked for: {word}" in text] == ["features digits", "dtype bf16"]


def yardsticks() -> list[Result]:
    """Real data, unseen real data and noise, and a sweep to judge by them: means over parts."""

    def scored(value: float, better: Any = "lower", half: float = 0.1) -> Scored:
        return Scored(
            value,
            better,
            270,
            {"extractor": {"network": "digit classifier"}},
            value - half,
            value + half,
            {"parts": 3.0, "std": 0.04},
        )

    def drawn_by(sampler: str, steps: int, guidance: float, value: float) -> Result:
        settings = {"sampler": sampler, "steps": steps, "guidance": guidance, "run": "runs/a"}
        figures = {
            "frechet": scored(value),
            "accuracy": scored(0.9, "higher", 0.02),
            "nearest": scored(1.9 + value / 99, "neither"),
        }
        return result(
            f"Net, {sampler}, {steps} steps x{guidance:g}", figures,
            samples={"settings": settings, "calls": steps, "seconds": 0.01 * steps, "model": "Net"},
        )  # fmt: skip

    noise = {"frechet": scored(187.0), "accuracy": scored(0.1, "higher"), "nearest": scored(7.3, "neither")}
    unseen = {"accuracy": scored(0.98, "higher", 0.01), "nearest": scored(2.04, "neither")}
    return [
        result("Noise", noise, samples={"role": "ceiling"}),
        *(drawn_by(name, n, g, 1 + 20 / n + g) for name in ("ddpm", "ddim", "euler") for n in (5,
            20) for g in (1.0, 2.0)),
        result("Real", {"frechet": scored(0.61)}, samples={"role": "floor"}),
        result("Held out", unseen, samples={"role": "held_out"}),
    ]  # fmt: skip


def test_samples_are_judged_by_real_data_and_noise(tmp_path: Path) -> None:
    """Yardsticks stand first, are never best, and fill the line under a distance; a figure that is not to be
    ranked has no best."""
    rows = yardsticks()
    (table,) = make_tables(rows)
    assert [row.tag for row in table.rows][:4] == ["ceiling", "floor", "real, unseen", ""]
    assert {row.n for row in table.rows} == {"270 × 3"}
    frechet, accuracy, nearest = ([row.cells[i] for row in table.rows] for i in range(3))
    assert [cell.rank for cell in frechet].count("best") == 3  # three samplers at 20 steps
    assert {cell.rank for cell in nearest} == {""}
    assert {cell.rank for cell in accuracy} == {""}, "what is equal in all is best in none"
    assert [cell.bar for cell in frechet[:3]] == [None] * 3
    assert frechet[3].bar == pytest.approx(
        100 * math.log(187 / float(frechet[3].text)) / math.log(187 / 0.61), abs=0.2
    )
    page = write_report(
        tmp_path / "r.html",
        rows,
        {},
        Story(targets=[Target("t", 1.87, 3.0, True), Target("u", math.nan, 1.0, True)]),
    ).read_text()
    assert Page(page).open == []
    assert "1 of 2 missed: u" in text_of(page.replace("<header>", "<main>", 1))
    verdicts = re.findall(
        r'<td>([^<]+)</td><td class="num">([^<]+)</td><td class="num quiet">([^<]+)</td>.*?([✓✗] \w+)', page
    )
    assert verdicts == [("t", "1.870", "≤ 3", "✓ met"), ("u", "–", "≤ 1", "✗ missed")]
    assert "real data 0.61 · noise 187" in text_of(page.replace("<header>", "<main>", 1))
    assert "cannot be compared with the FID or KID of papers" in text_of(page)
    assert cite("frechet", rows[0]).startswith(
        "Frechet distance (mean over 3 x 270 samples, digit classifier) = 187.00"
    )


def test_coinciding_samplers_are_both_visible() -> None:
    """DDIM and Euler are the same numbers: one must be drawn wider, and the other above it; a band and a line
    show what to judge by."""
    figure = steps_plot(yardsticks(), "frechet")
    lines = {container.get_label(): container[0] for container in figure.axes[0].containers}
    assert lines["ddim"].get_linewidth() > 2 * lines["euler"].get_linewidth()
    assert lines["ddim"].get_markersize() > 2 * lines["euler"].get_markersize()
    assert lines["ddim"].get_zorder() < lines["euler"].get_zorder()
    assert [text.get_text() for text in figure.axes[0].texts] == ["noise 187 ↑"]
    with pytest.raises(ValueError, match="no result was drawn by a model"):
        steps_plot([CLOSED], "fid")


def test_nearest_plot_shows_every_result(tmp_path: Path) -> None:
    """A line per yardstick, model and guidance; noise is named beside the scale."""
    axes: Any = nearest_plot(yardsticks()).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "Held out",
        "Net · no guidance",
        "Net · guidance 2",
    ]
    assert len(axes.containers) == 1 + 12
    assert [text.get_text() for text in axes.texts] == ["Noise 7.30 →"]


def test_figures_follow_the_page_and_save_as_png(tmp_path: Path) -> None:
    """The same figure gives the same text; colours are variables of the page."""
    figure = steps_plot(yardsticks(), "frechet")
    text = svg(figure, "a", 'with "quotes"')
    assert text == svg(figure, "a", 'with "quotes"')
    assert "var(--ink, #1c2128)" in text
    assert 'aria-label="with &quot;quotes&quot;"' in text
    assert "Net · guidance 2" in text  # text, not outlines
    save_figure(figure, tmp_path / "figures" / "quality.png", dpi=50)
    assert Image.open(tmp_path / "figures" / "quality.png").width == 550


def test_runs_are_shown_as_they_learned(tmp_path: Path) -> None:
    """Their losses, the forward process and a sampling; nothing of it where there are no runs, and no break
    where a loss is no number."""
    for name, lines in (
        ("a", [{"step": 1, "loss": 0.5, "lr": 1e-3}, {"step": 2, "loss": math.nan}]),
        ("b", []),
    ):
        model = models.build(
            {
                "network": {
                    "name": "dit",
                    "in_channels": 1,
                    "image_size": 8,
                    "hidden": 16,
                    "depth": 1,
                    "heads": 2,
                },
                "schedule": {"name": "flow"},
                "prediction": "flow",
                "shape": [1, 8, 8],
            }
        )
        models.save(model, tmp_path / name / "checkpoint.safetensors")
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [Run(HOSTILE, str(tmp_path / "a")), Run("b", str(tmp_path / "b"), shown=False)]
    page = write_report(
        tmp_path / "r.html", [CLOSED], {}, Story(runs=runs, images=torch.zeros(3, 3, 8, 8))
    ).read_text()
    empty = write_report(tmp_path / "e.html", [CLOSED], {}).read_text()
    assert "<script" not in page
    for anchor in ("paths", "forward", "training"):
        for mark in (f'href="#{anchor}"', f'id="{anchor}"'):
            assert page.count(mark) == 1
            assert mark not in empty
    assert Page(page).open == Page(empty).open == []
    assert page.count('class="pixels"') == 2 + 8


@pytest.mark.parametrize(
    ("schedule", "times"),
    [
        (DiscreteVP.linear(), ["data", "0", "143", "285", "428", "571", "714", "856", "999"]),
        (RectifiedFlow(), ["data", "0.143", "0.286", "0.429", "0.571", "0.714", "0.857", "1"]),
        (VarianceExploding(), None),
    ],
)
def test_forward_process_shows_levels(schedule: Schedule, times: list[str] | None) -> None:
    """Equally spaced in the schedule's own time, the clean data first."""
    network = {"name": "dit", "in_channels": 1, "image_size": 8, "hidden": 16, "depth": 1, "heads": 2}
    model = models.build(
        {"network": network, "schedule": {"name": "flow"}, "prediction": "flow", "shape": [1, 8, 8]}
    )
    strip = _forward("a", replace(model, schedule=schedule), torch.zeros(2, 3, 8, 8))["columns"]
    assert times in (None, [column["t"] for column in strip])
    assert strip[0]["sigma"] == "0.000"
    assert (strip[-1]["log_snr"] == "−∞") == isinstance(
        schedule, RectifiedFlow
    )  # the flow ends in pure noise


def test_fingerprints_and_citations(page: str) -> None:
    """Hashes whole, once where all share them; a citation that holds protocol, sizes, reference, network,
    interval and version."""
    text = text_of(page)
    assert cite("fid", CLOSED) == (
        f"FID (clean, 50,000 samples vs. reference sha256 {sha('reference')[:8]}..., inception "
        f"{sha('inception')[:8]}...) "
        "= 9.70 [9.40, 10.00], plain-diffusion 0.1.0"
    )
    for one in EVERYTHING:
        assert text.count(one.samples["sha256"]) == 1
        assert all(cite(metric, one) in text for metric in one.figures)
    assert text.count(sha("reference")) == 1 + len(SWEEP)  # of FID for all, of KID where there is one
    assert "FID: reference" in text
    assert "asked for: batch_size 32" in text


def test_notes_are_footnotes(tmp_path: Path, page: str) -> None:
    """A note is printed once, and every row that has it refers to it; marks do not run together."""
    (note,) = SWEEP[0].notes
    assert page.count(note) == 1
    assert page.count('<sup><a href="#note-1">1</a></sup>') == sum(bool(one.notes) for one in EVERYTHING)
    several = write_report(tmp_path / "r.html", [replace(CLOSED, notes=("a", "b"))], {}).read_text()
    assert "1, 2" in re.sub("<[^>]*>", "", several[several.index("<sup>") :])[:8], (
        "marks that run together would read as another number"
    )


def test_sheets_are_shown_at_a_size_to_look_at(page: str) -> None:
    """A small one magnified by a whole number with its pixels sharp, a large one made smaller."""
    assert re.findall(r'<img class="(\w+)" src="data:image/(\w+);.*?style="width:(\d+)px" alt="samples of '
                      r'(.*?)"', page) == [
        ("pixels", "png", "350", SWEEP[0].name), ("photo", "jpeg", "1600", SWEEP[1].name),
    ]  # fmt: skip


def test_random_stand_ins_are_said_loudly(tmp_path: Path, page: str) -> None:
    """A banner, a footnote, and a word in the citation and the text table."""
    stand_in = result("a", {"fid": fid(1.0, extractor={**FID_BASIS["extractor"], "random": True})})
    text = write_report(tmp_path / "r.html", [stand_in, result("b", {"fid": fid(2.0)})], {}).read_text()
    assert '<p class="banner"' in text
    assert "Networks with random weights computed FID. These numbers mean nothing" in text_of(
        text.replace("<header>", "<main>", 1)
    )
    assert "RANDOM WEIGHTS" in cite("fid", stand_in)
    assert markdown_table([stand_in]).startswith("**RANDOM STAND-IN NETWORKS computed FID")
    assert '<p class="banner"' not in page


def test_all_text_is_escaped(tmp_path: Path) -> None:
    """Names of results, metrics, runs, samplers, notes, facts and settings are text, in the page, its
    drawings and the Markdown."""
    nasty = HOSTILE + " $\\frac$ | `x`\n_y"
    settings = {"sampler": nasty, "steps": 5, "guidance": 2.0}
    hostile = result(
        nasty, {nasty: fid(1.0), "fid": fid(2.0)},
        samples={"settings": settings, "calls": 10, "seconds": 0.5, "origin": nasty},
        notes=(nasty,), settings={nasty: nasty},
    )  # fmt: skip
    closed = result(f"{nasty} 2", {"fid": fid(3.0, protocol=nasty)})
    story = Story(nasty, nasty, [Target(nasty, 1, 2, True, nasty)], facts={nasty: nasty})
    page = write_report(
        tmp_path / "r.html", [hostile, closed, result("c", {"fid": fid(4.0)})], {}, story
    ).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert Page(page).open == []
    table = markdown_table([hostile, closed])
    assert not re.search(r"(?<!\\)[<|]script", table)
    rows = [line for line in table.splitlines() if line.startswith("| \\")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [
        7,
        6,
    ]  # the second table has no column of the hostile metric


@pytest.mark.parametrize(
    "results",
    [
        [result("alone", {"fid": fid(2.0)})],
        [result("unknown", {"fid": Scored(math.nan, "lower", 3, FID_BASIS, math.nan, math.nan)})],
        [
            replace(
                SWEEP[0],
                figures={"recall": Scored(0.5, "higher", 3, {"metric": "recall"}, math.nan, math.nan)},
            )
        ],
        [replace(SWEEP[0], samples={**SWEEP[0].samples, "calls": None, "seconds": None}), SWEEP[1]],
        [SWEEP[0], Result("no figures", {}, {})],
    ],
    ids=["one result", "NaN", "no interval", "no cost", "no figures"],
)
def test_sparse_results_make_whole_pages(tmp_path: Path, results: list[Result]) -> None:
    """One result, one metric, unknown values, intervals or costs: a page all the same, and nothing is called
    best of one."""
    page = write_report(tmp_path / "r.html", results, {}).read_text(encoding="utf-8")
    assert Page(page).open == []
    assert "nan" not in text_of(page).split("How to cite")[0].lower()
    if len(results) == 1:
        assert 'stacked best"' not in page
    assert markdown_table(results).count("|\n") >= 3


def test_refusals_say_what_would_be_right(tmp_path: Path) -> None:
    """No results, two of one name, a sheet that is no picture: one line each, and no file is left."""
    with pytest.raises(ValueError, match=r"has no results/\*\.json: plain-diffusion eval writes them"):
        make_report(tmp_path)
    with pytest.raises(ValueError, match="give at least one result"):
        write_report(tmp_path / "r.html", [], {})
    with pytest.raises(ValueError, match="two results are named 'a'"):
        markdown_table([result("a", {"fid": fid(1.0)})] * 2)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as the picture sheet of 'a'"):
        write_report(tmp_path / "r.html", [result("a", {"fid": fid(1.0)})], {"a": tmp_path / "a.png"})
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"a\.png cannot be read as the picture sheet of 'a': .* device or pipe"
    ):
        write_report(tmp_path / "r.html", [result("a", {"fid": fid(1.0)})], {"a": tmp_path / "a.png"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_results_of_one_name_are_told_apart_by_their_files(tmp_path: Path) -> None:
    """In a folder, where two evaluations may have been named alike."""
    for i in range(2):
        write_result(result("a", {"fid": fid(1.0 + i)}), tmp_path / "results" / f"run-{i}.json")
    page = make_report(tmp_path).read_text()
    assert [cells(page, f"a (run-{i})")[0][1] for i in range(2)] == ["1.00", "2.00"]


def test_devices_that_differ_are_pointed_out(tmp_path: Path, page: str) -> None:
    """Seconds of two machines cannot be compared, and calls can."""
    elsewhere = replace(SWEEP[1], facts={**FACTS, "device": "NVIDIA H100"})
    text = write_report(tmp_path / "r.html", [SWEEP[0], elsewhere], {}).read_text()
    assert (
        "Seconds were measured on CPU, 2 threads and on NVIDIA H100: compare network calls instead." in text
    )
    assert "Seconds were measured" not in page


def test_markdown_table_reads_as_text_and_as_markdown(folder: Path) -> None:
    """Aligned, with the best bold and ties marked; of the metrics that were asked for; and the one that is
    written."""
    few = [
        result("a", {"fid": fid(1.0, 0.2)}),
        result("b", {"fid": fid(1.3, 0.2)}),
        result("c", {"fid": fid(2.0, 0.2)}),
    ]
    lines = markdown_table(few).splitlines()[:5]
    assert len({len(line) for line in lines}) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["", "FID (lower is better)", "calls", "s/image", "n"]
    assert [row[1] for row in rows[2:]] == [
        "**1.00** (0.80 to 1.20)",
        "1.30 ~ (1.10 to 1.50)",
        "2.00 (1.80 to 2.20)",
    ]
    assert (folder / "results.md").read_text() == markdown_table(EVERYTHING)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    old = write_report(path, [CLOSED], {}).read_text()

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match=r"cannot write .*report\.html: No space left on device"):
        write_report(path, [CLOSED], {}, Story(summary="another"))
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("report.html", old)]


# Figures ----------------------------------------------------------------------------------------------------


def test_pareto_front_by_brute_force() -> None:
    """Exactly what no other point of at most its cost reaches, from the cheapest on."""
    points = [(float(c), float(v)) for c, v in np.random.default_rng(0).random((60, 2)).round(2)]
    front = pareto_front(points, lambda p: p[0], lambda p: p[1])
    expected = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert front == sorted(expected)
    assert pareto_front([(1.0, math.nan), (2.0, 3.0)], lambda p: p[0], lambda p: p[1]) == [(2.0, 3.0)]


def test_pareto_plot_has_a_panel_per_metric_and_cost() -> None:
    """Points at their calls and seconds per image, the front of the table's rows, and what has no cost as a
    line with its name."""
    figure = pareto_plot(EVERYTHING, ["fid", "clip_score"])
    axes: Any = figure.axes
    assert [panel.get_title(loc="left") for panel in axes] == [
        f"{metric} against {cost} per image"
        for metric in ("FID", "CLIP score, x100")
        for cost in ("network calls", "seconds")
    ]
    hows = how_drawn(SWEEP)
    for panel, (metric, sign), cost in zip(
        axes, [("fid", 1)] * 2 + [("clip_score", -1)] * 2, ("calls", "seconds") * 2, strict=True
    ):
        expected = {
            (getattr(how, cost), one.figures[metric].value) for one, how in zip(SWEEP, hows, strict=True)
        }
        shown = {
            (x, y)
            for line in panel.lines
            if line.get_marker() in ("o", "s", "^")
            for x, y in zip(*line.get_data(), strict=True)
        }
        assert shown == expected
        front = next(line for line in panel.lines if line.get_label() == "Pareto front")
        steps = pareto_front([(x, sign * y) for x, y in expected], lambda p: p[0], lambda p: p[1])
        assert [(x, sign * y) for x, y in zip(*front.get_data(), strict=True)][:-1] == steps
        assert [text.get_text() for text in panel.texts][:1] == ["closed model"]


def test_trade_off_plot_follows_guidance_at_most_steps() -> None:
    """Each line has one model, one sampler, its most steps, and ascending guidance; what was not drawn is a
    named star."""
    axes: Any = trade_off_plot([*SWEEP, CLOSED], "fid", "clip_score").axes[0]
    lines = [
        line.get_data() for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) == 2
    ]
    most = [one for one in SWEEP if " 25 " in one.name]
    expected = [
        ([b.figures["clip_score"].value for b in pair], [b.figures["fid"].value for b in pair])
        for pair in zip(most[::2], most[1::2], strict=True)
    ]
    assert [(list(x), list(y)) for x, y in lines] == expected
    assert [text.get_text() for text in axes.texts] == ["closed model"]


def test_pareto_picture_is_written(folder: Path, tmp_path: Path) -> None:
    """As PNG beside the report; not where nothing says what it cost."""
    assert Image.open(folder / "pareto.png").width == 2200
    with pytest.raises(ValueError, match="no result says how many network calls it took"):
        save_pareto(tmp_path, [CLOSED])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("fid", "FID"),
        ("clip_score_hessel", "CLIPScore, x2.5"),
        ("fid_clip", "Fid clip"),
        ("recall", "Recall"),
        ("nearest_distance", "Nearest distance"),
    ],
)
def test_metrics_are_written_as_people_write_them(metric: str, name: str) -> None:
    """By their titles; one that is not known, by its name in words."""
    assert metric_name(metric) == name


def test_main_metrics_are_distances_and_clip_scores() -> None:
    """Of these all, else the first."""
    assert main_metrics(EVERYTHING) == ["fid", "clip_score"]
    assert main_metrics([result("a", {"recall": fid(1.0), "density": fid(1.0)})]) == ["recall"]


def test_models_are_named_by_the_end_of_their_path_where_it_tells_them_apart() -> None:
    """Two runs of one last name keep their paths, and hashes are cut."""
    assert short_names(["a/x", "b/y", sha("w")]) == {"a/x": "x", "b/y": "y", sha("w"): f"{sha('w')[:8]}..."}
    assert short_names(["a/x", "b/x", "c/y"]) == {"a/x": "a/x", "b/x": "b/x", "c/y": "y"}


def test_weights_written_anew_are_another_model() -> None:
    """The same path with another fingerprint: two models, whose points no line joins; and several files make
    one."""
    again = replace(
        SWEEP[0],
        samples={
            **SWEEP[0].samples,
            "settings": {**SWEEP[0].samples["settings"], "fingerprint": sha("again")},
        },
    )
    names = [how.model for how in how_drawn([SWEEP[0], again, SWEEP[-1]]) if how]
    assert names == [f"unet {sha('model 0')[:8]}", f"unet {sha('again')[:8]}", "dit"]
    assert short_names(["a/x.safetensors, b/y.safetensors"]) == {
        "a/x.safetensors, b/y.safetensors": "x.safetensors, y.safetensors"
    }


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("figures", "fid", "value"), 10**400),
        (("figures", "fid", "basis", "extractor"), None),
        (("samples", "sizes"), {"a": 1}),
        (("samples", "settings"), 1),
        (("samples", "settings", "steps"), "many"),
        (("samples", "settings", "guidance"), [1]),
        (("samples", "calls"), "x"),
        (("samples", "seconds"), 10**400),
        (("settings",), {"keys": [1]}),
    ],
    ids=lambda part: ".".join(part) if isinstance(part, tuple) else "",
)
def test_a_damaged_result_is_named(place: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    """Entries of another kind than a report can read: one line with the file."""
    path = tmp_path / "a.json"
    write_result(SWEEP[0], path)
    assert read_result(path).figures == SWEEP[0].figures
    content = within = json.loads(path.read_text())
    for name in place[:-1]:
        within = within[name]
    within[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{path} is not a result of plain-diffusion eval: ") as found:
        read_result(path)
    assert "\n" not in str(found.value)


def test_hidden_files_are_no_results(tmp_path: Path) -> None:
    """As macOS leaves them beside copies: a folder that holds only such gets no report at the end of a run,
    and no error."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "._a.json").write_bytes(b"\0\5\26\7")
    after_all([{"report": str(tmp_path)}, {"report": None}])
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


# Numbers, pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (3, "3"), (0.95, "0.95"), (1.2345, "1.23"), (187.4, "187"), (12345.6, "12,346"),
        (3.1e-7, "3.1 × 10⁻⁷"),
        (-0.5, "−0.5"), (0.00123, "0.00123"), (1e-5, "1 × 10⁻⁵"), (math.nan, "–"), (-math.inf, "−∞"),
    ],
)  # fmt: skip
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text


def test_picture_holds_every_image_at_its_place() -> None:
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 3)
    pixels = np.asarray(Image.open(io.BytesIO(picture(images, columns=2))))
    assert pixels.shape == (8, 7, 4)  # three rows of 2 and two columns of 3, one clear pixel between
    assert [tuple(pixels[top, left, [0, 3]]) for top, left in ((0, 0), (0, 4), (3, 0), (3, 4), (6, 0))] == [
        (0, 255), (64, 255), (128, 255), (191, 255), (255, 255),
    ]  # fmt: skip
    assert (pixels[2, :, 3] == 0).all()
    assert (pixels[6:, 4:, 3] == 0).all()
    with pytest.raises(ValueError, match="needs images"):
        picture(torch.zeros(2, 8, 8), 2)


def test_smoothing_has_no_lag_and_averages_at_the_end() -> None:
    line = np.linspace(3, 1, 101)
    np.testing.assert_allclose(smooth(line, 0.2)[:-10], line[:-10], atol=1e-12)
    assert smooth(line, 0.2)[-1] == pytest.approx(line[-11:].mean())
    noisy = line + np.random.default_rng(0).normal(size=101)
    assert np.abs(smooth(noisy, 0.2) - line)[10:].mean() < 0.4 * np.abs(noisy - line)[10:].mean()


def test_picture_of_grids_shows_every_spacing_as_it_is() -> None:
    """A dot per network call at the level's share of noise; a row that a schedule has no levels for says so;
    colours follow the page."""
    schedules = {"table": DiscreteVP.scaled_linear(), "flow": RectifiedFlow()}
    rows = [row for part in GRIDS.values() for row in part]
    assert {SPACINGS[spacing] for _, spacing, _ in rows} == set(SPACINGS.values())
    figure = grids_plot(schedules, steps=5)
    panels: Any = figure.axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [name for name, _, _ in rows]
    for axes, schedule, without in zip(panels, schedules.values(), (3, 0), strict=True):
        dots: dict[int, Any] = {
            line.get_ydata()[0]: line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 5
        }
        assert len(axes.texts) == without
        assert sorted([*dots, *(text.xy[1] for text in axes.texts)]) == list(range(len(rows)))
        for y, (_, spacing, options) in enumerate(rows):
            if spacing in ("trailing", "beta") or options.get("table") == "sdxl":
                grid = time_grid(schedule, 5, spacing, **options)
                assert list(dots[y]) == [level.sigma / (level.alpha + level.sigma) for level in grid[:-1]]
    assert set(re.findall(r"(.)#[0-9a-f]{6}", svg(figure, "grids", "levels"))) == {
        " "
    }  # only as var(--name, #...)
