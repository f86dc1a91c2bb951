"""A safetensors file that is filled some rows at a time, so that it may be larger than the memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.files.stored import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_header(file: BinaryIO, like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write zeros for tensors like these, which may be on the meta device; the first byte of each."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    # The largest items first, so that each tensor begins at a multiple of its item's size
    for name, value in sorted(like.items(), key=lambda item: -item[1].itemsize):
        starts[name], end = end, end + value.nbytes
        offsets = [starts[name], end]
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(begin + end)
    return {name: begin + start for name, start in starts.items()}


def write_rows(file: BinaryIO, start: int, row: int, values: Tensor) -> None:
    """Write rows (n, ...), from number `row` on, of a tensor that begins at byte `start`."""
    file.seek(start + row * values[0].nbytes)
    file.write(values.cpu().flatten().view(torch.uint8).numpy().data)
