"""The three ways in which pictures become 299 x 299, each with its own effect on a Frechet distance (Parmar
et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features.sizes import by_size

SIZE = 299  # of the sides of what Inception sees

Resize = Callable[[Tensor], Tensor]


def clean(pictures: Tensor) -> Tensor:
    """PIL's bicubic filter, which widens where pictures shrink, on float channels; cut off at 0 and 255, not
    rounded (Parmar et al. 2022).

    uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [0, 255], as the others. In between float64, as PIL's
    weights and sums are: float32's are up to 0.005 of 255 off. Channel by channel: each takes more memory
    than the picture.
    """
    channels = [
        F.interpolate(channel.double(), (SIZE, SIZE), mode="bicubic", antialias=True)
        for channel in pictures.split(1, dim=1)
    ]
    return torch.cat(channels, dim=1).clamp(0, 255).float()


def legacy_pytorch(pictures: Tensor) -> Tensor:
    """Bilinear with half-pixel centres, which skips pixels where pictures shrink by more than two
    (pytorch-fid)."""
    return F.interpolate(pictures.float(), (SIZE, SIZE), mode="bilinear", align_corners=False)


def tensorflow1(pictures: Tensor) -> Tensor:
    """TensorFlow 1's ResizeBilinear: pixel i is read at i * H / 299, half a pixel up and left of where it
    should be."""
    return _interpolated(_interpolated(pictures, 3), 2)


def _interpolated(x: Tensor, dim: int) -> Tensor:
    """Linear along one dimension, which gets 299 long; beyond the last pixel there is the last pixel."""
    length = x.shape[dim]
    # A float32 product, as TensorFlow takes it: where it falls short of a whole number, so does the index.
    place = torch.arange(SIZE, dtype=torch.float32, device=x.device) * torch.tensor(
        length / SIZE, dtype=torch.float32
    )
    low = place.long()
    high = (low + 1).clamp(max=length - 1)
    weight = (place - low).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    return torch.lerp(x.index_select(dim, low).float(), x.index_select(dim, high).float(), weight)


RESIZES: dict[str, Resize] = {"clean": clean, "legacy_pytorch": legacy_pytorch, "tensorflow1": tensorflow1}


def resized(pictures: Sequence[Tensor], resize: Resize) -> Tensor:
    """Pictures uint8 (3, H, W), of any sizes, in their order: float32 (N, 3, 299, 299). Those of equal size
    are resized together."""
    for i, picture in enumerate(pictures):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3 or picture.numel() == 0:
            raise ValueError(
                f"picture {i} is {picture.dtype} {tuple(picture.shape)}: pictures are uint8 (3, H, W)"
            )
    if not pictures:
        raise ValueError("no pictures to resize: at least one is needed")
    return by_size(pictures, resize)
