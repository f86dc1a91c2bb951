"""The quickstart's last step on three models of a few steps each: everything that it writes, and what it refuses to begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import configs
from eval.digits import quickstart
from models.files.text import read_json
from train import run

SMALL = ("train.steps=4", "train.batch_size=16", "progress=false", "wandb=false")
UNET = ("model.network.channels=8", "model.network.groups=4", "model.network.head_dim=8")
DIT = ("model.network.hidden=16", "model.network.depth=1", "model.network.heads=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quickstart's own configuration over models that have seen four batches."""
    out = tmp_path_factory.mktemp("quickstart")
    for name, settings in (("unet", UNET), ("dit", DIT), ("consistency", (f"model.from={out / 'unet'}",))):
        assert run(configs.compose("train", [f"experiment=digits_{name}", f"run={out / name}", *SMALL, *settings]))
    found = configs.compose("eval", ["experiment=quickstart", f"out={out}", "n=60", "progress=false"])
    return {**found, "jobs": [{**job, "seeds": 1} for job in found["jobs"]]}


def test_report_scores_and_pictures(config: dict[str, Any]) -> None:
    """Every target is judged, and missed by such models; every job has its row and its picture; the report names them all."""
    assert not quickstart.run(config)
    out = Path(config["out"])
    found = read_json(out / "scores.json")
    assert len(found["targets"]) == 16
    rows = [score for score in found["scores"] if score["kind"] == "model"]
    assert len(rows) == 27 - 1 == len(list((out / "samples").glob("*.png")))
    assert all(0.5 < score["frechet"]["mean"] < 200 for score in rows)
    report = (out / "report.html").read_text()
    assert (out / "quality.png").stat().st_size > 10_000
    assert all(target["name"].replace("'", "&#39;") in report for target in found["targets"])


def test_a_row_that_a_target_needs_is_missed_before_the_work(config: dict[str, Any]) -> None:
    """Taking the guided rows out is refused at once, and nothing is written."""
    jobs = [job for job in config["jobs"] if "guidance" not in job]
    out = Path(config["out"]) / "elsewhere"
    with pytest.raises(ValueError, match="the targets need a row for DiT, flow, euler, 50 steps, guided: add it to jobs"):
        quickstart.run({**config, "jobs": jobs, "out": str(out)})
    assert not out.exists()
