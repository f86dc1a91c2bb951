"""The state of training between two steps, and its checkpoint: one file, which is replaced atomically.

It has no random states, since every step reseeds from (seed, micro-batch, step).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.messages import brief, one_line, warn
from models import EMA, Model
from models.files.text import strict
from models.layers.finite import is_finite
from models.layouts import native
from train.data.change import PACKED, describe_change
from train.world import World

PREVIOUS = "checkpoint.previous.safetensors"
ADDED_LATER = ("drop", "classes")  # parts of a model's description that earlier versions did not write
ADVICE = "lower train.learning_rate, or use bf16 or fp32"
MAX_SHOWN = 150  # characters of a setting in an error
MAX_LOST = 50  # steps in a row; after these, fp16's scale is 2^50 times smaller: every finite gradient fits


class Window:
    """Sums over the steps since the last logged line, on the device so that no step waits for them.

    taken     steps with a finite gradient; fp16 skips the others, which do not count for grad_norm
    replaced  samples that could not be read and were replaced by others
    lost      the latest steps in a row whose gradient fp16 lost: infinite, or 0 because its scale is too
              small; logging does not reset it
    """

    NAMES = ("steps", "loss", "grad_norm", "taken", "replaced", "lost")

    def __init__(self, device: torch.device, skips: bool) -> None:
        """skips: whether steps without a finite gradient are skipped."""
        self.skips = skips
        self.sums = torch.zeros(
            len(self.NAMES), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )

    def numbers(self, loss: Tensor, norm: Tensor, replaced: int, world: World) -> Tensor:
        """What to `add` for one step of all processes."""
        own = [loss.to(self.sums.dtype), norm.to(self.sums.dtype), torch.full_like(self.sums[0], replaced)]
        loss, norm, share = world.mean(torch.stack(own))
        finite = norm.isfinite()
        counted = torch.where(finite, norm, 0.0) if self.skips else norm
        lost = (~finite | (norm == 0)) if self.skips else torch.zeros_like(finite)
        return torch.stack(
            [torch.ones_like(loss), loss, counted, finite.to(loss), share * world.size, lost.to(loss)]
        )

    def add(self, numbers: Tensor) -> None:
        in_a_row = (self.sums[-1] + 1) * numbers[-1]
        self.sums += numbers
        self.sums[-1] = in_a_row

    def values(self) -> dict[str, float]:
        return dict(zip(self.NAMES, self.sums.tolist(), strict=True))

    def load(self, values: Mapping[str, float]) -> None:
        self.sums.copy_(torch.tensor([values.get(name, 0.0) for name in self.NAMES], dtype=torch.float64))

    def means(self) -> dict[str, float]:
        """The numbers to log: means over the steps, and counts above 0. Resets the sums."""
        now = self.values()
        self.sums[:-1] = 0
        numbers = {
            "loss": now["loss"] / now["steps"],
            "grad_norm": now["grad_norm"] / now["taken"] if now["taken"] else math.nan,
        }
        counts = {"skipped_steps": now["steps"] - now["taken"], "replaced_samples": now["replaced"]}
        return numbers | {name: round(count) for name, count in counts.items() if count}


@dataclass
class TrainState:
    """The model with its raw weights, their average, the optimiser, the loss scale, and step numbers.

    fell_back   whether it was loaded from the previous checkpoint, because the last one is damaged
    consistent  whether everything belongs to the same step; False during the update
    saving      whether it is being saved
    """

    model: Model
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    window: Window
    step: int = 0
    saved_step: int = 0
    fell_back: bool = False
    consistent: bool = True
    saving: bool = False

    def save(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write folder/checkpoint.safetensors atomically, with all parts of the model.

        The previous one is kept as checkpoint.previous.safetensors. `load` compares `settings`.
        FloatingPointError, before writing, if weights, average or optimiser are not finite.
        """
        optimizer = self.optimizer.state_dict()
        tensors = self.model.state_dict()
        tensors |= {f"ema.{name}": value for name, value in self.ema.average.items()}
        for index, state in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        if name := _find_nonfinite(tensors):
            raise FloatingPointError(
                f"after step {self.step} {name} holds values that are not finite: {ADVICE}; "
                f"{self.last_good(folder)}"
            )
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        progress = {
            "step": self.step,
            "ema_updates": self.ema.updates,
            "param_groups": optimizer["param_groups"],
            "scaler": self.scaler.state_dict(),
            "window": self.window.values(),
        }
        metadata = {**native.metadata_of(self.model), "progress": progress, "settings": strict(settings)}
        metadata["checksum"] = native.checksum(tensors, metadata)
        previous = None if self.fell_back else folder / PREVIOUS
        native.write(folder / native.FILE_NAME, tensors, metadata, previous)
        self.fell_back = False

    def load(self, folder: Path, settings: Mapping[str, Any], steps: int, leads: bool = True) -> None:
        """Continue from the folder's checkpoint. ValueError if its model or settings are others.

        If the last checkpoint is damaged, the previous one is loaded; the process that `leads` warns.
        """
        file, damage = find_checkpoint(folder)
        tensors, progress, changed = resume_point(folder, self.model, settings, steps)
        if leads and damage:
            warn(f"{damage}: going on from step {progress['step']}, of {file.name}")
        if leads and changed:
            warn(changed)
        self.model.network.load_state_dict(_with_prefix(tensors, "network."))
        self.ema.load(_with_prefix(tensors, "ema."), progress["ema_updates"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _with_prefix(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": progress["param_groups"]})
        self.scaler.load_state_dict(progress["scaler"])
        self.window.load(progress.get("window", {}))
        self.step = self.saved_step = progress["step"]
        self.fell_back = bool(damage)

    def check(self, folder: Path, done: bool) -> None:
        """FloatingPointError unless training can go on. fp16 may skip single steps."""
        now, fp16 = self.window.values(), self.scaler.is_enabled()
        loss, norm = now["loss"] / max(1, now["steps"]), now["grad_norm"] / max(1, now["taken"])
        if not math.isfinite(loss) or (now["taken"] < now["steps"] and not fp16):
            raise FloatingPointError(
                f"the loss is {loss:g} and its gradient's norm {norm:g} within the last steps up to "
                f"{self.step}: {ADVICE}; {self.last_good(folder)}"
            )
        if now["lost"] >= MAX_LOST or (done and now["lost"] >= self.step):
            raise FloatingPointError(
                f"the gradient was infinite or 0 in each of the last {now['lost']:.0f} steps up to "
                f"{self.step}, so fp16 trained nothing, though its scale came down to "
                f"{self.scaler.get_scale():g}: use bf16 or fp32; {self.last_good(folder)}"
            )

    def last_good(self, folder: Path) -> str:
        """Where the last good checkpoint is, for errors."""
        if not self.saved_step:
            return "nothing was saved yet"
        return f"the last good checkpoint, of step {self.saved_step}, is in {folder}"


def _find_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor of weights, average or optimiser that is not finite."""
    for name, value in tensors.items():
        if name.startswith(("network.", "ema.", "optimizer.")) and not is_finite(value):
            return name
    return None


def find_checkpoint(folder: Path) -> tuple[Path, str]:
    """The last good checkpoint of a run, and what is wrong with a later one, or "". ValueError if none."""
    damage = ""
    for file in (folder / native.FILE_NAME, folder / PREVIOUS):
        if not file.exists():
            damage = damage or f"{file} is gone"
            continue
        now = file.stat()
        problem = _find_damage(file, (now.st_ino, now.st_size, now.st_mtime_ns))
        if not problem:
            return file, damage
        damage = f"{damage}, and {file.name} is damaged too" if damage else problem
    raise ValueError(f"{damage}: no checkpoint is left to resume from, run=... starts anew in another folder")


@lru_cache
def _find_damage(file: Path, stamp: tuple[int, ...]) -> str:
    """What is wrong with a checkpoint, or "". Reads the whole file, once per process and `stamp`."""
    try:
        tensors, metadata = native.verify(file)
    except ValueError as error:
        return str(error)
    name = _find_nonfinite(tensors) if "progress" in metadata else None
    return f"{file} cannot be used: {name} holds values that are not finite" if name else ""


def resume_point(
    folder: Path, model: Model, settings: Mapping[str, Any], steps: int
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """A checkpoint's tensors and progress, and a warning, or "", if the continued run will differ.

    ValueError unless that model with those settings can go on from it to `steps`.
    """
    tensors, metadata = native.read(find_checkpoint(folder)[0])
    if "progress" not in metadata:
        raise ValueError(f"{folder} holds a model, but no training state to resume from")
    (parts, saved), (now, wanted) = (_split_parts(each) for each in (metadata["settings"], settings))
    # Earlier versions also described parts that the model lacks.
    before = native.without_missing(metadata["model"], {name.partition(".")[0] for name in tensors})
    spec = native.metadata_of(model)["model"].items()
    require_same(
        folder, before, {key: value for key, value in spec if key in before or key not in ADDED_LATER}
    )
    require_same(folder, saved, wanted)
    done = metadata["progress"]["step"]
    if done > steps:
        raise ValueError(f"{folder} has finished {done} steps: train.steps={steps} must be at least that")
    return tensors, metadata["progress"], _noise_warning(folder, parts, now)


def _split_parts(settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The number of parts of a batch, over all processes, and the other settings of a checkpoint."""
    rest = dict(settings)
    train = dict(rest.get("train", {}))
    parts = rest.pop("processes", 1) * train.pop("accumulate", 1)  # as earlier versions wrote it
    return rest.pop("parts", parts), {**rest, "train": train}


def _noise_warning(folder: Path, before: int, now: int) -> str:
    if before == now:
        return ""
    return (
        f"{folder} was trained with batches in {before} parts (processes x train.accumulate), and goes on "
        f"with {now}: the same images in the same order, with other noise than if it had never stopped"
    )


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _is_names(value: Any) -> bool:
    """Whether this is a list of texts, such as class names. An error names only the first that differs."""
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _short(value: Any) -> str:
    """A value, cut for an error that holds two of them."""
    return one_line(brief(value), MAX_SHOWN)


def require_same(folder: Path, saved: Any, wanted: Any, where: str = "") -> None:
    """ValueError that names the first setting that differs between a folder's run and the wanted one.

    Both are compared as JSON.
    """
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        if PACKED in saved and PACKED in wanted:
            try:
                change = describe_change(saved[PACKED], wanted[PACKED])
            except ValueError as error:
                raise ValueError(f"{folder} cannot be resumed: {error}") from None
            if change:
                raise ValueError(
                    f"{folder} was trained {one_line(change)}: use the same pictures to resume it, or "
                    "another run folder"
                )
        for key in sorted((saved.keys() | wanted.keys()) - {PACKED}):
            require_same(folder, saved.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    elif _is_names(saved) and _is_names(wanted):
        for i, (before, now) in enumerate(zip_longest(saved, wanted)):
            require_same(folder, before, now, f"{where}[{i}]")
    elif saved != (wanted := json.loads(json.dumps(strict(wanted), default=str))):
        raise ValueError(
            f"{folder} was trained with {where}={_short(saved)}, not {_short(wanted)}: "
            "use that to resume it, or another run folder to start anew"
        )
