"""The report: whole, self-contained, escaped, and never without the numbers to judge a number by."""

# ruff: noqa: RUF001  (minus signs, dashes and multiplication signs are meant)

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import SPACINGS, DiscreteVP, RectifiedFlow, VarianceExploding, time_grid
from eval.bench.solver_plots import GRIDS, grids_plot
from eval.digits.plots import quality_plot, smooth
from eval.digits.report import Gallery, write_report
from eval.digits.score import Score, Spread, Target, reference
from eval.drawing import picture, save_figure, svg
from eval.page import number

HOSTILE = "<script>alert('x')</script> & \"co\""


def score(model: str = "UNet, eps", kind: Any = "model", sampler: str = "ddim", steps: int = 10, **changes: Any) -> Score:
    values: dict[str, Any] = dict(
        guidance=1.0, calls=steps, n=540, seeds=3, frechet=Spread(2.345, 0.12), kernel=Spread(0.0123, 0.0011),
        accuracy=Spread(0.934, 0.006), nearest=Spread(1.912, 0.013), copies=Spread(0.012, 0.004), kernel_error=0.0009, seconds=0.37,
    )  # fmt: skip
    return Score(model, kind, sampler, steps, **{**values, **changes})


def references() -> list[Score]:
    nothing = Spread(math.nan, 0.0)
    plain: dict[str, Any] = dict(sampler="", steps=0, seconds=0.0)
    return [
        score("Real digits", "floor", frechet=Spread(0.61, 0.03), accuracy=Spread(1.0, 0.0), nearest=Spread(0.0, 0.0), **plain),
        score(
            "Held-out digits", "held_out", frechet=nothing, kernel=nothing, accuracy=Spread(0.978, 0.0), nearest=Spread(2.04, 0.0), **plain
        ),
        score("Pure noise", "ceiling", frechet=Spread(187.0, 1.2), accuracy=Spread(0.101, 0.004), nearest=Spread(7.31, 0.002), **plain),
    ]


def rows() -> list[Score]:
    made = [
        score(sampler=sampler, steps=steps, guidance=guidance, frechet=Spread(1 + 20 / steps + i, 0.1))
        for i, sampler in enumerate(("ddpm", "ddim"))
        for steps in (5, 20)
        for guidance in (1.0, 2.0)
    ]
    return [*made, score(sampler="euler"), score("Student", sampler="consistency", steps=2, seeds=1), *references()]


EMPTY: dict[str, Any] = dict(
    title="A run", summary="", scores=[], targets=[], curves={}, forward={}, galleries=[], trajectories=[], facts={},
)  # fmt: skip


def full() -> dict[str, Any]:
    images = torch.rand(20, 1, 8, 8) * 2 - 1
    lines = [{"step": float(i + 1), "loss": 1 / (i + 1), "grad_norm": 0.5, "lr": 1e-3, "samples_per_second": 900.0} for i in range(40)]
    return dict(
        title="A run", summary="First.\n\nSecond.", scores=rows(), targets=[Target("Likeness", 1.8, 3.0, True)],
        curves={"UNet": lines}, forward={"VP": (DiscreteVP.linear(), images[:3]), "flow": (RectifiedFlow(), images[:3])},
        galleries=[Gallery("Samples", "ten a row", images)], trajectories=[Gallery("Path", "x0", images, 5)], facts={"torch": "2.11"},
    )  # fmt: skip


def write(path: Path, **parts: Any) -> str:
    write_report(path, **{**EMPTY, **parts})
    return path.read_text(encoding="utf-8")


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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report") / "report.html", **full())


# ---------------------------------------------------------------------------------------------------------------- the page


def test_nothing_is_fetched(page: str) -> None:
    parsed = Page(page)
    for tag, name, value in parsed.attributes:
        if name in ("src", "srcset", "poster", "data", "action"):
            assert value.startswith("data:"), (tag, name, value[:60])
        if name in ("href", "xlink:href"):
            assert value.startswith("#") or (tag == "a" and value.startswith("https://arxiv.org/abs/")), (tag, value)
    tags = {tag for tag, _, _ in parsed.attributes} | set(re.findall(r"<([a-z]+)", page))
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "@import" not in page
    assert set(re.findall(r"url\(['\"]?(.)", page)) <= {"#"}
    assert "default-src 'none'" in page


def test_is_well_formed_and_links_lead_somewhere(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    ids = parsed.values("id")
    assert len(ids) == len(set(ids)), "several figures share the page: their ids must differ"
    used = [value for value in parsed.values("href") if value.startswith("#")] + re.findall(r"url\((#[^)]*)\)", page)
    assert {value[1:] for value in used} <= set(ids)


def test_every_score_appears(page: str) -> None:
    text = re.sub(r"<[^>]*>", " ", page[page.index('<table class="scores">') :])
    text = " ".join(text[: text.index("The best row")].split())
    for row in rows():
        name = row.model if row.kind != "model" else f"{row.sampler} {row.steps} {'off' if row.guidance == 1 else f'{row.guidance:g}'}"
        expected = [name]
        expected += [f"{row.frechet.mean:.2f}"] if math.isfinite(row.frechet.mean) else ["–"]
        expected += [f"{1000 * row.kernel.mean:.1f}"] if math.isfinite(row.kernel.mean) else ["–"]
        expected += [f"{100 * row.accuracy.mean:.2f}", f"{row.nearest.mean:.3f}", f"540 × {row.seeds}"]
        assert re.search(".{0,60}?".join(map(re.escape, expected)), text), expected
    assert page.count("<td>ddpm</td>") + page.count("<td>ddim</td>") == 8


def test_spread_is_shown_only_where_there_are_seeds(page: str) -> None:
    student = page[page.index('<td>consistency</td><td class="num">2</td>') :]
    assert "±" not in student[: student.index("</tr>")].split("title=")[0]
    assert "one seed have no spread" in page


def test_best_and_indistinguishable_rows_are_marked(tmp_path: Path) -> None:
    scores = [
        score(steps=5, frechet=Spread(2.0, 0.1)), score(steps=10, frechet=Spread(2.1, 0.1)), score(steps=20, frechet=Spread(2.3, 0.1)),
        *references(),
    ]  # fmt: skip
    page = write(tmp_path / "r.html", scores=scores)
    ranks = re.findall(r'<td class="num (best|tied|) ?barred" style="--bar:([\d.]+)%"><b>([\d.]+)', page)
    assert [(rank, value) for rank, _, value in ranks] == [("best", "2.00"), ("tied", "2.10"), ("", "2.30")]
    bars = [float(bar) for _, bar, _ in ranks]
    assert bars[0] == pytest.approx(100 * math.log(187 / 2) / math.log(187 / 0.61), abs=0.1)
    assert bars == sorted(bars, reverse=True)


def test_targets_met_and_missed(tmp_path: Path) -> None:
    targets = [
        Target("Likeness", 1.87, 3.0, True), Target("Labels", 0.9, 0.95, False, "the student saw 500 steps"),
        Target("Not measured", math.nan, 1.0, True),
    ]  # fmt: skip
    assert [target.met for target in targets] == [True, False, False]
    page = write(tmp_path / "r.html", targets=targets)
    verdicts = re.findall(r'<td>([^<]+)</td><td class="num">([^<]+)</td><td class="num quiet">([^<]+)</td>.*?([✓✗] \w+)', page)
    assert verdicts == [
        ("Likeness", "1.870", "≤ 3", "✓ met"), ("Labels", "0.900", "≥ 0.95", "✗ missed"), ("Not measured", "–", "≤ 1", "✗ missed"),
    ]  # fmt: skip
    assert "the student saw 500 steps" in page
    assert "1 of 3" in page


def test_all_text_is_escaped(tmp_path: Path) -> None:
    pictures = torch.zeros(4, 1, 8, 8)
    page = write(
        tmp_path / "r.html", title=HOSTILE, summary=HOSTILE, scores=[score(HOSTILE, sampler=HOSTILE), *references()],
        targets=[Target(HOSTILE, 1, 2, True, HOSTILE)], curves={HOSTILE: [{"step": 1, "loss": 1}]},
        forward={HOSTILE: (RectifiedFlow(), pictures)}, galleries=[Gallery(HOSTILE, HOSTILE, pictures)],
        trajectories=[Gallery(HOSTILE, HOSTILE, pictures)], facts={HOSTILE: HOSTILE},
    )  # fmt: skip
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12
    assert Page(page).open == []


def test_unequal_sizes_are_pointed_out(tmp_path: Path, page: str) -> None:
    assert "compare rows of equal N only" not in page
    assert "compare rows of equal N only" in write(tmp_path / "r.html", scores=[score(n=100), *references()])


def test_parts_without_data_are_left_out(tmp_path: Path, page: str) -> None:
    empty = write(tmp_path / "r.html")
    for anchor in ("targets", "samples", "quality", "memorisation", "trajectories", "forward", "training", "facts"):
        for mark in (f'href="#{anchor}"', f'id="{anchor}"'):
            assert page.count(mark) == 1
            assert mark not in empty
    assert "<svg" not in empty
    assert Page(empty).open == []


def test_a_diverged_model_and_missing_references_do_not_break_it(tmp_path: Path) -> None:
    nothing = Spread(math.nan, math.nan)
    broken = score(frechet=nothing, kernel=nothing, accuracy=nothing, nearest=nothing, kernel_error=math.nan)
    assert "A run" in write(tmp_path / "r.html", scores=[broken])
    assert "2.35" in write(
        tmp_path / "r.html", scores=[broken, score(steps=20)], curves={"UNet": [{"step": 1, "loss": math.nan}], "DiT": []}
    )


def test_forward_process_shows_levels(tmp_path: Path) -> None:
    schedules = {"VP": DiscreteVP.linear(), "flow": RectifiedFlow(), "VE": VarianceExploding()}
    page = write(tmp_path / "r.html", forward={name: (schedule, torch.zeros(2, 1, 8, 8)) for name, schedule in schedules.items()})
    assert re.findall(r'alt="noised images at t = ([^"]+)"', page)[:9] == ["data", "0", "143", "285", "428", "571", "714", "856", "999"]
    assert "−∞" in page  # the flow ends in pure noise


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    old = write(path)

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match=r"cannot write .*report\.html: No space left on device"):
        write(path, summary="another")
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("report.html", old)]


# ------------------------------------------------------------------------------------------------- scores, numbers, pictures


@pytest.mark.parametrize("row", rows())
def test_scores_survive_strict_json(row: Score) -> None:
    back = Score.from_json(json.loads(json.dumps(row.to_json(), allow_nan=False)))
    assert back.to_json() == row.to_json()
    assert repr(back) == repr(row)  # NaN is not equal to itself, but prints alike


def test_targets_survive_strict_json() -> None:
    for target in (Target("a", 1, 2, True, "why"), Target("b", math.nan, 2, False)):
        assert repr(Target.from_json(json.loads(json.dumps(target.to_json(), allow_nan=False)))) == repr(
            Target(target.name, float(target.value), float(target.limit), target.at_most, target.note)
        )


def test_spread_of_seeds() -> None:
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert Spread.of([4.0]) == Spread(4.0, 0.0)


@pytest.mark.parametrize("order", [1, -1])
def test_each_metric_has_its_own_reference(order: int) -> None:
    """The train split for distances between sets, the held-out images for what only unseen images can tell."""
    scores = rows()[::order]
    assert reference(scores, "floor", "frechet") == Spread(0.61, 0.03)
    assert reference(scores, "floor", "accuracy") == Spread(0.978, 0)
    assert reference(scores, "floor", "nearest") == Spread(2.04, 0)
    assert reference(scores, "ceiling", "accuracy") == Spread(0.101, 0.004)
    assert reference([score()], "floor", "frechet") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (3, "3"), (0.95, "0.95"), (1.2345, "1.23"), (187.4, "187"), (12345.6, "12,346"), (3.1e-7, "3.1 × 10⁻⁷"),
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


def test_coinciding_samplers_are_both_visible() -> None:
    """DDIM and Euler are the same numbers: one must be drawn wider, and the other above it."""
    figure = quality_plot([score(sampler="euler"), score(sampler="euler", steps=20), score(), score(steps=20), *references()])
    lines = {container.get_label(): container[0] for container in figure.axes[0].containers}
    assert lines["ddim"].get_linewidth() > 2 * lines["euler"].get_linewidth()
    assert lines["ddim"].get_markersize() > 2 * lines["euler"].get_markersize()
    assert lines["ddim"].get_zorder() < lines["euler"].get_zorder()


def test_picture_of_grids_shows_every_spacing_as_it_is() -> None:
    """A dot per network call at the level's share of noise; a row that a schedule has no levels for says so; colours follow the page."""
    schedules = {"table": DiscreteVP.scaled_linear(), "flow": RectifiedFlow()}
    rows = [row for part in GRIDS.values() for row in part]
    assert {SPACINGS[spacing] for _, spacing, _ in rows} == set(SPACINGS.values())
    figure = grids_plot(schedules, steps=5)
    panels: Any = figure.axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [name for name, _, _ in rows]
    for axes, schedule, without in zip(panels, schedules.values(), (3, 0), strict=True):
        dots: dict[int, Any] = {line.get_ydata()[0]: line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 5}
        assert len(axes.texts) == without
        assert sorted([*dots, *(text.xy[1] for text in axes.texts)]) == list(range(len(rows)))
        for y, (_, spacing, options) in enumerate(rows):
            if spacing in ("trailing", "beta") or options.get("table") == "sdxl":
                grid = time_grid(schedule, 5, spacing, **options)
                assert list(dots[y]) == [level.sigma / (level.alpha + level.sigma) for level in grid[:-1]]
    assert set(re.findall(r"(.)#[0-9a-f]{6}", svg(figure, "grids", "levels"))) == {" "}  # only as var(--name, #...)


def test_figures_follow_the_page_and_save_as_png(tmp_path: Path) -> None:
    figure = quality_plot(rows())
    text = svg(figure, "a", 'with "quotes"')
    assert text == svg(figure, "a", 'with "quotes"')
    assert "var(--ink, #1c2128)" in text
    assert 'aria-label="with &quot;quotes&quot;"' in text
    assert "UNet, eps · guidance 2" in text  # text, not outlines
    save_figure(figure, tmp_path / "figures" / "quality.png", dpi=50)
    assert Image.open(tmp_path / "figures" / "quality.png").width == 550
