"""Miniatures of the families, made once, and what layouts and peers make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models import Model
from models.families import ARCHITECTURES, FAMILIES
from models.presets import miniature

STRUCTURES = tuple(
    ARCHITECTURES
)  # one family of each structure: an architecture has the name of its plain one
FLOWS = tuple(name for name in STRUCTURES if FAMILIES[name].is_flow)
UNETS = tuple(name for name in STRUCTURES if name not in FLOWS)
SOME = (
    *STRUCTURES,
    *(
        of.name
        for of in FAMILIES.values()
        if of.prediction != FAMILIES[of.architecture.name].prediction or of.consistency
    ),
)

Files = Callable[[str], dict[str, Tensor]]  # the fixture `files`
Load = Callable[..., Model]  # the fixture `load`
Configured = Callable[..., Path]  # the fixture `configured`
SCHEDULER = "scheduler/scheduler_config.json"
SD_TABLE = {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000}
MARK = torch.tensor([])  # the value of keys that only mark a file


tiny = cache(miniature)  # that no test changes


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Names, dtypes and values, bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [
        key for key in ours if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])
    ]
    assert different == []


def whole(model: Model) -> dict[str, Tensor]:
    """The tensors of the parts that every layout holds."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("preview.")}


def used(model: Model) -> dict[str, Tensor]:
    """Those that diffusers' folders keep too: SD 2's tower without its last block and its projection, which
    it has no use for."""
    unused = ("text.towers.clip_h.blocks.2.", "text.towers.clip_h.projection.")
    return {key: value for key, value in whole(model).items() if not key.startswith(unused)}


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor under a file or a folder, with its file's place before its key."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return {
        f"{file.relative_to(path)}/{key}": value for file in files for key, value in load_file(file).items()
    }


def settings(model: Model) -> dict[str, Any]:
    """The description but for the preview, and for the size of samples, of which a miniature's file says
    nothing."""
    return {key: value for key, value in model.spec.items() if key not in ("preview", "shape")}


def notes(model: Model) -> str:
    assert model.report is not None
    return "; ".join(model.report.notes)
