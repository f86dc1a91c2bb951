"""Pictures that are drawn while a model is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import models
from samplers.pictures import read_settings, save_png
from tests.composing import composed
from train.run import run

SMALL = ("channels=8", "channel_mult=[1]", "attention=[0]", "middle_attention=0", "head_dim=8", "groups=4")
TINY = (
    "experiment=digits_unet", *(f"model.network.{setting}" for setting in SMALL), "train.steps=4",
    "train.warmup=2",
    "train.batch_size=16", "train.save_every=4", "wandb=false", "progress=false", "device=cpu",
)  # fmt: skip
DRAWN = (*TINY, "pictures.every=3", "pictures.steps=2")


def test_they_are_drawn_now_and_then_and_change_nothing(tmp_path: Path) -> None:
    """At every third step and the last: a column for each class; the weights are those of a training without
    pictures."""
    assert run(composed("train", *DRAWN, run=str(tmp_path / "with")))
    sheets = sorted((tmp_path / "with" / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-0000003.png", "step-0000004.png"]
    assert [read_settings(sheet)["step"] for sheet in sheets] == [3, 4]
    assert Image.open(sheets[0]).size == ((10 * 9 - 1) * 8, 8 * 8)
    assert (np.asarray(Image.open(sheets[0])) != np.asarray(Image.open(sheets[1]))).any()
    assert run(composed("train", *TINY, run=str(tmp_path / "without")))
    assert models.load(tmp_path / "with").fingerprint == models.load(tmp_path / "without").fingerprint


def test_the_same_when_a_run_goes_on(tmp_path: Path) -> None:
    """A longer run of the same folder draws on, and replaces the sheet of no other step."""
    assert run(composed("train", *DRAWN, run=str(tmp_path)))
    before = (tmp_path / "pictures" / "step-0000003.png").read_bytes()
    assert run(composed("train", *DRAWN, "train.steps=6", "resume=true", run=str(tmp_path)))
    assert sorted(sheet.name for sheet in (tmp_path / "pictures").iterdir())[-1] == "step-0000006.png"
    assert (tmp_path / "pictures" / "step-0000003.png").read_bytes() == before


class Shown:
    """A logger that takes pictures."""

    def __init__(self) -> None:
        self.pictures: list[tuple[int, str]] = []

    def log(self, step: int, values: Any) -> None: ...

    def close(self) -> None: ...

    def show(self, step: int, picture: Path) -> None:
        self.pictures.append((step, picture.name))


def test_loggers_are_given_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B and whoever else has `show`."""
    logger = Shown()
    monkeypatch.setattr(sys.modules["train.run"], "_loggers", lambda *_: [logger])
    assert run(composed("train", *DRAWN, run=str(tmp_path)))
    assert logger.pictures == [(3, "step-0000003.png"), (4, "step-0000004.png")]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pictures.sampler=eulr", "no sampler named 'eulr'; did you mean 'euler'"),
        ("pictures.prompts=[a cat]", "pictures.prompts are for models that take prompts"),
        ("pictures.every=-1", "pictures.every must not be negative"),
        ("pictures.n=0", "n must be at least 1"),
    ],
)
def test_mistakes_are_found_before_the_first_step(setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(composed("train", *DRAWN, setting, run=str(tmp_path)))
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_of_prompts(tmp_path: Path) -> None:
    """A text-to-image model that is trained further draws prompts, in columns."""
    models.save(models.miniature("sd1"), tmp_path / "sd1.safetensors", layout="ldm")
    (tmp_path / "data").mkdir()
    for i in range(2):
        save_png(
            torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)),
            tmp_path / "data" / f"{i}.png",
            low=0.0,
        )
        (tmp_path / "data" / f"{i}.txt").write_text("a cat")
    settings = (
        "experiment=finetune",
        "latents.size=64",
        "train.steps=1",
        "train.batch_size=2",
        "train.precision=fp32",
        "wandb=false",
    )
    drawing = (
        "pictures.every=1",
        "pictures.steps=1",
        "pictures.prompts=[a cat,a dog]",
        "pictures.n=4",
        "progress=false",
        "device=cpu",
    )
    places = {
        "weights": str(tmp_path / "sd1.safetensors"),
        "data": str(tmp_path / "data"),
        "run": str(tmp_path / "run"),
    }
    assert run(composed("train", *settings, *drawing, **places))
    assert Image.open(tmp_path / "run" / "pictures" / "step-0000001.png").size == (2 * 65 - 1, 2 * 65 - 1)
