"""Reads pickles of tensors (.ckpt, .pt, ...), only under torch's weights_only, which runs no code."""

from __future__ import annotations

import codecs
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.messages import first_line
from models.files.stored import MAX_TENSORS, InMemory, TensorFile, check_name

WRAPPERS = ("state_dict", "model", "module")  # keys under which trainers' pickles hold their tensors


class _Callback:
    """Stands for a class of the trainer in early SD files, which is not needed."""


# Stable Diffusion's own .ckpt files also hold their trainer's callbacks, with NumPy scalars for losses.
_HARMLESS_CLASSES: list[Any] = [
    (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Callback, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]  # its name in NumPy 1
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]  # and in NumPy 2
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, codecs.encode),
]


def open_pickle(path: Path) -> TensorFile:
    """Read a pickle of tensors. ValueError if it is damaged, or asks for code to be run."""
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), (Mapping, list))), content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} under state_dict, not tensors by name")
    items = ((key, value) for key, value in _flatten(state) if isinstance(value, Tensor))
    named = list(islice(items, MAX_TENSORS + 1))
    if len(named) > MAX_TENSORS:
        raise ValueError(f"{path} holds no model: no known one has more than {MAX_TENSORS:,} tensors")
    for key, value in named:
        _check_tensor(path, key, value)
    tensors = {key: InMemory.from_tensor(path, key, value) for key, value in named}
    numbers = {key: float(n) for key, n in content.items() if isinstance(key, str) and _is_number(n)}
    return TensorFile(path, tensors, numbers=numbers)


def _unpickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"  # torch's format since 1.6; only this can be memory-mapped
        if zipped:
            _check_zip(path)
        # torch would read a file of this name as safetensors; opened, it is read as a pickle, but not mapped.
        misnamed = path.suffix == ".safetensors"
        allowed = torch.serialization.safe_globals(_HARMLESS_CLASSES)
        with allowed, warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # torch warns of its own old formats
            source, mmap = (file, False) if misnamed else (path, zipped)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it asks for {name[1]}" if name else first_line(str(error).split("WeightsUnpickler error: ")[-1])
        )
        raise ValueError(
            f"{path} does not hold plain weights, and nothing in it was run ({reason}); use its safetensors "
            "version"
        ) from None
    except Exception as error:  # a damaged pickle may raise any
        raise ValueError(f"{path} is damaged or not a weights file ({first_line(error)})") from None


def _flatten(state: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Keys and values; those of nested mappings as "outer.inner"."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(abs(value) < 2**63)


def _check_tensor(path: Path, key: Any, value: Tensor) -> None:
    """ValueError for anything but a plain tensor. A tensor that repeats few bytes would fill the memory."""
    check_name(path, key)
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{path} holds {key}, which is not a plain tensor")
    if value.nbytes > value.untyped_storage().nbytes():
        shape = list(value.shape)
        raise ValueError(f"{path} is damaged: {key} of shape {shape} has more values than are stored")


def _check_zip(path: Path) -> None:
    """ValueError for a compressed file, which could grow when it is read: torch never compresses."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed")
