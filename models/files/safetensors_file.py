"""Reads safetensors: eight bytes with the header's length, a JSON header, then the data, which is mapped."""

from __future__ import annotations

import json
import math
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from diffusion.messages import brief, one_line
from models.files.stored import (
    DTYPES,
    MAX_HEADER,
    MAX_SIZE,
    MAX_TENSORS,
    Region,
    Stored,
    TensorFile,
    check_name,
    map_file,
)


def open_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            hint = "; it seems to be a pickle, whose name would end in .ckpt or .pt"
            pickled = hint if start.startswith((b"PK", b"\x80")) else ""
            raise ValueError(f"{path} is not a safetensors file: it begins with {start!r}{pickled}")
        if size < 8 or length > size - 8:
            sizes = f"its header should be {length:,} bytes long, and the file has {size:,}"
            raise ValueError(f"{path} is damaged: {sizes}; download it again")
        text = file.read(length)
    if text.count(b"[") + text.count(b"{") > 20 * MAX_TENSORS:  # a tensor has three, and metadata have some
        raise ValueError(f"{path} holds no model: its header has far more parts than that of any known one")
    try:
        header = json.loads(text, object_pairs_hook=_refuse_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not a table of tensors")
    except (ValueError, RecursionError) as error:
        unreadable = f"its header cannot be read ({error})"
        raise ValueError(f"{path} is damaged or not a safetensors file: {unreadable}") from None
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{path} holds no model: no known one has as many as {len(header):,} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} is damaged: __metadata__ must hold texts")
    begin, pages = 8 + length, cache(partial(map_file, path, size))
    ends: list[tuple[int, int, str]] = []
    tensors: dict[str, Stored] = {}
    for key, entry in header.items():
        dtype, shape, first, last = _check_entry(path, key, entry)
        ends.append((first, last, key))
        tensors[key] = Region(path, (key,), shape, dtype, begin + first, pages)
    ends.sort()
    for (_, last, key), (first, _, other) in pairwise([(0, 0, "the header"), *ends]):
        if first != last:
            what = "overlaps" if first < last else "leaves a gap after"
            where = f"it starts at byte {first:,} of the data, not {last:,}"
            raise ValueError(f"{path} is damaged: {other} {what} {key} ({where})")
    _, last, key = ends[-1] if ends else (0, 0, "the header")
    if begin + last != size:
        where = f"{key} ends at byte {begin + last:,}, the file at {size:,}"
        raise ValueError(f"{path} is damaged: {where}; download it again")
    return TensorFile(path, tensors, metadata)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"it holds {one_line(key)} twice")
        unique[key] = value
    return unique


def _check_entry(path: Path, key: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one tensor in the header."""
    check_name(path, key)
    try:
        name, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path} is damaged: {key} lacks dtype, shape or data_offsets") from None
    if not isinstance(name, str) or name not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"{path} cannot be read: {key} has the dtype {brief(name)}; known are {known}")
    sizes = list(shape)
    if not all(type(n) is int and 0 <= n < MAX_SIZE for n in (*shape, first, last)) or len(shape) > 8:
        impossible = f"the impossible shape {brief(sizes)} or position {brief([first, last])}"
        raise ValueError(f"{path} is damaged: {key} has {impossible}")
    if (count := last - first) != math.prod(shape) * DTYPES[name].itemsize:
        raise ValueError(
            f"{path} is damaged: {key}, {name} of shape {sizes}, does not fill its {count:,} bytes"
        )
    return DTYPES[name], shape, first, last
