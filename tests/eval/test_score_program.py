"""`python -m eval samples=... reference=... metric=[...]` as a user runs it: what it writes and says, alone,
in sweeps, by torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import compose
from eval import scoring
from eval.features.inception import random_inception
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score, shuffled_splits
from eval.metrics.kernel import kernel_distance
from eval.metrics.manifold import precision_recall
from eval.metrics.moments import Moments
from tests.eval.test_scoring import crops, inception, write
from tests.forking import ENVIRONMENT, Command, forking
from train.data.folder import FolderPictures

QUIET = ("device=cpu", "progress=false")
SMALL = """from eval.features.registry import EXTRACTORS
from tests.eval.small_inception import KNOWN
import configs, eval.report, hydra, os

EXTRACTORS["inception"] = KNOWN
os.environ["WANDB_MODE"] = "offline"
"""
PROGRAM = f"""import runpy, sys
{SMALL}
sys.argv[0] = "eval"
runpy.run_module("eval", run_name="__main__")
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs `python -m eval` with the small network of these tests in Inception's place."""
    with forking(tmp_path_factory.mktemp("said"), SMALL) as run:
        yield partial(run, "eval")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with pictures in a/, b/ and real/."""
    write(crops(12, side=20), tmp_path / "a")
    write(crops(12, seed=2, side=20), tmp_path / "b")
    write(crops(14, seed=1, side=20), tmp_path / "real")
    return tmp_path


def started(folder: Path, *arguments: str, together: bool = False) -> subprocess.CompletedProcess[str]:
    """A process of its own, from there; `together`: what it says on stderr comes in stdout, as a terminal
    shows it."""
    root = str(Path(__file__).parents[2])
    streams = subprocess.STDOUT if together else subprocess.PIPE
    environment = {**ENVIRONMENT, "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=streams,
        text=True,
    )


def figures(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["figures"]
    return found


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_command_scores_a_folder_against_a_folder(place: Path) -> None:
    """By Inception's network itself, with random weights: figures by hand from its features, printed with
    their intervals; the file says what they rest on, and the notes that they mean nothing.
    """
    metrics = ["fid", "kid", "inception_score", "precision", "recall"]
    settings = [
        "samples=a",
        "reference=real",
        f"metric=[{','.join(metrics)}]",
        "extractors.inception=random",
        "batch_size=2",
        "groups=5",
    ]
    said = started(place, "-m", "eval", *settings, *QUIET)
    assert (said.returncode, said.stderr) == (0, "")
    content = json.loads((place / "a.scores.json").read_text())
    found = content["figures"]
    assert said.stdout.splitlines() == [
        *(
            f"{name:18s} {figure['value']:.5g}   {figure['low']:.5g} to {figure['high']:.5g}"
            for name, figure in found.items()
        ),
        "note: inception-2015-12-05 has random weights: its numbers mean nothing outside a trial",
        "note: under clean, fid is usually of 50,000 samples; these are 12",
        f"result: {place / 'a.scores.json'}",
    ]  # fmt: skip
    network = random_inception("clean")
    sides = []
    for side in ("a", "real"):
        source = FolderPictures(place / side)
        batches = [list(source.read([i, i + 1])) for i in range(0, len(source), 2)]
        rows = [network(batch, ["pool", "logits_unbiased"]) for batch in batches]
        sides.append({name: torch.cat([row[name] for row in rows]) for name in ("pool", "logits_unbiased")})
    ours, theirs = (side["pool"] for side in sides)
    assert found["fid"]["value"] == pytest.approx(
        frechet_distance(Moments.of(ours), Moments.of(theirs)), rel=1e-6
    )
    assert found["kid"]["value"] == pytest.approx(kernel_distance(ours, theirs).value, rel=1e-5)
    by_hand = inception_score(sides[0]["logits_unbiased"], shuffled_splits(12))
    assert found["inception_score"]["value"] == pytest.approx(by_hand.value, rel=1e-6)
    assert (found["precision"]["value"], found["recall"]["value"]) == tuple(precision_recall(ours, theirs))
    assert found["fid"]["basis"]["extractor"] == network.identity.to_json()
    assert found["fid"]["basis"]["protocol"] == content["settings"]["protocol"] == "clean"


def test_a_sweep_goes_on_after_a_failure(place: Path, small: Command) -> None:
    """Its error comes before the next run begins, the status is 1, results and report are there; again, only
    what failed is run."""
    sweep = ["-m", "samples=a,c,b", "reference=real", "metric=[fid,kid]", "report=report", *QUIET]
    (place / "small.py").write_text(PROGRAM)
    first = started(place, "small.py", *sweep, together=True)
    assert first.returncode == 1
    error = "error: samples=c: no such folder of pictures: c\n"
    assert error in first.stdout
    assert (
        first.stdout.index("[2/3] samples=c")
        < first.stdout.index(error)
        < first.stdout.index("[3/3] samples=b")
    )
    assert first.stdout.endswith("1 of 3 runs failed; called again, finished runs are not repeated\n")
    results = left(place / "report" / "results")
    assert [(name[0], Path(name).suffix) for name in results] == [
        ("a", ".json"),
        ("a", ".png"),
        ("b", ".json"),
        ("b", ".png"),
    ]
    assert left(place / "report") == ["report.html", "results", "results.md"]
    before = {name: (place / "report" / "results" / name).stat().st_mtime_ns for name in results}

    write(crops(12, seed=3, side=20), place / "c")
    status, out, error = small(*sweep, here=place)
    assert (status, error) == (0, "")
    assert out.count("result, which existed already: ") == 2
    assert {name: (place / "report" / "results" / name).stat().st_mtime_ns for name in results} == before
    assert len(left(place / "report" / "results")) == 6
    assert all(f"\n| {name} " in (place / "report" / "results.md").read_text() for name in "abc")


def test_a_sweep_of_failures_says_each(place: Path, small: Command) -> None:
    """There is no report of nothing."""
    status, out, error = small("-m", "samples=c,d", "reference=real", "report=report", *QUIET, here=place)
    assert (status, out.count("failed after")) == (1, 2)
    assert error.splitlines() == [
        "error: samples=c: no such folder of pictures: c", "error: samples=d: no such folder of pictures: d",
        "failed: samples=c",
        "failed: samples=d", "error: 2 of 2 runs failed; called again, finished runs are not repeated",
    ]  # fmt: skip


def test_one_run_writes_the_report_too(place: Path, small: Command) -> None:
    """With report=FOLDER its row and the page are there."""
    status, out, _ = small("samples=a", "reference=real", "metric=fid", "report=alone", *QUIET, here=place)
    assert (status, left(place / "alone")) == (0, ["report.html", "results", "results.md"])
    assert out.endswith(f"report: {(place / 'alone' / 'report.html').resolve()}\n")


@pytest.mark.usefixtures("inception")
def test_python_does_what_the_command_line_does(
    place: Path, small: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compose and run give the figures and settings of the command; a typo names the nearest setting."""
    settings = ["samples=a", "reference=real", "metric=[fid,kid,precision]", "n=10", *QUIET]
    status, _, error = small(*settings, "out=command.json", here=place)
    assert (status, error) == (0, "")
    monkeypatch.chdir(place)
    written = scoring.run(compose("eval", [*settings, "out=python.json"]))
    assert written is not None
    command, python = (json.loads((place / name).read_text()) for name in ("command.json", "python.json"))
    assert command["figures"] == python["figures"]
    assert command["settings"] | {"out": ""} == python["settings"] | {"out": ""}
    with pytest.raises(ValueError, match="no setting named 'refrence'; did you mean 'reference'"):
        compose("eval", ["samples=a", "refrence=real"])


def test_statistics_are_computed_once(place: Path, small: Command) -> None:
    """By an experiment of their own, and stand for their pictures from then on."""
    status, out, error = small(
        "experiment=statistics", "samples=real", "out=stats/real.safetensors", *QUIET, here=place
    )
    assert (status, out, error) == (0, f"statistics: {place}/stats/real.safetensors\n", "")
    assert left(place / "stats") == ["real.safetensors"]
    settings = ["samples=a", "metric=fid", "out=fid.json", *QUIET]
    lines = [
        small(f"reference={one}", *settings, here=place)[1] for one in ("real", "stats/real.safetensors")
    ]
    assert lines[0] == lines[1]


@pytest.mark.loopback
def test_two_processes_find_the_same_bits(place: Path, small: Command) -> None:
    """torchrun gives the figures of one process, says them once, and leaves no work behind, what one process
    had begun included."""
    settings = ["samples=a", "reference=real", "metric=[fid,kid,precision]", "groups=5", *QUIET]
    (place / "small.py").write_text(PROGRAM)
    status, out, error = small(*settings, "out=one.json", here=place)
    assert (status, error) == (0, "")
    (place / ".two.samples.safetensors").write_bytes(b"of one process")
    two = started(
        place,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "small.py",
        *settings,
        "out=two.json",
    )
    assert two.returncode == 0, two.stderr
    assert figures(place / "two.json") == figures(place / "one.json")
    assert two.stdout == out.replace("one.json", "two.json")
    contents = [
        json.loads((place / name).read_text())["samples"]["sha256"] for name in ("one.json", "two.json")
    ]
    assert contents[0] == contents[1]
    assert left(place) == ["a", "b", "one.json", "real", "small.py", "two.json"]


def test_results_go_to_weights_and_biases(place: Path, small: Command) -> None:
    """In silence and, offline, into a folder beside the result."""
    status, _, error = small("samples=a", "reference=real", "metric=fid", "wandb=trials", *QUIET, here=place)
    assert (status, error) == (0, "")
    assert list(place.glob("a.scores/wandb/offline-run-*/*.wandb"))


__all__ = ["inception"]  # a fixture
