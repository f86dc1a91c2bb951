"""This library's own file format: safetensors, with the description of what is inside as JSON in the
metadata.

    network.*    the network's state dict; vae.*, text.*, preview.* those of the other parts
    ema.*        the averaged weights, where training kept them
    optimizer.*  and whatever else training needs to go on; readers that only sample skip it

Writing is atomic: a file of that name is the old one or the new one, whole, at any moment.
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
from models.files.prefixes import unwrapped
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
MAX_SETTING = 4096  # of a setting that no tensor shows: the rows of a text, T5's distances


def save(model: Model, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model to one file, in its own dtypes or in one. Raises OSError where the place cannot be
    written."""
    tensors = {key: value.to(dtype or value.dtype) for key, value in model.state_dict().items()}
    write(path, tensors, about(model))


def about(model: Model) -> dict[str, Any]:
    """The metadata of a model's file: the description of its parts, and the tokenizers."""
    metadata: dict[str, Any] = {
        "model": without_missing(model.spec, [FOLDERS.get(part, part) for part in model.parts])
    }
    if model.text is not None and model.text.tokenizers:
        metadata[TOKENIZERS] = {
            name: tokenizer.describe() for name, tokenizer in model.text.tokenizers.items()
        }
    return metadata


def without_missing(spec: Mapping[str, Any], there: Collection[str]) -> dict[str, Any]:
    """A description of a model of which only some parts are there, by the names of their tensors in a
    file."""
    return {key: value for key, value in spec.items() if key not in NETWORKS or key in there}


def is_native(path: Path, file: TensorFile | None) -> bool:
    """Whether a path is a training run's folder, or `file`, what it holds, describes the model in it."""
    return (path / FILE_NAME).exists() if file is None else file.metadata.get("model", "").startswith("{")


def load(
    path: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    network: type[nn.Module] | None = None,
    trust: bool = False,
) -> Model:
    """Read a model from a file of ours, or from a training run's folder; its networks come in evaluation
    mode.

    ema    take the averaged weights where the file has them; False takes the raw ones
    dtype  of the weights: None as in the file, one for all, or by part
    network, trust  for a network that is not in models.NETWORKS: its class, or leave to import what the file
                    names (see `models.load`)
    Raises FileNotFoundError, or ValueError for a file that is damaged, foreign, or does not fit its own
    description.
    """
    check_dtype(dtype, (*PARTS, "backbone"))
    file, metadata = _open(path)
    if not isinstance(metadata.get("model"), dict):
        raise ValueError(
            f"{path} does not say what model it holds: it was not written by models.save or by training"
        )
    shapes = list(file.shapes.values())
    try:
        spec = metadata["model"]
        _find_outside_network(spec, network, trust)
        _check_numbers("", {key: value for key, value in spec.items() if key in NETWORKS}, _largest(shapes))
        with BlankWithin(shapes):
            model = build(spec, device="meta")
    except ValueError as error:
        raise ValueError(f"{path} describes a model that cannot be built: {one_line(error)}") from None
    consumed: list[str] = []
    prefixes = {name: f"{FOLDERS.get(name, name)}." for name in model.parts}
    for name, module in model.parts.items():
        keys = raw = _keys(file, prefixes[name])
        if ema and name == "backbone" and (average := _keys(file, "ema.")):
            if lost := [key for key, _ in module.named_parameters() if key not in average]:
                raise ValueError(f"{path} averages only some of its weights: it lacks ema.{lost[0]}")
            keys = raw | average
        part = Part(
            name,
            name,
            None,
            LAYOUT,
            file,
            {ours: file.tensors[key] for ours, key in keys.items()},
            prefixes[name],
        )
        supply = supplies(part, module.state_dict(), torch.float32)
        wanted = dtype.get(name) if isinstance(dtype, Mapping) else dtype
        # The average is kept in float32; the model has the dtype of its raw weights.
        dtypes = {ours: wanted or file.tensors[raw.get(ours, key)].dtype for ours, key in keys.items()}
        module.load_state_dict(
            {ours: replace(each, dtype=dtypes[ours]).take() for ours, each in supply.items()}, assign=True
        )
        module.eval()
        consumed += keys.values()
    known = tuple(prefixes.values())
    ignored: dict[str, str] = {}
    for key in sorted(file.tensors.keys() - set(consumed)):
        if not key.startswith((*known, "ema.", "optimizer.")):
            raise ValueError(
                f"{path} holds {key}, which belongs to no part of a model: it was not written by "
                "models.save or by training"
            )
        ignored[key] = "training's own" if key.startswith("optimizer.") else AVERAGED if ema else RAW
    if model.text is not None:
        try:
            _give_tokenizers(model.text, metadata)
        except ValueError as error:
            raise ValueError(f"{path}: its tokenizers cannot be used: {one_line(error)}") from None
    in_file = {key: stored.key for key, stored in file.tensors.items()}
    ignored = {in_file[key]: why for key, why in ignored.items()}
    model.report = Report(
        tuple(in_file[key] for key in consumed), ignored, files=dict.fromkeys(model.parts, str(path))
    )
    return model


def _find_outside_network(spec: Mapping[str, Any], network: type[nn.Module] | None, trust: bool) -> None:
    """Let the name of the network stand for this class; or trust all names of the description. ValueError for
    a class without need."""
    name = check_mapping("network", spec.get("network", {})).get("name")
    if network is not None and (not isinstance(name, str) or name in families().NETWORKS):
        raise ValueError(f"its network is {brief(name)}, of this library: leave network=... out")
    if network is not None:
        outside.provide("network", network, name)
    if trust:
        outside.trust(spec)


def _give_tokenizers(text: TextEncoder, metadata: Mapping[str, Any]) -> None:
    """Set the tokenizers in the metadata. ValueError for damaged ones, and for those of other text
    encoders."""
    own = check_mapping(TOKENIZERS, metadata.get(TOKENIZERS, {}))
    check_names("text encoder", own, text.params.readers)
    text.tokenizers = {
        name: text.params.readers[name].open_tokenizer(description) for name, description in own.items()
    }
    text.check()


def _largest(shapes: Sequence[tuple[int, ...]]) -> int:
    """The largest number that parameters of networks with these tensors can have: a size, or a number of
    layers."""
    return max(MAX_SETTING, len(shapes), *(size for shape in shapes for size in shape))


def _check_numbers(name: str, value: Any, largest: int) -> None:
    """ValueError at the first whole number in the parameters of networks that exceeds `largest`."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(f"{name}.{key}".strip("."), inner, largest)
    elif isinstance(value, int) and value > largest and not name.endswith(".pad"):  # which names a token
        raise ValueError(f"{name} can be at most {largest:,} for the tensors that are there, not {value:,}")


def _keys(file: TensorFile, prefix: str) -> dict[str, str]:
    """The network's name of each tensor under a prefix, and its key in the file."""
    return {key.removeprefix(prefix): key for key in file.tensors if key.startswith(prefix)}


def write(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Write tensors and JSON metadata atomically. previous: where the replaced file is kept."""
    write_tensors(path, tensors, {key: as_text(key, value) for key, value in metadata.items()}, previous)


def as_text(key: str, value: Any) -> str:
    """An entry of the metadata as strict JSON. ValueError for numbers that are not finite."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(
            f"the description of this {key} holds a number that is not finite, which no file can: give it "
            "without"
        ) from None


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], previous: Path | None = None
) -> None:
    """Write tensors and text metadata atomically; `previous` as in `write`."""
    with replacing(path, previous) as temporary:
        try:
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()},
                temporary,
                dict(metadata),
            )
        except (
            SafetensorError
        ) as error:  # how the writer reports a full disk or a folder that it may not write to
            raise OSError(str(error)) from error


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors on the host, and of the metadata."""
    digests = sha256_of_tensors(
        {name: partial(Tensor.detach, value) for name, value in sorted(tensors.items())}
    )
    lines = [
        f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {digest}\n"
        for name, digest in digests.items()
    ]
    about = json.dumps(json.loads(json.dumps(metadata)), sort_keys=True)
    return hashlib.sha256(("".join(lines) + about).encode()).hexdigest()


def verify(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `read`, without the checksum entry. Reads all tensors: ValueError if they do not match the checksum
    that training wrote."""
    tensors, metadata = read(path)
    expected = metadata.pop("checksum", None)
    promised = "window" in metadata.get("progress", {})  # earlier versions wrote neither
    if (promised or expected is not None) and checksum(tensors, metadata) != expected:
        raise ValueError(f"{path} is damaged: its content does not fit its checksum")
    return tensors, metadata


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors (memory-mapped) and the metadata of a file, or of the checkpoint in a run's folder."""
    file, metadata = _open(path)
    return {key: stored.mapped() for key, stored in file.tensors.items()}, metadata


def _open(path: str | Path) -> tuple[TensorFile, dict[str, Any]]:
    path = Path(path)
    if path.is_dir():
        if not (path / FILE_NAME).exists():
            raise FileNotFoundError(
                f"no {FILE_NAME} in {path}: is it a training run's folder, and has it saved yet?"
            )
        path = path / FILE_NAME
    file = unwrapped(open_tensors(path))  # as a compiled network's, which training may have saved
    try:
        return file, {key: parsed(key, value) for key, value in file.metadata.items() if key != "format"}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or not one of our safetensors files ({one_line(error)})"
        ) from None


def parsed(key: str, text: str) -> Any:
    """An entry of the metadata. ValueError for numbers in a model's description that are infinite, no
    numbers, or beyond 64 bits."""
    return parse_strict_json(text) if key == "model" else parse_json(text)
