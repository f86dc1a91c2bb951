"""Pickles of tensors (.ckpt, .pt, ...), only under torch's weights_only, which runs no code."""

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
from models.files.stored import MAX_TENSORS, Held, TensorFile, check_name

WRAPPERS = ("state_dict", "model", "module")  # what pickles of trainers hold their tensors under


class _Callback:
    """Stands for a class of the trainer that early SD files name beside their weights, and that nobody
    needs."""


# What Stable Diffusion's own .ckpt files hold beside plain tensors: their trainer's callbacks, with NumPy
# scalars for losses.
_HARMLESS_CLASSES: list[Any] = [
    (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Callback, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]  # where NumPy 1 had it, and where 2 has it
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, codecs.encode),
]


def open_pickle(path: Path) -> TensorFile:
    try:
        if zipped := _is_zip(path):
            _check_zip(path)
        with (
            torch.serialization.safe_globals(_HARMLESS_CLASSES),
            warnings.catch_warnings(),
            open(path, "rb") as file,
        ):
            warnings.simplefilter("ignore")  # what torch says of its own past
            misnamed = (
                path.suffix == ".safetensors"
            )  # which torch would take for what it is; without its name it is read, not mapped
            content = torch.load(
                file if misnamed else path,
                map_location="cpu",
                weights_only=True,
                mmap=zipped and not misnamed,
            )
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = (
            f"it asks for {asked[1]}"
            if asked
            else first_line(str(error).split("WeightsUnpickler error: ")[-1])
        )
        raise ValueError(
            f"{path} is no plain file of weights, and nothing in it was run ({reason}); use its safetensors "
            "version"
        ) from None
    except Exception as error:  # a damaged pickle may provoke any
        raise ValueError(f"{path} is damaged or no file of weights ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), (Mapping, list))), content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} under state_dict, not tensors by name")
    found = list(
        islice(((key, value) for key, value in _flat(state) if isinstance(value, Tensor)), MAX_TENSORS + 1)
    )
    if len(found) > MAX_TENSORS:
        raise ValueError(f"{path} holds no model: no known one has more than {MAX_TENSORS:,} tensors")
    for key, value in found:
        _check_unpickled(path, key, value)
    tensors = {key: Held.of(path, key, value) for key, value in found}
    kinds = (int, float, np.integer, np.floating)
    numbers = {
        key: float(n)
        for key, n in content.items()
        if isinstance(key, str) and isinstance(n, kinds) and abs(n) < 2**63
    }
    return TensorFile(path, tensors, numbers=numbers)


def _flat(state: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Keys and values, those of tables within the table as "outer.inner"."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _check_unpickled(path: Path, key: Any, value: Tensor) -> None:
    """ValueError unless this is a tensor as a file has it: one that repeats few bytes would fill the memory
    when it is copied."""
    check_name(path, key)
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{path} holds {key}, which is no plain tensor")
    if value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(
            f"{path} is damaged: {key} of shape {list(value.shape)} has more values than are stored"
        )


def _is_zip(path: Path) -> bool:
    """Only the zip format, torch's since 1.6, can be memory-mapped."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_zip(path: Path) -> None:
    """ValueError for a file that would grow when it is read: torch never compresses."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed")
