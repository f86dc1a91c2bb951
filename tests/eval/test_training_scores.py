"""Scores while a model is trained: what is logged is what the finished run would be scored with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from configs import compose
from eval import scoring
from eval.features.registry import ExtractorParams, build
from eval.metrics.moments import Moments
from eval.statistics_file import Statistics, write_statistics
from eval.training import TrainingScores
from models.files.text import read_json_lines
from train.run import run

DRAWING: dict[str, Any] = {"n": 40, "steps": 2, "guidance": 1.5}
SETTINGS: dict[str, Any] = {"features": "digits", "reference": {"name": "digits", "split": "held_out"}}
TINY = ("channels=8", "channel_mult=[1]", "attention=[0]", "middle_attention=0", "head_dim=8", "groups=4")
TRAIN = [
    "experiment=digits_unet", *(f"model.network.{setting}" for setting in TINY), "train.steps=4",
    "train.batch_size=16",
    "train.evaluate_every=2", "wandb=false", "device=cpu", "progress=false",
]  # fmt: skip


def test_scores_are_logged_and_are_those_of_the_run(tmp_path: Path) -> None:
    """At every second step; the last ones equal, to the last bit, what python -m eval gives the finished run.
    Notes are warned of once."""
    folder = tmp_path / "run"
    scores = TrainingScores(metric=["frechet", "accuracy"], **DRAWING, **SETTINGS)
    assert run(compose("train", [*TRAIN, f"run={folder}"]), scores)
    logged = [line for line in read_json_lines(folder / "metrics.jsonl") if "frechet" in line]
    assert [line["step"] for line in logged] == [2, 4]
    assert logged[0]["frechet"] != logged[1]["frechet"]
    written = scoring.run(
        {
            "samples": {"run": str(folder), **DRAWING},
            "metric": ["frechet", "accuracy"],
            "out": str(tmp_path / "r.json"),
            **SETTINGS,
        }
    )
    assert written is not None
    figure = written.result.figures["frechet"]
    last = logged[1]
    assert (last["frechet"], last["frechet_low"], last["frechet_high"]) == (
        figure.value,
        figure.low,
        figure.high,
    )
    assert last["accuracy"] == written.result.figures["accuracy"].value
    digits = build("digits", ExtractorParams(), "clean", torch.float32)
    larger = Statistics(
        {"features": Moments.of(torch.randn(99, digits.widths["features"]))},
        99,
        digits.identity,
        "?",
        sizes=("16x16",),
    )
    write_statistics(larger, tmp_path / "larger.safetensors")
    scores = TrainingScores(
        n=40, metric="frechet", steps=2, features="digits", reference=str(tmp_path / "larger.safetensors")
    )
    model = models.load(folder)
    with pytest.warns(UserWarning, match="the samples are 8x8, the reference is 16x16: ") as said:
        assert scores(model) == scores(model)
    assert len(said) == 1


def test_what_does_not_fit_is_said_in_one_line() -> None:
    """Settings of neither, and metrics that there are none of, name the nearest."""
    with pytest.raises(
        ValueError, match=r"^no evaluate parameter named 'guidence'; did you mean 'guidance'\?$"
    ):
        TrainingScores(n=4, metric="frechet", guidence=2.0)
    with pytest.raises(ValueError, match=r"^no metric named 'frechett'; did you mean 'frechet'\?$"):
        TrainingScores(n=4, metric="frechett")
