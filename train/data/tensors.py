"""Pictures held in memory, from a notebook or a test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from samplers.pictures import to_uint8
from train.data.captions import prompts_for
from train.data.names import number_names
from train.data.source import Unreadable

Labels = Sequence[str | int] | Tensor


class TensorPictures:
    """Pictures uint8 (N, 3 or 1, H, W), values 0 ... 255. `from_unit` and `from_signed` take other ranges.

    labels   the class of each, (N,), numbers or names
    prompts  the caption of each
    origin   their name in results
    """

    labels: Sequence[str] | None
    prompts: Sequence[str] | None

    def __init__(
        self,
        images: Tensor,
        labels: Labels | None = None,
        prompts: Sequence[str] | None = None,
        origin: str = "memory",
    ) -> None:
        if images.dtype != torch.uint8:
            hint = "from_unit takes [0, 1], from_signed [-1, 1]"
            raise ValueError(f"pictures are uint8, 0 ... 255, not {images.dtype}: {hint}")
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"pictures need a shape (N, 3, H, W) or (N, 1, H, W), not {tuple(images.shape)}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} pictures: give one each")
        self._images = images.cpu().expand(-1, 3, -1, -1)
        self.origin = origin
        self.names: Sequence[str] = number_names(len(images))
        values = labels.tolist() if isinstance(labels, Tensor) else labels
        self.labels = None if values is None else [str(label) for label in values]
        self.prompts = None if prompts is None else prompts_for(prompts, self.names)

    @classmethod
    def from_unit(
        cls,
        images: Tensor,
        labels: Labels | None = None,
        prompts: Sequence[str] | None = None,
        origin: str = "memory",
    ) -> TensorPictures:
        """From images in [0, 1], as of `generate`, rounded to the nearest. ValueError for other values."""
        low, high = (0.0, 1.0) if images.numel() == 0 else (float(images.min()), float(images.max()))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"values from {low:g} to {high:g} are not in [0, 1]: from_signed takes [-1, 1]")
        return cls(to_uint8(images, low=0.0), labels, prompts, origin)

    @classmethod
    def from_signed(
        cls,
        images: Tensor,
        labels: Labels | None = None,
        prompts: Sequence[str] | None = None,
        origin: str = "memory",
    ) -> TensorPictures:
        """From images in [-1, 1], as of `sample`, rounded to the nearest and clamped."""
        return cls(to_uint8(images), labels, prompts, origin)

    @cached_property
    def stamp(self) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self._images.contiguous().numpy().data).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
        """See `Source`."""
        return [self._images[i] for i in indices]
