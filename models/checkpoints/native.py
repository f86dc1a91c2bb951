"""This library's own file format: safetensors, with the description of what is inside as JSON in the metadata.

    network.*    the network's state dict
    ema.*        the averaged weights, where training kept them
    optimizer.*  and whatever else training needs to go on; readers that only sample skip it

Writing is atomic: a file of that name is the old one or the new one, whole, at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.files import replacing
from models.model import Model, Report, build

FILE_NAME = "checkpoint.safetensors"


def save(model: Model, path: str | Path) -> None:
    """Write a model to one file. Raises OSError where the place cannot be written."""
    write(path, {f"network.{name}": value for name, value in model.backbone.state_dict().items()}, {"model": model.spec})


def load(path: str | Path, *, ema: bool = True) -> Model:
    """Read a model from a file, or from a training run's folder; its network comes in evaluation mode.

    ema  take the averaged weights where the file has them; False takes the raw ones
    Raises FileNotFoundError, or ValueError for a file that is damaged, foreign, or does not fit its own description.
    """
    tensors, metadata = read(path)
    if not isinstance(metadata.get("model"), dict):
        raise ValueError(f"{path} does not say what model it holds: it was not written by models.save or by training")
    try:
        model = build(metadata["model"], device="meta")
    except ValueError as error:
        raise ValueError(f"{path} describes a model that cannot be built: {error}") from None
    average = _keys(tensors, "ema.") if ema else {}
    if average and (lost := [name for name, _ in model.backbone.named_parameters() if name not in average]):
        raise ValueError(f"{path} averages only some of its weights: it lacks ema.{lost[0]}")
    keys = _keys(tensors, "network.") | average
    # The average is kept in float32; the model has the dtype of its raw weights.
    state = {name: tensors[key].to(tensors.get(f"network.{name}", tensors[key]).dtype) for name, key in keys.items()}
    fit(model.backbone, state, path)
    model.backbone.eval()
    consumed = tuple(keys.values())
    ignored = sorted(tensors.keys() - set(consumed))
    if unknown := [key for key in ignored if not key.startswith(("network.", "ema.", "optimizer."))]:
        raise ValueError(
            f"{path} holds {unknown[0]}, which belongs to no part of a model: it was not written by models.save or by training"
        )
    model.report = Report(consumed, tuple(ignored))
    return model


def _keys(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """The network's name of each tensor under a prefix, and its key in the file."""
    return {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}


def fit(network: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give the network these tensors, without a copy. Every key must match in name and shape, or ValueError says which do not."""
    own = network.state_dict()
    missing, unknown = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own if k in state and own[k].shape != state[k].shape]
    kinds = [f"{k} is {state[k].dtype}" for k in own if k in state and state[k].is_floating_point() != own[k].is_floating_point()]
    problems = {"lacks": missing, "holds unknown": unknown, "is of another architecture:": shapes, "holds no weights:": kinds}
    for problem, found in problems.items():
        if found:
            raise ValueError(f"{source} {problem} {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else ""))
    network.load_state_dict(dict(state), assign=True)


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata atomically."""
    with replacing(path) as temporary:
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, {k: json.dumps(v) for k, v in metadata.items()})
        except SafetensorError as error:  # how the writer reports a full disk or a folder that it may not write to
            raise OSError(str(error)) from error


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors (memory-mapped) and the metadata of a file, or of the checkpoint in a run's folder."""
    path = Path(path)
    if path.is_dir():
        if not (path / FILE_NAME).exists():
            raise FileNotFoundError(f"no {FILE_NAME} in {path}: is it a training run's folder, and has it saved yet?")
        path = path / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118  (not a mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or not one of our safetensors files ({error})") from None
