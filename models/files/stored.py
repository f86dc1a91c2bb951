"""The tensors of files, whatever the format: regions of a file that are memory-mapped on request, and tensors
held in memory.

Whatever is wrong with a file is one ValueError that names the file and the key, before memory is taken for
it.
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
"""By their names in safetensors and GGUF files."""
EDGE = 4096  # values at either end of a mapped tensor that are looked at when it is opened: a page or a few
CHUNK = 2**21  # bytes read at a time, which a processor's cache holds until they are converted
MAX_HEADER = 2**24  # bytes; the safetensors format allows 100 million, whose JSON may fill gigabytes
MAX_TENSORS = 50_000  # SDXL's file has 2,515, a training run's of it four times as many
MAX_NAME = 1000  # characters of a tensor's name
MAX_SIZE = 2**48  # values along a dimension, and bytes of a file: torch overflows at products of larger ones


@dataclass(frozen=True, eq=False)
class Stored(ABC):
    """One tensor of a file, whatever the file's format.

    keys     the keys of the file that it is made of, its own name first: an 8-bit weight has its scale's too
    packing  None, or how a matrix is packed ("fp8", or a name in packed.BLOCKS); its values are then float32
    raw      the bytes or 8-bit floats of a packed matrix as they lie in the file: (rows, bytes or floats of a
             row)
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
        """Its values in order, flat, in chunks that are valid until the next one: nothing of a safetensors
        file stays in memory.

        of  values that must stay together: each chunk has a multiple of so many
        """

    def mapped(self) -> Tensor:
        """The tensor in the file's memory-mapped pages if it can be viewed there, else in new memory; either
        may be written to."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Tensor) -> None:
        """Copy all of it to a contiguous tensor of its shape and of any dtype."""
        for _ in self._copied(out):
            pass

    def read_finite(self, out: Tensor) -> None:
        """The same. ValueError if a value is not finite, in the file or in the dtype of `out`."""
        for chunk, part in self._copied(out):
            if not is_finite(part):
                raise self._too_large(part.dtype) if is_finite(chunk) else self._damaged()

    def take(self, dtype: torch.dtype) -> Tensor:
        """The tensor in that dtype: `mapped`, or in new memory if it is converted. ValueError if it is not
        finite.

        Only the ends of mapped pages are checked, so that opening a file does not read all of it:
        `Model.check_finite` does.
        """
        if self.dtype != dtype:
            value = torch.empty(self.shape, dtype=dtype)
            self.read_finite(value)
            return value
        value = self.mapped()
        flat = value.view(-1)
        if not (is_finite(flat[:EDGE]) and is_finite(flat[-EDGE:])):
            raise self._damaged()
        return value

    def _copied(self, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Copy it chunk by chunk; yields each as it is stored, and as it is in `out`."""
        flat, start = out.view(-1), 0
        for chunk in self.chunks():
            yield chunk, flat[start : start + len(chunk)].copy_(chunk)
            start += len(chunk)

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} is damaged: {self.key} holds values that are not finite")

    def _too_large(self, dtype: torch.dtype) -> ValueError:
        return ValueError(
            f"{self.path} holds values in {self.key} that are too large for {dtype}: choose another dtype"
        )


@dataclass(frozen=True, eq=False)
class TensorFile:
    """What a file, or a set of shards, holds.

    tensors   by name: the key, without what wrappers of networks add to it
    metadata  texts beside the tensors in a safetensors file
    numbers   plain numbers beside the tensors in a pickle ("global_step", ...)
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
class Held(Stored):
    """A tensor that is in memory already."""

    tensor: Tensor

    @classmethod
    def of(cls, path: Path, key: str, tensor: Tensor) -> Held:
        return cls(path, (key,), tuple(tensor.shape), tensor.dtype, tensor.detach())

    def mapped(self) -> Tensor:
        return self.tensor.contiguous()

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        yield self.tensor.flatten()


def map_file(path: Path, size: int) -> torch.UntypedStorage:
    """A file's memory-mapped pages. Not shared: what is written to them stays out of the file."""
    try:
        return cast(
            torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, size)
        )  # torch annotates any kind of storage
    except RuntimeError as error:
        raise ValueError(
            f"{path} cannot be mapped ({first_line(error)}): has it changed since it was looked into?"
        ) from None


@dataclass(frozen=True, eq=False)
class Region(Stored):
    """Bytes of a file.

    start  the first of them
    pages  gives the mapped file: made once for all of the file's tensors, when the first is asked for
    """

    start: int
    pages: Callable[[], torch.UntypedStorage]

    def mapped(self) -> Tensor:
        if self.start % self.dtype.itemsize:  # such a tensor cannot be viewed, only copied
            return super().mapped()
        # A storage of its own, so that a copy or a pickle of this tensor does not take the whole file along.
        storage = self.pages()[self.start : self.start + math.prod(self.shape) * self.dtype.itemsize]
        return torch.tensor([], dtype=self.dtype).set_(storage).view(self.shape)

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        size, least = math.prod(self.shape) * self.dtype.itemsize, of * self.dtype.itemsize
        step = max(1, CHUNK // least) * least
        buffer = torch.empty(min(size, step), dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, size, step):
                chunk = buffer[: size - start]
                self._fill(chunk, file)
                yield chunk.view(self.dtype)

    def read_into(self, out: Tensor) -> None:
        """Copy all of it, straight from the file if nothing is converted."""
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
        raise ValueError(f"{path} is damaged: {brief(key)} is no name of a tensor")
