"""GGUF, the files of GGML: plain tensors, and matrices packed in blocks.

After a magic number and counts come texts and numbers by name, then each tensor's name, dimensions (the fastest first, the reverse of
ours), type and place, then the data (GGML's docs/gguf.md). Read here and not by GGML's own package, which trusts the file's counts.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.checkpoints.tensors import (
    LARGEST_HEADER,
    LARGEST_SIZE,
    MOST_TENSORS,
    Pages,
    Region,
    Stored,
    TensorFile,
    check_name,
)
from models.packed import BLOCKS, CHUNK, unpack_blocks

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64, 24: torch.int8, 25: torch.int16, 26: torch.int32}
PLAIN[27] = torch.int64
PACKED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
OTHERS = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
OTHERS |= {23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # of metadata, as struct has them
TEXT, ARRAY = 8, 9
LONGEST_LIST = 2**20  # texts: four times the largest vocabularies
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of tensors that their converter reshaped, so that their rows divide into blocks


@dataclass(frozen=True, eq=False)
class _InBlocks(Stored):
    """A tensor in blocks, `data` (rows, bytes of a row); one that is no matrix of whole blocks is only given unpacked."""

    key: str
    shape: tuple[int, ...]
    kind: str
    data: Region
    dtype: torch.dtype = torch.float32

    @property
    def packing(self) -> str | None:  # type: ignore[override]
        return self.kind if len(self.shape) == 2 and self.shape[1] % BLOCKS[self.kind].values == 0 else None

    @property
    def raw(self) -> Stored | None:  # type: ignore[override]
        rows = self.shape[0]
        return replace(self.data, shape=(rows, self.data.shape[0] // rows)) if self.packing else None

    def mapped(self) -> Tensor:
        out = torch.empty(self.shape)
        self.read_into(out)
        return out

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        kind = BLOCKS[self.kind]
        step = math.lcm(of, kind.values) // kind.values
        for data in self.data.chunks(step * kind.size):
            for blocks in data.view(-1, kind.size).split(max(1, CHUNK // kind.values // step) * step):
                yield unpack_blocks(self.kind, blocks).view(-1)


class _Header:
    """The beginning of a file, read in order. ValueError where it ends too early."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.left = path, file, min(path.stat().st_size, LARGEST_HEADER)

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{self.path} is damaged: its header does not end where it should; get it again")
        self.left -= count
        return self.file.read(count)

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.bytes(count * struct.calcsize(f"<{kind}")))

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode(errors="replace")

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise ValueError(f"{self.path} is damaged: {key} has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            return list(self.numbers(NUMBERS[kind], count))
        if kind != TEXT or count > LONGEST_LIST:
            raise ValueError(f"{self.path} is damaged: {key} is a list of {count:,} values of type {kind}")
        return [self.text() for _ in range(count)]


@dataclass(frozen=True)
class _Entry:
    """One tensor in the header; `start` counts from the beginning of the data."""

    key: str
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        count = math.prod(self.shape)
        if self.kind in PLAIN:
            return count * PLAIN[self.kind].itemsize
        blocks = BLOCKS[PACKED[self.kind]]
        return count // blocks.values * blocks.size


def open_gguf(path: Path) -> TensorFile:
    """Look into a GGUF file. Metadata are texts, what is no text in them in JSON. ValueError where it is damaged or of no kind known."""
    with open(path, "rb") as file:
        header = _Header(path, file)
        count, pairs = _check_start(path, header)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            check_name(path, key := header.text())
            metadata[key] = header.value(key)
        entries = [_read_entry(path, header) for _ in range(count)]
        begin = file.tell()
    if len({entry.key for entry in entries}) < count:
        raise ValueError(f"{path} is damaged: a tensor stands in it twice")
    if (pieces := metadata.get("split.count", 1)) != 1:
        raise ValueError(f"{path} is one of {pieces} pieces: make one file of them, with llama-gguf-split --merge")
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise ValueError(f"{path} is damaged: general.alignment is {align!r:.80}, no power of two")
    begin += -begin % align
    _check_places(path, begin, entries)
    pages = Pages(path, path.stat().st_size)
    tensors = {entry.key: _stored(path, entry, pages, begin, metadata) for entry in entries}
    return TensorFile(path, tensors, {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()})


def _check_start(path: Path, header: _Header) -> tuple[int, int]:
    """How many tensors and how many other values there are."""
    magic = header.bytes(min(4, header.left))
    if magic != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {magic!r}")
    version = header.number("I")
    if version not in (2, 3):
        big = ", of a machine that writes numbers backwards" if version & 0xFFFF == 0 else ""
        raise ValueError(f"{path} is a GGUF file of version {version}{big}; 2 and 3 are read here")
    count, pairs = header.numbers("Q", 2)
    if count > MOST_TENSORS:
        raise ValueError(f"{path} holds no model: no known one has as many as {count:,} tensors")
    return count, pairs


def _read_entry(path: Path, header: _Header) -> _Entry:
    key = header.text()
    check_name(path, key)
    dims = header.number("I")
    if dims > 8:
        raise ValueError(f"{path} is damaged: {key} has {dims:,} dimensions")
    shape = header.numbers("Q", dims)[::-1]
    kind, start = header.number("I"), header.number("Q")
    if not all(n < LARGEST_SIZE for n in (*shape, start)):
        raise ValueError(f"{path} is damaged: {key} has no possible shape {list(shape)!s:.80} or place {start:,}")
    if kind not in PLAIN and kind not in PACKED:
        what = OTHERS.get(kind, f"number {kind}, which is not known")
        raise ValueError(f"{path} cannot be read: {key} has the type {what}; take a file of one of {', '.join(BLOCKS)}")
    if kind in PACKED and (not shape or shape[-1] % BLOCKS[PACKED[kind]].values):
        raise ValueError(f"{path} is damaged: {key}, {PACKED[kind]} of shape {list(shape)}, does not divide into blocks")
    return _Entry(key, shape, kind, start)


def _check_places(path: Path, begin: int, entries: list[_Entry]) -> None:
    """ValueError unless the tensors lie in the file, apart from each other."""
    size = path.stat().st_size
    for entry in entries:
        if begin + entry.start + entry.size > size:
            raise ValueError(
                f"{path} is damaged: {entry.key} ends at byte {begin + entry.start + entry.size:,}, the file at {size:,}; get it again"
            )
    for one, other in pairwise(sorted(entries, key=lambda entry: (entry.start, entry.size))):
        if one.start + one.size > other.start:
            raise ValueError(f"{path} is damaged: {other.key} overlaps {one.key}")


def _stored(path: Path, entry: _Entry, pages: Pages, begin: int, metadata: dict[str, Any]) -> Stored:
    shape = _original_shape(path, entry, metadata)
    if entry.kind in PLAIN:
        return Region(entry.key, shape, PLAIN[entry.kind], pages, begin + entry.start)
    data = Region(entry.key, (entry.size,), torch.uint8, pages, begin + entry.start)
    return _InBlocks(entry.key, shape, PACKED[entry.kind], data)


def _original_shape(path: Path, entry: _Entry, metadata: dict[str, Any]) -> tuple[int, ...]:
    shape = metadata.get(ORIGINAL_SHAPE + entry.key, list(entry.shape))
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != math.prod(entry.shape):
        raise ValueError(f"{path} is damaged: {entry.key} of shape {list(entry.shape)} cannot have been {shape!s:.80}")
    return tuple(shape)
