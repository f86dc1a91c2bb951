"""Keys and shapes of published weights, without the weights.

manifests.json.gz holds them by name: {"sd15_unet_ldm": {key: shape}, ...}. They were read off the reference
implementations, built on the meta device with the published configurations; the number of values in each
agrees with what its publisher states.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch

from models.files.stored import Stored, TensorFile


@dataclass(frozen=True, eq=False)
class Declared(Stored):
    """A tensor of which a header speaks, and which is not there to be read."""

    def chunks(self, of: int = 1) -> NoReturn:
        raise AssertionError(f"{self.key} was read, where keys and shapes must do")


@cache
def manifests() -> dict[str, dict[str, tuple[int, ...]]]:
    """All of them, by name."""
    with gzip.open(Path(__file__).with_name("manifests.json.gz"), "rt") as file:
        return {
            name: {key: tuple(shape) for key, shape in tensors.items()}
            for name, tensors in json.load(file).items()
        }


def declared(name: str, **more: tuple[int, ...]) -> TensorFile:
    """A published file as its header describes it; `more` adds tensors."""
    return file_of(manifests()[name] | more, f"{name}.safetensors")


def file_of(shapes: Mapping[str, tuple[int, ...]], name: str = "file.safetensors") -> TensorFile:
    return TensorFile(
        Path(name), {key: Declared(Path(name), (key,), shape, torch.float16) for key, shape in shapes.items()}
    )
