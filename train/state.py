"""All that training must remember between two steps, and how it is written and read back: one file, whole at any moment.

The random state is not part of it: every step reseeds from (seed, rank, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import EMA, Model
from models.checkpoints import native


@dataclass
class TrainState:
    """The model with its raw weights, their average, the optimiser, the loss scale, and the numbers of finished and of saved steps."""

    model: Model
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    saved: int = 0

    def save(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write folder/checkpoint.safetensors atomically, with all parts of the model, so that it can be used without any other file.

        `settings` are kept for `load` to compare.
        """
        optimizer = self.optimizer.state_dict()
        tensors = self.model.state_dict()
        tensors |= {f"ema.{name}": value for name, value in self.ema.average.items()}
        for index, state in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        progress = {"step": self.step, "ema_updates": self.ema.updates, "param_groups": optimizer["param_groups"]}
        metadata = {"model": self.model.spec, "progress": {**progress, "scaler": self.scaler.state_dict()}, "settings": dict(settings)}
        native.write(folder / native.FILE_NAME, tensors, metadata)
        self.saved = self.step

    def load(self, folder: Path, settings: Mapping[str, Any], steps: int) -> None:
        """Continue from the folder's checkpoint, up to `steps`. ValueError where it belongs to another model or to other settings."""
        tensors, progress = resume_point(folder, self.model.spec, settings, steps)
        self.model.network.load_state_dict(_part(tensors, "network."))
        self.ema.load(_part(tensors, "ema."), progress["ema_updates"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": progress["param_groups"]})
        self.scaler.load_state_dict(progress["scaler"])
        self.step = self.saved = progress["step"]


def is_begun(folder: Path, resume: bool) -> bool:
    """Whether the folder holds a checkpoint. ValueError where it does and is not to be resumed."""
    begun = (folder / native.FILE_NAME).exists()
    if begun and not resume:
        raise ValueError(f"{folder} already holds a trained run: resume=true goes on with it, run=... starts another")
    return begun


def resume_point(
    folder: Path, spec: Mapping[str, Any], settings: Mapping[str, Any], steps: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and progress, if that model with those settings can go on from it to `steps`; else ValueError."""
    tensors, metadata = native.read(folder)
    if "progress" not in metadata:
        raise ValueError(f"{folder} holds a model, but no training state to resume from")
    for saved, given in ((metadata["model"], spec), (metadata["settings"], settings)):
        require_same(folder, saved, given)
    done = metadata["progress"]["step"]
    if done > steps:
        raise ValueError(f"{folder} has finished {done} steps, more than train.steps={steps}: ask for at least as many")
    return tensors, metadata["progress"]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def require_same(folder: Path, saved: Any, given: Any, where: str = "") -> None:
    """ValueError at the first setting in which a folder's run differs from what is asked for, as JSON holds it."""
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        for key in sorted(saved.keys() | given.keys()):
            require_same(folder, saved.get(key), given.get(key), f"{where}.{key}" if where else key)
    elif saved != (given := json.loads(json.dumps(given, default=str))):
        raise ValueError(
            f"{folder} was trained with {where}={saved}, not {given}: use that to resume it, or another run folder to start anew"
        )
