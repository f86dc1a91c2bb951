"""Three ways to resize to 299 x 299, which give different Frechet distances (Parmar et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features.sizes import by_size

SIZE = 299  # pixels per side of Inception's input

Resize = Callable[[Tensor], Tensor]


def clean(pictures: Tensor) -> Tensor:
    """PIL's bicubic filter, which widens when pictures shrink, on float channels (Parmar et al. 2022).

    uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299), clipped to [0, 255] and not rounded. Computed in float64,
    as by PIL (float32 is up to 0.005 of 255 off), channel by channel to save memory.
    """
    channels = [
        F.interpolate(channel.double(), (SIZE, SIZE), mode="bicubic", antialias=True)
        for channel in pictures.split(1, dim=1)
    ]
    return torch.cat(channels, dim=1).clamp(0, 255).float()


def legacy_pytorch(pictures: Tensor) -> Tensor:
    """Bilinear with half-pixel centres (pytorch-fid); skips pixels when pictures shrink by more than two."""
    return F.interpolate(pictures.float(), (SIZE, SIZE), mode="bilinear", align_corners=False)


def tensorflow1(pictures: Tensor) -> Tensor:
    """TensorFlow 1's ResizeBilinear: pixel i is read at i * H / 299, half a pixel too far up and left."""
    return _interpolated(_interpolated(pictures, 3), 2)


def _interpolated(x: Tensor, dim: int) -> Tensor:
    """Linear along one dimension, to a length of 299; the last pixel is repeated."""
    length = x.shape[dim]
    # A float32 product, as in TensorFlow, which may round to the index before.
    scale = torch.tensor(length / SIZE, dtype=torch.float32)
    place = torch.arange(SIZE, dtype=torch.float32, device=x.device) * scale
    low = place.long()
    high = (low + 1).clamp(max=length - 1)
    weight = (place - low).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    return torch.lerp(x.index_select(dim, low).float(), x.index_select(dim, high).float(), weight)


RESIZES: dict[str, Resize] = {"clean": clean, "legacy_pytorch": legacy_pytorch, "tensorflow1": tensorflow1}


def resized(pictures: Sequence[Tensor], resize: Resize) -> Tensor:
    """Pictures uint8 (3, H, W) of any sizes -> float32 (N, 3, 299, 299). Equal sizes are resized together."""
    for i, picture in enumerate(pictures):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3 or picture.numel() == 0:
            raise ValueError(
                f"picture {i} is {picture.dtype} {tuple(picture.shape)}: pictures are uint8 (3, H, W)"
            )
    if not pictures:
        raise ValueError("no pictures to resize: at least one is needed")
    return by_size(pictures, resize)
