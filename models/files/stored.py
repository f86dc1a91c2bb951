"""Tensors of files in every format: regions of a file, memory-mapped on request, and tensors in memory.

An error in a file is a ValueError that names the file and the key, before memory is allocated for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffusion.messages import brief, first_line
from models.layers.finite import is_finite

DTYPES = {  # by their names in safetensors and GGUF files
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
EDGE = 4096  # values checked at either end of a mapped tensor when it is opened: a page or a few
CHUNK = 2**21  # bytes read at a time, which fit into a processor's cache until they are converted
MAX_HEADER = 2**24  # bytes; the safetensors format allows 100 million, whose JSON may fill gigabytes
MAX_TENSORS = 50_000  # SDXL's file has 2,515, a training run's of it four times as many
MAX_NAME = 1000  # characters of a tensor's name
MAX_SIZE = 2**48  # values along a dimension, and bytes of a file: torch overflows at products of larger ones


@dataclass(frozen=True, eq=False)
class Stored(ABC):
    """One tensor of a file.

    keys     its keys in the file, its own name first: an 8-bit weight also has the key of its scale
    packing  None, or how a matrix is packed ("fp8", or a name in packed.BLOCKS); its values are then float32
    raw      the stored bytes or 8-bit floats of a packed matrix: (rows, bytes or floats of a row)
    scale    of 8-bit floats, () or (rows, 1) in float32
    """

    path: Path
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: str | None = field(default=None, kw_only=True)
    raw: Stored | None = field(default=None, kw_only=True)
    scale: Tensor | None = field(default=None, kw_only=True)

    @property
    def key(self) -> str:
        return self.keys[0]

    @abstractmethod
    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        """Its values in order, flat, in chunks, each of which is valid until the next one.

        of  each chunk has a multiple of this number of values
        """

    def mapped(self) -> Tensor:
        """The tensor, memory-mapped if possible, else in new memory; writing to it changes no file."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Tensor) -> None:
        """Copy the tensor to a contiguous one of the same shape and any dtype."""
        for _ in self._copy_chunks(out):
            pass

    def read_finite(self, out: Tensor) -> None:
        """The same. ValueError if a value is not finite, in the file or in the dtype of `out`."""
        for chunk, part in self._copy_chunks(out):
            if not is_finite(part):
                if not is_finite(chunk):
                    raise self._not_finite()
                large = f"{self.path} holds values in {self.key} that are too large for {part.dtype}"
                raise ValueError(f"{large}: choose another dtype")

    def take(self, dtype: torch.dtype) -> Tensor:
        """The tensor in that dtype, memory-mapped unless it is converted. ValueError if it is not finite.

        Only the ends of mapped pages are checked, so that opening a file does not read all of it, as
        `Model.check_finite` does.
        """
        if self.dtype != dtype:
            value = torch.empty(self.shape, dtype=dtype)
            self.read_finite(value)
            return value
        value = self.mapped()
        flat = value.view(-1)
        if not (is_finite(flat[:EDGE]) and is_finite(flat[-EDGE:])):
            raise self._not_finite()
        return value

    def _copy_chunks(self, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Copy chunk by chunk; yields each as stored, and as it is in `out`."""
        flat, start = out.view(-1), 0
        for chunk in self.chunks():
            yield chunk, flat[start : start + len(chunk)].copy_(chunk)
            start += len(chunk)

    def _not_finite(self) -> ValueError:
        return ValueError(f"{self.path} is damaged: {self.key} holds values that are not finite")


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The contents of a file or a set of shards.

    tensors   by their keys, without prefixes of wrappers
    metadata  texts in the header
    numbers   plain numbers in a pickle ("global_step", ...)
    ignored   the reason for each key that is left out
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: stored.shape for key, stored in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class InMemory(Stored):
    """A tensor in memory."""

    tensor: Tensor

    @classmethod
    def from_tensor(cls, path: Path, key: str, tensor: Tensor) -> InMemory:
        return cls(path, (key,), tuple(tensor.shape), tensor.dtype, tensor.detach())

    def mapped(self) -> Tensor:
        return self.tensor.contiguous()

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        yield self.tensor.flatten()


def map_file(path: Path, size: int) -> torch.UntypedStorage:
    """A file's memory-mapped pages, not shared: writing to them does not change the file."""
    try:
        storage = torch.UntypedStorage.from_file(str(path), False, size)
    except RuntimeError as error:
        changed = "has it changed since it was opened?"
        raise ValueError(f"{path} cannot be mapped ({first_line(error)}): {changed}") from None
    return cast(torch.UntypedStorage, storage)  # torch's annotation allows any kind of storage


@dataclass(frozen=True, eq=False)
class Region(Stored):
    """A tensor that lies at byte `start` of a file. `pages` maps the file, once for all of its tensors."""

    start: int
    pages: Callable[[], torch.UntypedStorage]

    def mapped(self) -> Tensor:
        if self.start % self.dtype.itemsize:  # an unaligned tensor cannot be viewed, only copied
            return super().mapped()
        # Its own storage, so that a copy or a pickle of this tensor does not contain the whole file.
        storage = self.pages()[self.start : self.start + math.prod(self.shape) * self.dtype.itemsize]
        return torch.tensor([], dtype=self.dtype).set_(storage).view(self.shape)

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        size, unit = math.prod(self.shape) * self.dtype.itemsize, of * self.dtype.itemsize
        step = max(1, CHUNK // unit) * unit
        buffer = torch.empty(min(size, step), dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, size, step):
                chunk = buffer[: size - start]
                self._fill(chunk, file)
                yield chunk.view(self.dtype)

    def read_into(self, out: Tensor) -> None:
        """Copy the tensor, directly from the file unless it is converted."""
        if out.dtype != self.dtype or out.device.type != "cpu":
            super().read_into(out)
            return
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            self._fill(out.view(-1).view(torch.uint8), file)

    def _fill(self, chunk: Tensor, file: FileIO) -> None:
        view = chunk.numpy().data
        while len(view):
            n = file.readinto(view)
            if not n:
                raise ValueError(f"{self.path} is damaged: it ends within {self.key}")
            view = view[n:]


def check_name(path: Path, key: Any) -> None:
    """ValueError for a name that does not fit into an error message."""
    if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_NAME:
        raise ValueError(f"{path} is damaged: {brief(key)} is not a tensor's name")
