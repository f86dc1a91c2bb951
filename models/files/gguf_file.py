"""GGUF, the files of GGML: plain tensors, and matrices packed in blocks. Their headers are read by GGML's own
package."""

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

MAX_READS = 2**19  # numbers and texts in a header: T5's vocabulary is 130,000 of them, which takes a second
# of tensors that their converter reshaped, so that their rows divide into blocks
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


@dataclass(frozen=True, eq=False)
class _InBlocks(Stored):
    """A tensor in blocks of that kind, whose bytes are `data`."""

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
    """One tensor in the header: GGML's name for its type, and the byte of the file that it begins at."""

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
    """Look into a GGUF file. Metadata are texts, what is no text in them in JSON. ValueError where it is
    damaged or of no kind known."""
    with open(path, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it begins with {magic!r}")
    reader = _reader()
    try:
        header = reader(path)
        metadata = {
            name: field.contents() for name, field in header.fields.items() if not name.startswith("GGUF.")
        }
    except Exception as error:  # a damaged file may provoke any
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    if (pieces := metadata.get("split.count", 1)) != 1:
        raise ValueError(
            f"{path} is one of {brief(pieces)} pieces: make one file of them, with llama-gguf-split --merge"
        )
    entries = [_checked(path, *described) for described in header.described]
    _check_places(path, entries)
    pages = cache(partial(map_file, path, path.stat().st_size))
    tensors = {entry.key: _stored(path, entry, pages, metadata) for entry in entries}
    return TensorFile(
        path,
        tensors,
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()},
    )


@cache
def _reader() -> type[Any]:
    """GGML's reader, for a file's header only, and without its trust in the counts there."""
    with extra("gguf"):
        import gguf
    kinds = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}

    class Header(gguf.GGUFReader):  # type: ignore[misc]  # it has no types
        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
            """So many numbers from that byte on."""
            self.reads += 1
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if self.byte_order == "S":
                raise ValueError("it is of a machine that writes numbers backwards")
            if end > min(self.data.nbytes, MAX_HEADER) or self.reads > MAX_READS:
                raise ValueError("its header does not end where it should; get it again")
            return np.frombuffer(self.data, dtype, int(count), int(offset))

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            """In place of the tensors, what the header says of each: key, shape (there the fastest dimension
            first), type, first byte."""
            found = [(field.name, *(part.tolist() for part in field.parts[3:])) for field in fields]
            begin = int(start_offs)
            self.described = [
                (key, tuple(dims[::-1]), kinds.get(kind, str(kind)), begin + at)
                for key, dims, [kind], [at] in found
            ]

    return Header


def _checked(path: Path, key: str, shape: tuple[int, ...], kind: str, start: int) -> _Entry:
    check_name(path, key)
    if len(shape) > 8 or not all(n < MAX_SIZE for n in (*shape, start)):
        raise ValueError(
            f"{path} is damaged: {key} has no possible shape {brief(list(shape))} or place {start:,}"
        )
    if kind not in DTYPES and kind not in BLOCKS:
        raise ValueError(
            f"{path} cannot be read: {key} has the type {kind}; take a file of one of {', '.join(BLOCKS)}"
        )
    if kind in BLOCKS and (not shape or shape[-1] % BLOCKS[kind].values):
        raise ValueError(
            f"{path} is damaged: {key}, {kind} of shape {list(shape)}, does not divide into blocks"
        )
    return _Entry(key, shape, kind, start)


def _check_places(path: Path, entries: list[_Entry]) -> None:
    """ValueError unless the tensors lie in the file, apart from each other, each once."""
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError(f"{path} is damaged: a tensor stands in it twice")
    size = path.stat().st_size
    for entry in entries:
        if (end := entry.start + entry.size) > size:
            raise ValueError(
                f"{path} is damaged: {entry.key} ends at byte {end:,}, the file at {size:,}; get it again"
            )
    for one, other in pairwise(sorted(entries, key=lambda entry: (entry.start, entry.size))):
        if one.start + one.size > other.start:
            raise ValueError(f"{path} is damaged: {other.key} overlaps {one.key}")


def _stored(
    path: Path, entry: _Entry, pages: Callable[[], UntypedStorage], metadata: Mapping[str, Any]
) -> Stored:
    shape, keys = _original_shape(path, entry, metadata), (entry.key,)
    if entry.kind in DTYPES:
        return Region(path, keys, shape, DTYPES[entry.kind], entry.start, pages)
    data = Region(path, keys, (entry.size,), torch.uint8, entry.start, pages)
    found = _InBlocks(path, keys, shape, torch.float32, entry.kind, data)
    if len(shape) == 2 and shape[1] % BLOCKS[entry.kind].values == 0:  # others are only given unpacked
        return replace(found, packing=entry.kind, raw=replace(data, shape=(shape[0], entry.size // shape[0])))
    return found


def _original_shape(path: Path, entry: _Entry, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    shape = metadata.get(ORIGINAL_SHAPE + entry.key, list(entry.shape))
    if (
        not isinstance(shape, list)
        or not all(type(n) is int and n >= 0 for n in shape)
        or math.prod(shape) != math.prod(entry.shape)
    ):
        raise ValueError(
            f"{path} is damaged: {entry.key} of shape {list(entry.shape)} cannot have been {brief(shape)}"
        )
    return tuple(shape)
