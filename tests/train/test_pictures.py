"""Pictures that are drawn while a model is trained."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import models
from samplers.pictures import read_settings, save_png
from tests.composing import composed
from train.logbook import read_metrics
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
    monkeypatch.setattr(sys.modules["train.run"], "WandB", lambda *_: logger)
    assert run(composed("train", *DRAWN, "wandb=true", run=str(tmp_path)))
    assert logger.pictures == [(3, "step-0000003.png"), (4, "step-0000004.png")]


class Writer:
    """Stands in for TensorBoard's SummaryWriter: records its calls."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.calls.append(("open", folder, purge_step))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, value, step))

    def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
        self.calls.append((name, pixels.shape, step, dataformats))

    def close(self) -> None:
        self.calls.append(("close",))


def test_tensorboard_has_the_numbers_and_the_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of metrics.jsonl. A resumed run hides what was logged after its checkpoint."""
    monkeypatch.setattr(Writer, "calls", [])
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    settings = (*DRAWN, "train.log_every=2", "tensorboard=true")
    assert run(composed("train", *settings, run=str(tmp_path)))
    assert run(composed("train", *settings, "train.steps=6", "resume=true", run=str(tmp_path)))
    scalars = [call for call in Writer.calls if len(call) == 3 and call[0] != "open"]
    assert scalars == [
        (name, value, line["step"])
        for line in read_metrics(tmp_path / "metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    ]
    assert {"loss", "lr", "grad_norm"} <= {name for name, *_ in scalars}
    assert [step for name, _, step in scalars if name == "loss"] == [2, 4, 6]
    sheets = [call for call in Writer.calls if call[0] == "pictures"]
    assert sheets == [("pictures", (64, 712, 3), step, "HWC") for step in (3, 4, 6)]
    opened = [call for call in Writer.calls if call[0] in ("open", "close")]
    folder = str(tmp_path / "tensorboard")
    assert opened == [("open", folder, 2), ("close",), ("open", folder, 6), ("close",)]


def test_tensorboard_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named before anything is written."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match=r"^logs for TensorBoard need .* pip install 'plain-diffusion\[tensorboard\]'$"
    ):
        run(composed("train", *TINY, "tensorboard=true", run=str(tmp_path)))
    assert not list(tmp_path.iterdir())


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
