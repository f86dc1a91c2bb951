"""The README's code runs as it stands, and the files it names are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import models
from models.families import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS = ("diffusion", "models", "samplers", "train", "eval", "configs", "tests")


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in order, with small models where `make quickstart` leaves its DiT and where SDXL's file would lie; and fewer steps."""
    network = {"name": "dit", "in_channels": 1, "image_size": 8, "hidden": 16, "depth": 1, "heads": 2, "num_classes": 10}
    model = models.build({"network": network, "schedule": {"name": "flow"}, "prediction": "flow", "shape": [1, 8, 8]})
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    models.save(model, tmp_path / "runs" / "quickstart" / "dit" / "checkpoint.safetensors")
    models.save(models.miniature("sdxl"), tmp_path / "sd_xl_base_1.0.safetensors", layout="ldm")
    models.save(models.miniature("flux-dev"), tmp_path, layout="separate")
    for name, published in {"flux-dev": "flux1-dev", "vae": "ae"}.items():
        (tmp_path / f"{name}.safetensors").rename(tmp_path / f"{published}.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        block = block.replace('memory="6GB"', 'memory="60GB"')  # a process that has run other tests has more in memory than that
        exec(compile(re.sub(r"steps=(30|28)", "steps=1, height=128, width=128", block), "README.md", "exec"), names)
    assert names["images"].shape == (1, 3, 128, 128)
    assert (tmp_path / "sdxl" / "model_index.json").exists()
    assert names["x0"].shape == (10, 1, 8, 8)
    assert names["step"].x.shape == (10, 1, 8, 8)
    assert (names["step"].x - names["x0"]).abs().max() < 1e-5  # both blocks sample the same digits


def test_what_it_names_is_there() -> None:
    """No blank is left; pictures, and the files of the table of papers."""
    assert "@@" not in README
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:diffusion|models|samplers|train|eval|notebooks)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_what_contributing_names_is_there() -> None:
    """Of `file.py: NAME`, both."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in FOLDERS]
    named = re.findall(r"`([\w/]+\.py): (\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 5
    for place, name in named:
        found = [path for path in files if path.as_posix().endswith(f"/{place}")]
        assert any(re.search(rf"^(def |class )?{name}\b", path.read_text(), re.MULTILINE) for path in found), f"{place}: {name}"


def test_its_table_of_families_is_that_of_the_library() -> None:
    assert table() in README, "put what `plain-diffusion models families` prints into the README"
