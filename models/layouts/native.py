"""This library's own file format: safetensors with a description of the model as JSON in the metadata.

    network.*    the network's state dict; vae.*, text.*, preview.* those of the other parts
    ema.*        averaged weights from training
    optimizer.*  the state of the training, which sampling ignores

Writing is atomic: at any moment the file is the complete old one or the complete new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion import outside
from diffusion.messages import brief, one_line
from diffusion.spec import check_mapping, check_names
from models.files.blank import BlankWithin
from models.files.prefixes import without_wrappers
from models.files.stored import TensorFile
from models.files.table import Layout, Part, check_dtype, supplies
from models.files.tensors import open_tensors
from models.files.text import parse_json, parse_strict_json, sha256_of_tensors
from models.files.writing import replacing
from models.layouts.parts import AVERAGED, RAW
from models.model import FOLDERS, PARTS, Model, Report, build, families
from models.text.encoder import TextEncoder

FILE_NAME = "checkpoint.safetensors"
LAYOUT = Layout("native", {})
TOKENIZERS = "tokenizers"  # in the metadata, by text encoder
NETWORKS = ("network", *PARTS)  # the entries of a description that decide which tensors there are
MAX_SETTING = 4096  # for settings that no tensor shows: the rows of a text, T5's distances


def save(model: Model, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model to one file, in its own dtypes or in this one. OSError if the path cannot be written."""
    tensors = {key: value.to(dtype or value.dtype) for key, value in model.state_dict().items()}
    write(path, tensors, metadata_of(model))


def metadata_of(model: Model) -> dict[str, Any]:
    """The metadata of a model's file: the description of its parts, and the tokenizers."""
    parts = [FOLDERS.get(part, part) for part in model.parts]
    metadata: dict[str, Any] = {"model": without_missing(model.spec, parts)}
    if model.text is not None and (tokenizers := model.text.tokenizers):
        metadata[TOKENIZERS] = {name: tokenizer.describe() for name, tokenizer in tokenizers.items()}
    return metadata


def without_missing(spec: Mapping[str, Any], parts: Collection[str]) -> dict[str, Any]:
    """A description without the parts that are not among these (by the names of their tensors in files)."""
    return {key: value for key, value in spec.items() if key not in NETWORKS or key in parts}


def is_native(path: Path, file: TensorFile | None) -> bool:
    """Whether a path is a training run's folder, or the file there describes the model in it."""
    return (path / FILE_NAME).exists() if file is None else file.metadata.get("model", "").startswith("{")


def load(
    path: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    network: type[nn.Module] | None = None,
    trust: bool = False,
) -> Model:
    """A model from a file of ours or a training run's folder. Arguments as in `models.load`.

    Raises FileNotFoundError, or ValueError for a file that is damaged, foreign, or does not fit its own
    description.
    """
    check_dtype(dtype, (*PARTS, "backbone"))
    file, metadata = _open(path)
    not_ours = "it was not written by models.save or by training"
    if not isinstance(spec := metadata.get("model"), dict):
        raise ValueError(f"{path} does not say what model it holds: {not_ours}")
    model = _build(path, spec, list(file.shapes.values()), network, trust)
    consumed: list[str] = []
    prefixes = {name: f"{FOLDERS.get(name, name)}." for name in model.parts}
    for name, module in model.parts.items():
        keys = raw = _keys(file, prefixes[name])
        if ema and name == "backbone" and (average := _keys(file, "ema.")):
            if missing := [key for key, _ in module.named_parameters() if key not in average]:
                raise ValueError(f"{path} averages only some of its weights: it lacks ema.{missing[0]}")
            keys = raw | average
        stored = {ours: file.tensors[key] for ours, key in keys.items()}
        part = Part(name, name, None, LAYOUT, file, stored, prefixes[name])
        supply = supplies(part, module.state_dict(), torch.float32)
        own = dtype.get(name) if isinstance(dtype, Mapping) else dtype
        # The average is stored in float32, but loaded in the dtype of the raw weights.
        dtypes = {ours: own or file.tensors[raw.get(ours, key)].dtype for ours, key in keys.items()}
        state = {ours: replace(each, dtype=dtypes[ours]).take() for ours, each in supply.items()}
        module.load_state_dict(state, assign=True)
        module.eval()
        consumed += keys.values()
    ignored: dict[str, str] = {}
    for key in sorted(file.tensors.keys() - set(consumed)):
        if not key.startswith((*prefixes.values(), "ema.", "optimizer.")):
            raise ValueError(f"{path} holds {key}, which belongs to no part of a model: {not_ours}")
        reason = "state of the training" if key.startswith("optimizer.") else AVERAGED if ema else RAW
        ignored[file.tensors[key].key] = reason
    if model.text is not None:
        try:
            _set_tokenizers(model.text, metadata)
        except ValueError as error:
            raise ValueError(f"{path}: its tokenizers cannot be used: {one_line(error)}") from None
    in_file = tuple(file.tensors[key].key for key in consumed)
    model.report = Report(in_file, ignored, files=dict.fromkeys(model.parts, str(path)))
    return model


def _build(
    path: str | Path,
    spec: Mapping[str, Any],
    shapes: Sequence[tuple[int, ...]],
    network: type[nn.Module] | None,
    trust: bool,
) -> Model:
    """The model of a file's description, on the meta device, if the file has enough tensors for it."""
    try:
        _allow_outside_names(spec, network, trust)
        largest = max(MAX_SETTING, len(shapes), *(size for shape in shapes for size in shape))
        _check_numbers("", {key: value for key, value in spec.items() if key in NETWORKS}, largest)
        with BlankWithin(shapes):
            return build(spec, device="meta")
    except ValueError as error:
        raise ValueError(f"{path} describes a model that cannot be built: {one_line(error)}") from None


def _allow_outside_names(spec: Mapping[str, Any], network: type[nn.Module] | None, trust: bool) -> None:
    """Let the network's name mean this class, or allow all names. ValueError for an unnecessary class."""
    name = check_mapping("network", spec.get("network", {})).get("name")
    if network is not None:
        if not isinstance(name, str) or name in families().NETWORKS:
            raise ValueError(f"its network is {brief(name)}, of this library: leave network=... out")
        outside.provide("network", network, name)
    if trust:
        outside.trust(spec)


def _set_tokenizers(text: TextEncoder, metadata: Mapping[str, Any]) -> None:
    """Set the tokenizers in the metadata. ValueError if damaged, or for other text encoders."""
    descriptions = check_mapping(TOKENIZERS, metadata.get(TOKENIZERS, {}))
    readers = text.params.readers
    check_names("text encoder", descriptions, readers)
    text.tokenizers = {name: readers[name].open_tokenizer(each) for name, each in descriptions.items()}
    text.check()


def _check_numbers(name: str, value: Any, largest: int) -> None:
    """ValueError for an integer in the parameters of networks that exceeds `largest`."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(f"{name}.{key}".strip("."), inner, largest)
    elif isinstance(value, int) and value > largest and not name.endswith(".pad"):  # pad is a token's number
        raise ValueError(f"{name} can be at most {largest:,} for the tensors in the file, not {value:,}")


def _keys(file: TensorFile, prefix: str) -> dict[str, str]:
    """The network's name of each tensor under a prefix, and its key in the file."""
    return {key.removeprefix(prefix): key for key in file.tensors if key.startswith(prefix)}


def write(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Write tensors and JSON metadata atomically. previous: the path to which a replaced file is moved."""
    write_tensors(path, tensors, {key: as_text(key, value) for key, value in metadata.items()}, previous)


def as_text(key: str, value: Any) -> str:
    """An entry of the metadata as strict JSON. ValueError for numbers that are not finite."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        infinite = f"the description of this {key} holds a number that is not finite"
        raise ValueError(f"{infinite}, which files cannot hold: remove it") from None


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], previous: Path | None = None
) -> None:
    """Write tensors and text metadata atomically; `previous` as in `write`."""
    contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
    with replacing(path, previous) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata))
        except SafetensorError as error:  # for a full disk or a folder without permission
            raise OSError(str(error)) from error


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors on the host, and of the metadata."""
    digests = sha256_of_tensors(
        {name: partial(Tensor.detach, value) for name, value in sorted(tensors.items())}
    )
    lines = []
    for name, digest in digests.items():
        lines.append(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {digest}\n")
    lines.append(json.dumps(json.loads(json.dumps(metadata)), sort_keys=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `read`, without the checksum. Reads all tensors: ValueError if they do not match the checksum."""
    tensors, metadata = read(path)
    expected = metadata.pop("checksum", None)
    required = "window" in metadata.get("progress", {})  # checkpoints of earlier versions have neither
    if (required or expected is not None) and checksum(tensors, metadata) != expected:
        raise ValueError(f"{path} is damaged: its contents do not match its checksum")
    return tensors, metadata


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors (memory-mapped) and the metadata of a file, or of the checkpoint in a run's folder."""
    file, metadata = _open(path)
    return {key: stored.mapped() for key, stored in file.tensors.items()}, metadata


def _open(path: str | Path) -> tuple[TensorFile, dict[str, Any]]:
    path = Path(path)
    if path.is_dir():
        if not (path / FILE_NAME).exists():
            asks = "is it a training run's folder, and has it saved yet?"
            raise FileNotFoundError(f"no {FILE_NAME} in {path}: {asks}")
        path = path / FILE_NAME
    file = without_wrappers(open_tensors(path))  # training may have saved a compiled network
    metadata: dict[str, Any] = {}
    for key, text in file.metadata.items():
        try:
            if key != "format":
                metadata[key] = parse_strict_json(text) if key == "model" else parse_json(text)
        except ValueError as error:
            reason = one_line(error)
            raise ValueError(f"{path} is damaged or not one of our safetensors files ({reason})") from None
    return file, metadata
