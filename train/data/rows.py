"""A safetensors file that is filled some rows at a time, so that more fits into it than into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.files.stored import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_header(file: BinaryIO, like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
    """Make an empty file as large as these tensors, which may be on the meta device, all zeros; at which byte
    each begins."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, value in sorted(
        like.items(), key=lambda item: -item[1].itemsize
    ):  # so that each begins at a multiple of its item's size
        starts[name] = end
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(begin + end)
    return {name: begin + start for name, start in starts.items()}


def write_rows(file: BinaryIO, start: int, row: int, values: Tensor) -> None:
    """Put rows (n, ...) of a tensor that begins at byte `start` into their place, from number `row` on."""
    file.seek(start + row * values[0].nbytes)
    file.write(values.cpu().flatten().view(torch.uint8).numpy().data)
