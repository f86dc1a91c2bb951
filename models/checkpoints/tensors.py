"""Tensors in files, by name: what a file holds is known from its header alone; a tensor is read when it is asked for.

    safetensors    our own reader of the format: eight bytes of length, a JSON header, then the data, which is memory-mapped
    .gguf          GGML's format, whose tensors may be packed (see gguf_file.py)
    .ckpt .pt ...  pickles, only under torch's weights_only, which runs no code
    *.index.json   several safetensors files that are one

Whatever is wrong with a file is one ValueError that names the file and the key, before memory is taken for it.
"""

from __future__ import annotations

import codecs
import json
import math
import pickle
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from models.files import read_json
from models.packed import Packed

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS = (".safetensors", ".sft")
GGUF = (".gguf",)
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
CHUNK = 2**21  # bytes read at a time, which a processor's cache holds until they are converted
WRAPPERS = ("state_dict", "model", "module")  # what pickles of trainers hold their tensors under
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_TENSORS = 50_000  # SDXL's file has 2,515, a training run's of it four times as many
LONGEST_NAME = 1000  # characters
LARGEST_SIZE = 2**48  # of a dimension or a file: products of more are no numbers that torch can hold
NO_WEIGHTS = {  # how files begin that a download left in place of the one that was meant
    b"<!doctype html": "a web page, as a download with a wrong address or without permission leaves",
    b"<html": "a web page, as a download with a wrong address or without permission leaves",
    b"version https://git-lfs": "Git LFS's pointer to the file, which `git lfs pull` puts in its place",
}


class Stored(ABC):
    """One tensor of a file.

    packing  None, or how a matrix is packed: then all but the next two give its values in float32
    raw      of a packed matrix, what lies in the file: (rows, bytes or 8-bit floats of a row)
    scale    of 8-bit floats, () or (rows, 1) in float32
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: str | None = None
    raw: Stored | None = None
    scale: Tensor | None = None

    def packed(self) -> Packed:
        """The packed matrix in the file's memory-mapped pages."""
        if self.packing is None or self.raw is None:
            raise ValueError(f"{self.key} is not packed")
        return Packed(self.packing, self.raw.mapped(), self.scale)

    @abstractmethod
    def mapped(self) -> Tensor:
        """The tensor in the file's memory-mapped pages, which may be written to: the file does not change."""

    @abstractmethod
    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        """Its values in order, some at a time, flat, each valid until the next: nothing of a safetensors file stays in memory.

        of  how many must stay together
        """

    def copied(self, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Copy it to a contiguous tensor of its shape and of any dtype, some values at a time: as they are stored, and there."""
        flat, start = out.view(-1), 0
        for chunk in self.chunks():
            yield chunk, flat[start : start + len(chunk)].copy_(chunk)
            start += len(chunk)

    def read_into(self, out: Tensor) -> None:
        """Copy all of it."""
        for _ in self.copied(out):
            pass


@dataclass(frozen=True, eq=False)
class TensorFile:
    """What a file, or a set of shards, holds.

    metadata  texts beside the tensors in a safetensors file
    numbers   plain numbers beside the tensors in a pickle ("global_step", ...)
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: stored.shape for key, stored in self.tensors.items()}


def open_tensors(path: str | Path) -> TensorFile:
    """Look into a file. FileNotFoundError, or ValueError where it is damaged or of no kind that is known."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with open(path, "rb") as file:
        begin = file.read(64).lstrip().lower()
    if what := next((what for text, what in NO_WEIGHTS.items() if begin.startswith(text)), None if begin else "empty"):
        raise ValueError(f"{path} holds no weights: it is {what}")
    if path.suffix == ".json" and ".index." in path.name:
        return _open_shards(path)
    if path.suffix.lower() in SAFETENSORS:
        return _open_safetensors(path)
    if path.suffix.lower() in PICKLES:
        return _open_pickle(path)
    if path.suffix.lower() in GGUF:
        from models.checkpoints.gguf_file import open_gguf  # which is made of what stands here

        return open_gguf(path)
    raise ValueError(f"{path} is no file of weights: expected {', '.join((*SAFETENSORS, *PICKLES, *GGUF))} or a shards' .index.json")


# Safetensors -----------------------------------------------------------------------------------------------------------


class Pages:
    """A file's pages, mapped once for all of its tensors, when the first is asked for."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    @cached_property
    def storage(self) -> torch.UntypedStorage:
        # Not shared: what is written stays here. (torch annotates any kind of storage.)
        try:
            return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(self.path), False, self.size))
        except RuntimeError as error:
            reason = first_line(str(error))
            raise ValueError(f"{self.path} cannot be mapped ({reason}): has it changed since it was looked into?") from None


@dataclass(frozen=True, eq=False)
class Region(Stored):
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pages: Pages
    start: int

    def mapped(self) -> Tensor:
        if self.start % self.dtype.itemsize:  # such a tensor cannot be viewed, only copied
            out = torch.empty(self.shape, dtype=self.dtype)
            self.read_into(out)
            return out
        # A storage of its own: who copies or pickles this tensor does not take the whole file along.
        storage = self.pages.storage[self.start : self.start + math.prod(self.shape) * self.dtype.itemsize]
        return torch.tensor([], dtype=self.dtype).set_(storage).view(self.shape)

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        size, least = math.prod(self.shape) * self.dtype.itemsize, of * self.dtype.itemsize
        step = max(1, CHUNK // least) * least
        buffer = torch.empty(min(size, step), dtype=torch.uint8)
        with open(self.pages.path, "rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, size, step):
                chunk = buffer[: size - start]
                self._fill(chunk, file)
                yield chunk.view(self.dtype)

    def read_into(self, out: Tensor) -> None:
        """Copy all of it, where nothing is converted straight from the file."""
        if out.dtype != self.dtype or out.device.type != "cpu":
            super().read_into(out)
            return
        with open(self.pages.path, "rb", buffering=0) as file:
            file.seek(self.start)
            self._fill(out.view(-1).view(torch.uint8), file)

    def _fill(self, chunk: Tensor, file: FileIO) -> None:
        view = chunk.numpy().data
        while len(view):
            n = file.readinto(view)
            if not n:
                raise ValueError(f"{self.pages.path} is damaged: it ends within {self.key}")
            view = view[n:]


def _open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > LARGEST_HEADER:
            pickled = "; it seems to be a pickle, whose name would end in .ckpt or .pt" if start.startswith((b"PK", b"\x80")) else ""
            raise ValueError(f"{path} is no safetensors file: it begins with {start!r}{pickled}")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is damaged: its header should be {length:,} bytes long, and the file has {size:,}; get it again")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_key_twice)
        if not isinstance(header, dict):
            raise ValueError("it is no table of tensors")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: its header cannot be read ({error})") from None
    if len(header) > MOST_TENSORS:
        raise ValueError(f"{path} holds no model: no known one has as many as {len(header):,} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} is damaged: __metadata__ must hold texts")
    begin, pages = 8 + length, Pages(path, size)
    ends: list[tuple[int, int, str]] = []
    tensors: dict[str, Stored] = {}
    for key, entry in header.items():
        dtype, shape, first, last = _check_entry(path, key, entry)
        ends.append((first, last, key))
        tensors[key] = Region(key, shape, dtype, pages, begin + first)
    ends.sort()
    for (_, last, key), (first, _, other) in pairwise([(0, 0, "the header"), *ends]):
        if first != last:
            what = "overlaps" if first < last else "leaves a gap after"
            raise ValueError(f"{path} is damaged: {other} {what} {key} (it starts at byte {first:,} of the data, not {last:,})")
    if begin + (ends[-1][1] if ends else 0) != size:
        last_key = ends[-1][2] if ends else "the header"
        raise ValueError(
            f"{path} is damaged: {last_key} ends at byte {begin + (ends[-1][1] if ends else 0):,}, the file at {size:,}; get it again"
        )
    return TensorFile(path, tensors, metadata)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add gives None
        raise ValueError(f"{twice} stands in it twice")
    return found


def _check_entry(path: Path, key: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one tensor in the header."""
    check_name(path, key)
    try:
        name, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path} is damaged: {key} lacks dtype, shape or data_offsets") from None
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{path} cannot be read: {key} has the dtype {name!r}; known are {', '.join(DTYPES)}")
    if not all(type(n) is int and 0 <= n < LARGEST_SIZE for n in (*shape, first, last)) or len(shape) > 8:
        raise ValueError(f"{path} is damaged: {key} has no possible shape {list(shape)!s:.80} or place {[first, last]!s:.80}")
    if last - first != math.prod(shape) * DTYPES[name].itemsize:
        raise ValueError(f"{path} is damaged: {key}, {name} of shape {list(shape)}, does not fill its {last - first:,} bytes")
    return DTYPES[name], shape, first, last


# Pickles ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Unpickled(Stored):
    key: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.tensor.dtype

    def mapped(self) -> Tensor:
        return self.tensor.detach().contiguous()

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        yield self.tensor.detach().flatten()


class _Callback:
    """Stands for a class of the trainer that early SD files name beside their weights, and that nobody needs."""


# What Stable Diffusion's own .ckpt files hold beside plain tensors: their trainer's callbacks, with NumPy scalars for losses.
_HARMLESS_CLASSES: list[Any] = [
    (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Callback, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]  # where NumPy 1 had it, and where 2 has it
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, codecs.encode),
]


def _open_pickle(path: Path) -> TensorFile:
    try:
        if zipped := _is_zip(path):
            _check_zip(path)
        with torch.serialization.safe_globals(_HARMLESS_CLASSES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of its own past
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else first_line(str(error).split("WeightsUnpickler error: ")[-1])
        raise ValueError(f"{path} is no plain file of weights, and nothing in it was run ({reason}); use its safetensors version") from None
    except Exception as error:  # a damaged pickle may provoke any
        raise ValueError(f"{path} is damaged or no file of weights ({first_line(str(error))})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), (Mapping, list))), content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} under state_dict, not tensors by name")
    tensors = {key: _Unpickled(key, value) for key, value in _flat(state) if isinstance(value, Tensor)}
    for key, stored in tensors.items():
        _check_unpickled(path, key, stored.tensor)
    numbers = {key: float(n) for key, n in content.items() if isinstance(n, (int, float, np.integer, np.floating)) and isinstance(key, str)}
    return TensorFile(path, tensors, numbers=numbers)


def first_line(text: str) -> str:
    return text.strip().split("\n")[0] or "it is damaged"


def _flat(state: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Keys and values, those of tables within the table as "outer.inner"."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def check_name(path: Path, key: Any) -> None:
    """ValueError for a name that no message could show."""
    if not isinstance(key, str) or not key.isprintable() or len(key) > LONGEST_NAME:
        raise ValueError(f"{path} is damaged: {key!r:.80} is no name of a tensor")


def _check_unpickled(path: Path, key: Any, value: Tensor) -> None:
    """ValueError unless this is a tensor as a file has it: one that repeats few bytes would fill the memory when it is copied."""
    check_name(path, key)
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{path} holds {key}, which is no plain tensor")
    if value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"{path} is damaged: {key} of shape {list(value.shape)} has more values than are stored")


def _is_zip(path: Path) -> bool:
    """Only the zip format, torch's since 1.6, can be memory-mapped."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_zip(path: Path) -> None:
    """ValueError for a file that would grow when it is read: torch never compresses."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed")


# Shards ----------------------------------------------------------------------------------------------------------------


def _open_shards(path: Path) -> TensorFile:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path} is damaged: it has no weight_map, the table of what lies in which shard")
    shards = sorted(set(places.values()))
    if odd := [name for name in shards if Path(name).name != name or not name.endswith((*SAFETENSORS, *PICKLES))]:
        raise ValueError(f"{path} names the shard {odd[0]!r}, which is no file of weights beside it")
    if lost := [name for name in shards if not (path.parent / name).is_file()]:
        raise FileNotFoundError(f"{path} names the shard {lost[0]}, which is not there ({len(shards) - len(lost)} of {len(shards)} are)")
    opened = {name: open_tensors(path.parent / name) for name in shards}
    tensors = {}
    for key, name in places.items():
        if key not in opened[name].tensors:
            raise ValueError(f"{path} says that {name} holds {key}, and it does not")
        tensors[key] = opened[name].tensors[key]
    for name, file in opened.items():
        if unnamed := [key for key in file.tensors if places.get(key) != name]:
            raise ValueError(f"{path.parent / name} holds {unnamed[0]}, which {path.name} does not name")
    return TensorFile(path, tensors)
