"""Tensors in files, by name, and regions of files that are memory-mapped when they are asked for.

Whatever is wrong with a file is one ValueError that names the file and the key, before memory is taken for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffusion.messages import brief, first_line
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
"""By the names that files give them."""
CHUNK = 2**21  # bytes read at a time, which a processor's cache holds until they are converted
MAX_HEADER = 2**24  # bytes; the safetensors format allows 100 million, whose JSON may fill gigabytes
MAX_TENSORS = 50_000  # SDXL's file has 2,515, a training run's of it four times as many
MAX_NAME = 1000  # characters of a tensor's name
MAX_SIZE = 2**48  # values along a dimension, and bytes of a file: torch overflows at products of larger ones


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
            reason = first_line(error)
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


def check_name(path: Path, key: Any) -> None:
    """ValueError for a name that no message could show."""
    if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_NAME:
        raise ValueError(f"{path} is damaged: {brief(key)} is no name of a tensor")
