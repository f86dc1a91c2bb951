"""Safetensors, by our own reader of the format: eight bytes of length, a JSON header, then the data, which is
memory-mapped."""

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
            pickled = (
                "; it seems to be a pickle, whose name would end in .ckpt or .pt"
                if start.startswith((b"PK", b"\x80"))
                else ""
            )
            raise ValueError(f"{path} is no safetensors file: it begins with {start!r}{pickled}")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is damaged: its header should be {length:,} bytes long, and the file has {size:,}; "
                "get it again"
            )
        text = file.read(length)
    if (
        text.count(b"[") + text.count(b"{") > 20 * MAX_TENSORS
    ):  # three for each tensor, and what metadata hold
        raise ValueError(f"{path} holds no model: its header is of far more parts than any known one's")
    try:
        header = json.loads(text, object_pairs_hook=_no_key_twice)
        if not isinstance(header, dict):
            raise ValueError("it is no table of tensors")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file: its header cannot be read ({error})"
        ) from None
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
            raise ValueError(
                f"{path} is damaged: {other} {what} {key} (it starts at byte {first:,} of the data, not "
                f"{last:,})"
            )
    _, last, key = ends[-1] if ends else (0, 0, "the header")
    if begin + last != size:
        raise ValueError(
            f"{path} is damaged: {key} ends at byte {begin + last:,}, the file at {size:,}; get it again"
        )
    return TensorFile(path, tensors, metadata)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # add gives None
        raise ValueError(f"{one_line(twice)} stands in it twice")
    return found


def _check_entry(path: Path, key: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of one tensor in the header."""
    check_name(path, key)
    try:
        name, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path} is damaged: {key} lacks dtype, shape or data_offsets") from None
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(
            f"{path} cannot be read: {key} has the dtype {brief(name)}; known are {', '.join(DTYPES)}"
        )
    if not all(type(n) is int and 0 <= n < MAX_SIZE for n in (*shape, first, last)) or len(shape) > 8:
        raise ValueError(
            f"{path} is damaged: {key} has no possible shape {brief(list(shape))} or place "
            f"{brief([first, last])}"
        )
    if last - first != math.prod(shape) * DTYPES[name].itemsize:
        raise ValueError(
            f"{path} is damaged: {key}, {name} of shape {list(shape)}, does not fill its {last - first:,} "
            "bytes"
        )
    return DTYPES[name], shape, first, last
