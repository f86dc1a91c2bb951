"""Sampling a saved model: what is chosen where nothing is said, and where the pictures go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import models
from configs import compose
from samplers.pictures import tile
from samplers.run import run

NETWORK = {"name": "dit", "in_channels": 1, "image_size": 8, "hidden": 16, "depth": 1, "heads": 2, "num_classes": 10}
FLOW: dict[str, Any] = {"network": NETWORK, "schedule": {"name": "flow"}, "prediction": "flow", "shape": [1, 8, 8]}


def saved(path: Path, **parts: Any) -> Path:
    model = models.build({**FLOW, **parts})
    for p in model.backbone.parameters():
        nn.init.normal_(p, std=0.1)
    models.save(model, path)
    return path


def settings(path: Path, *overrides: str) -> dict[str, Any]:
    return compose("samplers", [f"run={path}", "n=3", "progress=false", "device=cpu", *overrides])


@pytest.mark.parametrize(
    ("parts", "sampler", "steps"), [({}, "ddim", 50), ({"consistency": {"name": "cm", "ratio_min": 0.002}}, "consistency", 2)]
)
def test_a_model_is_sampled_as_it_is_meant_to_be(parts: dict[str, Any], sampler: str, steps: int, tmp_path: Path) -> None:
    """A distilled model takes two consistency steps, others fifty of DDIM; what was chosen stands in the images' settings."""
    paths = run(settings(saved(tmp_path / "model.safetensors", **parts)))
    assert [path.relative_to(tmp_path) for path in paths] == [Path(f"samples/images/{k}/{k:06d}.png") for k in range(3)]
    kept = json.loads((tmp_path / "samples" / "samples.json").read_text())["settings"]
    assert (kept["sampler"], kept["steps"]) == (sampler, steps)


def test_the_model_s_grid_is_used_unless_another_spacing_is_named(tmp_path: Path) -> None:
    """Images on the model's own grid are those of the same spacing by name, and others than the default spacing gives."""
    own, plain = (
        saved(tmp_path / "own.safetensors", grid={"spacing": "log_snr", "t_start": 0.9, "t_end": 0.1}),
        tmp_path / "plain.safetensors",
    )
    model = models.load(own)
    model.spec["grid"] = {}
    models.save(model, plain)
    images = []
    for i, (path, spacing) in enumerate(
        [(own, "spacing=null"), (own, "spacing=linspace"), (plain, "spacing=linspace"), (plain, "spacing=null")]
    ):
        first, *_ = run(settings(path, "steps=3", f"out={tmp_path / str(i)}", spacing))
        with Image.open(first) as image:
            images.append(image.tobytes())
    assert images[0] != images[1] == images[2] == images[3]


def test_tiles_lie_row_by_row() -> None:
    """Each image at its place, `fill` between them and where they run out, none around them."""
    images = torch.arange(5.0)[:, None, None, None].expand(5, 2, 2, 3) / 10
    sheet = tile(images, columns=2, gap=2, fill=-1)
    assert sheet.shape == (2, 3 * 2 + 2 * 2, 2 * 3 + 2)
    for i in range(5):
        top, left = i // 2 * 4, i % 2 * 5
        assert (sheet[:, top : top + 2, left : left + 3] == i / 10).all()
    assert int((sheet == -1).sum()) == sheet.numel() - images.numel()
    assert tile(images, columns=9).shape == (2, 2, 5 * 3 + 4)
    assert tile(images, columns=2, gap=0).shape == (2, 6, 6)
    with pytest.raises(ValueError, match="at least one column"):
        tile(images[:0], 2)
