"""Real photographs that lie on every machine that runs the tests."""

from __future__ import annotations

import numpy as np
import skimage.data
import torch
from torch import Tensor


def photographs() -> dict[str, Tensor]:
    """uint8 (3, H, W): 512 x 512, 400 x 600 and 300 x 451."""
    pictures = {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")}
    return {
        name: torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        for name, picture in pictures.items()
    }
