"""Distance to the nearest training image: samples that lie closer than unseen real data does are copies."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """For each image of x (N, ...) the Euclidean distance to its nearest image of reference (M, ...), (N,)."""
    return torch.cdist(x.flatten(1), reference.flatten(1)).amin(1)
