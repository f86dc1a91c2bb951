"""Reads GGUF, the files of GGML, whose own package reads the header: tensors, plain or packed in blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from diffusion.messages import brief, first_line
from models.files.stored import DTYPES, MAX_HEADER, MAX_SIZE, Region, Stored, TensorFile, check_name, map_file
from models.layers.packed import BLOCKS, CHUNK, unpack_blocks
from plain_diffusion.extras import extra

MAX_READS = 2**19  # numbers and texts in a header: T5's vocabulary has 130,000, which takes a second
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # for tensors that a converter reshaped to divide rows into blocks


@dataclass(frozen=True, eq=False)
class _InBlocks(Stored):
    """A tensor packed in blocks of that kind."""

    kind: str
    data: Region

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        kind = BLOCKS[self.kind]
        step = math.lcm(of, kind.values) // kind.values
        for data in self.data.chunks(step * kind.size):
            for blocks in data.view(-1, kind.size).split(max(1, CHUNK // kind.values // step) * step):
                yield unpack_blocks(self.kind, blocks).view(-1)


@dataclass(frozen=True)
class _Entry:
    """One tensor in the header: its GGML type, and the byte of the file where it starts."""

    key: str
    shape: tuple[int, ...]
    kind: str
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        count, blocks = math.prod(self.shape), BLOCKS.get(self.kind)
        return count // blocks.values * blocks.size if blocks else count * DTYPES[self.kind].itemsize


def open_gguf(path: Path) -> TensorFile:
    """Read a GGUF file's header; metadata become text or JSON. ValueError if damaged or unsupported."""
    with open(path, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}")
    reader = _header_reader()
    try:
        header = reader(path)
        fields = {name: field for name, field in header.fields.items() if not name.startswith("GGUF.")}
        metadata = {name: field.contents() for name, field in fields.items()}
    except Exception as error:  # a damaged file may raise any
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if (pieces := metadata.get("split.count", 1)) != 1:
        merge = "merge them into one file, with llama-gguf-split --merge"
        raise ValueError(f"{path} is one of {brief(pieces)} pieces: {merge}")
    entries = [_check_entry(path, *entry) for entry in header.entries]
    _check_positions(path, entries)
    pages = cache(partial(map_file, path, path.stat().st_size))
    tensors = {entry.key: _make_stored(path, entry, pages, metadata) for entry in entries}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    return TensorFile(path, tensors, texts)


@cache
def _header_reader() -> type[Any]:
    """GGML's reader, restricted to a file's header, with every count in it checked."""
    with extra("gguf"):
        import gguf
    kinds = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}

    class Header(gguf.GGUFReader):  # type: ignore[misc]  # it has no types
        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
            """That many numbers, starting at that byte."""
            self.reads += 1
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if self.byte_order == "S":
                raise ValueError("it is big-endian, which is not supported")
            if end > min(self.data.nbytes, MAX_HEADER) or self.reads > MAX_READS:
                raise ValueError("its header does not end where it should; download it again")
            return np.frombuffer(self.data, dtype, int(count), int(offset))

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            """Instead of tensors, their entries: key, shape (reversed in the file), type and first byte."""
            self.entries = []
            for field in fields:
                dims, [kind], [offset] = (part.tolist() for part in field.parts[3:])
                kind = kinds.get(kind, str(kind))
                self.entries.append((field.name, tuple(dims[::-1]), kind, int(start_offs) + offset))

    return Header


def _check_entry(path: Path, key: str, shape: tuple[int, ...], kind: str, start: int) -> _Entry:
    check_name(path, key)
    sizes = list(shape)
    if len(shape) > 8 or not all(n < MAX_SIZE for n in (*shape, start)):
        raise ValueError(
            f"{path} is damaged: {key} has the impossible shape {brief(sizes)} or position {start:,}"
        )
    if kind not in DTYPES and kind not in BLOCKS:
        supported = ", ".join(BLOCKS)
        raise ValueError(
            f"{path} cannot be read: {key} has the type {kind}; take a file of one of {supported}"
        )
    if kind in BLOCKS and (not shape or shape[-1] % BLOCKS[kind].values):
        raise ValueError(f"{path} is damaged: {key}, {kind} of shape {sizes}, does not divide into blocks")
    return _Entry(key, shape, kind, start)


def _check_positions(path: Path, entries: list[_Entry]) -> None:
    """ValueError unless the tensors lie within the file, do not overlap, and have different keys."""
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError(f"{path} is damaged: it holds a tensor twice")
    size = path.stat().st_size
    for entry in entries:
        if (end := entry.start + entry.size) > size:
            where = f"{entry.key} ends at byte {end:,}, the file at {size:,}"
            raise ValueError(f"{path} is damaged: {where}; download it again")
    for one, other in pairwise(sorted(entries, key=lambda entry: (entry.start, entry.size))):
        if one.start + one.size > other.start:
            raise ValueError(f"{path} is damaged: {other.key} overlaps {one.key}")


def _make_stored(
    path: Path, entry: _Entry, pages: Callable[[], UntypedStorage], metadata: Mapping[str, Any]
) -> Stored:
    shape, keys = _original_shape(path, entry, metadata), (entry.key,)
    if entry.kind in DTYPES:
        return Region(path, keys, shape, DTYPES[entry.kind], entry.start, pages)
    data = Region(path, keys, (entry.size,), torch.uint8, entry.start, pages)
    stored = _InBlocks(path, keys, shape, torch.float32, entry.kind, data)
    if len(shape) == 2 and shape[1] % BLOCKS[entry.kind].values == 0:  # other tensors are always unpacked
        return replace(
            stored, packing=entry.kind, raw=replace(data, shape=(shape[0], entry.size // shape[0]))
        )
    return stored


def _original_shape(path: Path, entry: _Entry, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    shape = metadata.get(ORIGINAL_SHAPE + entry.key, list(entry.shape))
    sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not sizes or math.prod(shape) != math.prod(entry.shape):
        stated = f"{entry.key} of shape {list(entry.shape)} cannot have been {brief(shape)}"
        raise ValueError(f"{path} is damaged: {stated}")
    return tuple(shape)
