"""A source of pictures from plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import initial_noise
from diffusion.spec import check_at_least_one, make, make_params
from eval.images.generated import open_generated
from samplers.pictures import MAX_PIXELS, to_uint8
from train.data import digits
from train.data.open import open_pictures
from train.data.source import Source
from train.data.tensors import TensorPictures


def open_source(
    spec: str | Path | Mapping[str, Any],
    prompts: str | None = None,
    max_pixels: int = MAX_PIXELS,
    classes: Sequence[Sequence[str]] | None = None,
) -> Source:
    """A source of pictures: files (`open_pictures`), or a mapping:

        {"run": FOLDER, "n": 270} or {"weights": FILE, "prompts": FILE}  what a model draws: `open_generated`
        {"name": "digits", "split": "held_out"}                          a data set; exact: true: unrounded
        {"name": "digits", "split": "train", "n": 270}                   n random ones of it, of the `classes`
        {"noise": [3, 32, 32], "n": 270}                                 noise of that shape

    prompts  a file of one prompt per picture (`read_prompts`), instead of captions beside the files
    classes  the class of each of the n pictures, by name, in parts: of a data set, each part is chosen anew
    """
    if not isinstance(spec, Mapping):
        return open_pictures(spec, prompts, max_pixels)
    if prompts is not None:
        raise ValueError(
            "give the prompts of a model that draws with its weights: {weights: ..., prompts: FILE}"
        )
    origin = ", ".join(str(value) for value in spec.values())
    flat = None if classes is None else list(chain(*classes))
    if "name" in spec:
        return _dataset(spec, classes, origin)
    if "noise" in spec:
        values = {"shape" if key == "noise" else key: value for key, value in spec.items()}
        noise = make_params("noise", _Noise, values)
        images = initial_noise(range(noise.n), noise.shape)
        return TensorPictures.from_signed(images, flat, origin=f"noise, {origin}")
    return open_generated(spec, flat)


@dataclass(frozen=True)
class _Noise:
    shape: tuple[int, int, int]
    n: int

    def __post_init__(self) -> None:
        check_at_least_one(self, "shape", "n")


def _dataset(spec: Mapping[str, Any], classes: Sequence[Sequence[str]] | None, origin: str) -> Source:
    """A data set, or n random pictures of it; within each part all are different."""
    own = {key: value for key, value in spec.items() if key not in ("n", "exact")}
    data = make("data set", own, {"digits": digits})
    images, labels = data.images, data.labels
    if "n" in spec:
        if classes is None or labels is None:
            raise ValueError("n of a data set's pictures are chosen by class: classes=reference")
        parts = [torch.tensor(list(map(int, part))) for part in classes]
        chosen = torch.cat([data.pick_by_class(part, seed) for seed, part in enumerate(parts)])
        images, labels = images[chosen], labels[chosen]
    kind = Unrounded if spec.get("exact") else TensorPictures.from_signed
    return kind(images, labels, origin=origin)


class Unrounded(TensorPictures):
    """Images in [-1, 1], scaled to 0 ... 255 without rounding, for extractors that take such pictures."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, origin: str = "memory") -> None:
        super().__init__(to_uint8(images), labels, origin=origin)
        self._images = ((images + 1) * 127.5).expand(-1, 3, -1, -1)
