"""Settings are declared once: pages of --help, defaults, what is text, and what is recorded derive from the
dataclasses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import _unresolved, command_line, compose, compose_sweep
from configs.programs import PROGRAMS, describe, help_page
from diffusion.settings import (
    find,
    merged,
    of_kind,
    page,
    recorded,
    setting,
    settings,
    values,
    with_null_defaults,
)
from plain_diffusion import __main__ as console
from train.settings import RunSettings

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Inner:
    rate: float = setting(1e-3, "of learning")
    ends: tuple[int, int] = (1, 2)


@dataclass(frozen=True)
class Outer:
    run: str = setting(..., "a folder", text="path", kind="weights", heading="Which")
    n: int = setting(3, "how many " * 20, kind="count")
    inner: Inner = setting(lambda: Inner(rate=0.5), "what is within")
    free: dict[str, Any] = setting(dict, "", members=Inner)
    bare: list[str] = field(default_factory=list)


def test_a_page_is_yaml_that_says_all() -> None:
    """Read back, it is the defaults; every comment is on it, on lines that fit."""
    shown = page(settings(Outer))
    assert yaml.safe_load(shown) == {
        "run": "???",
        "n": 3,
        "inner": {"rate": 0.5, "ends": [1, 2]},
        "free": {"rate": 0.001, "ends": [1, 2]},
        "bare": [],
    }
    assert values(settings(Outer)) == yaml.safe_load(shown)
    words = " ".join(re.sub(r"\n *# ", " ", shown).split())
    assert all(text in words for text in ("Which --", "# a folder", ("how many " * 20).strip()))
    assert max(map(len, shown.splitlines())) <= 140
    nothing = {"rate": None, "ends": None}
    assert values(with_null_defaults(settings(Outer))) == {
        "run": None,
        "n": None,
        "inner": nothing,
        "free": nothing,
        "bare": None,
    }


def test_what_derives_from_a_field() -> None:
    assert (of_kind(Outer, "count"), of_kind(Outer, "weights", "count")) == (("n",), ("run", "n"))
    assert recorded(Outer) == ("run", "inner", "free", "bare")
    assert [*find(settings(Outer), "rate")] == ["inner.rate", "free.rate"]
    assert [*find(settings(Outer), "inner.rate")] == ["inner.rate"]
    first, second = settings(Outer)[:2], settings(Inner)
    assert [each.name for each in merged(second, first, settings(Outer))] == [
        "rate",
        "ends",
        "run",
        "n",
        "inner",
        "free",
        "bare",
    ]


REQUIRED = {
    "train": ["run=x", "data=y", "model={}", "objective={}"],
    "samplers": ["run=x"],
    "eval": ["metric=[kid]"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_tells_what_can_be_set(program: str) -> None:
    """Every setting at the top, every table of names, and each entry of it in words, in lines that fit; and
    an example of a sweep that works."""
    of, shown = PROGRAMS[program], help_page(program, [])
    assert shown.startswith(of.usage)
    for each in of.settings():
        assert re.search(rf"^{each.name}:", shown, re.MULTILINE)
        assert each.name in help_page(program, [each.name])
    for topic, table in of.choices().items():
        listed = help_page(program, [topic])
        assert all(re.search(rf"^  {re.escape(name)}\b", listed, re.MULTILINE) for name in table), topic
        described = {id(entry): describe("", entry).strip() for entry in table.values()}
        assert "" not in described.values()
        assert len({*described.values()}) == len(described)
        assert not re.search(r"0x[0-9a-f]{6}|\w\(\w+=", listed), topic
        assert max(map(len, listed.splitlines())) <= 110
    assert max(map(len, shown.splitlines())) <= 110
    assert not re.search(r"\n\n\n|\w-\n", shown)
    assert len(compose_sweep(program, [*REQUIRED[program], *shlex.split(of.sweep)])) == 4
    experiments = help_page(program, ["experiment"])
    assert "folder/mine.yaml" in experiments
    assert max(map(len, experiments.splitlines())) <= 110
    with pytest.raises(ValueError, match="no setting or choice named 'sampelr'") as error:
        help_page(program, ["sampelr"])
    known = str(error.value).partition("known: ")[2].split(", ")
    assert len({*known}) == len(known)


def test_programs_within_evaluation_have_pages_of_their_own() -> None:
    assert "outputs: null" in help_page("eval", ["statistics"])
    assert "out: ???" in help_page("eval", ["report"])
    assert compose("eval", ["experiment=statistics", "samples=x", "out=y"])["program"] == "statistics"
    assert compose("eval", ["samples=x"])["save_every"] == 300


def test_samplers_are_listed_with_order_and_options() -> None:
    listed = " ".join(help_page("samplers", ["sampler"]).split())
    assert "Heun (Karras et al. 2022, alg. 1)" in listed
    assert "Order 2. [coordinate=flow_time]" in listed


def test_defaults_are_those_of_the_dataclass() -> None:
    """Of training all; of drawing null, which is left to the way of drawing."""
    config = compose("train", REQUIRED["train"])
    assert config["train"] == values(settings(RunSettings))["train"]
    drawing = compose("samplers", ["run=x"])
    assert {value for name, value in drawing.items() if not isinstance(value, dict)} == {"x", None}


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As head is, behind a pipe."""
    process = subprocess.Popen(
        [sys.executable, "-m", "samplers", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize(
    ("program", "experiment", "words"),
    [
        ("train", "digits_unet", ("# A class-conditional UNet", "# to fine-tune")),
        ("eval", "bench_samplers", ("# What a solver costs", "# solvers that have a counterpart")),
        ("eval", "quickstart", ("# The report of", "# models whose forward process")),
    ],
)
def test_help_of_an_experiment(
    program: str,
    experiment: str,
    words: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it does, and the settings of its own program with its values, as YAML, and all comments."""
    monkeypatch.setattr(sys, "argv", [program, f"experiment={experiment}", "--help"])
    command_line(program, lambda config: 1)
    shown = capsys.readouterr().out
    assert shown.startswith(words[0])
    assert words[1] in shown
    written = _unresolved(program, [f"experiment={experiment}"])
    assert yaml.safe_load(shown) == {key: value for key, value in written.items() if key != "program"}


@pytest.fixture
def tab(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command changes in its process stays as it is."""
    monkeypatch.setattr(console, "end_on_interrupt", lambda: None)
    monkeypatch.setattr(console, "prefer_own", lambda: None)


@pytest.mark.usefixtures("tab")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("t", "train"),
        ("train experiment=digits_u", "experiment=digits_unet"),
        ("train experiment=digits_unet model='{a: b}' train.ste", "train.steps="),
        ("train experiment=digits_unet model.network.dr", "model.network.dropout="),
        ("train experiment=MINE model.network.wi", "model.network.width="),
        ("samplers prompt='a, (b' run=x sampler", "sampler="),
        ("eval ref", "reference="),
        ("eval experiment=bench_samplers s", "samplers. shape. steps="),
        ("models down", ""),
    ],
)
def test_tab_completes_settings_and_experiments(
    line: str,
    completed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hydra's own query, as the shell asks it: of the chosen experiment, and of a file of one's own."""
    (tmp_path / "mine.yaml").write_text("model: {network: {name: mine:Tiny, width: 8}}\n")
    monkeypatch.setattr(sys, "argv", ["plain-diffusion", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", f"plain-diffusion {line}".replace("MINE", str(tmp_path / "mine.yaml")))
    console.main()
    assert capsys.readouterr().out.strip() == completed


@pytest.mark.usefixtures("tab")
def test_the_shell_gets_a_script_for_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from `python -m plain_diffusion`; and --cfg job shows what an experiment comes to."""
    monkeypatch.setattr(sys, "argv", ["plain_diffusion/__main__.py", "-sc", "install=bash"])
    console.main()
    assert capsys.readouterr().out.strip().endswith("-F hydra_bash_completion plain-diffusion")
    monkeypatch.setattr(sys, "argv", ["train", "experiment=digits_unet", "--cfg", "job"])
    command_line("train", lambda config: 1)
    assert yaml.safe_load(capsys.readouterr().out) == compose("train", ["experiment=digits_unet"])
