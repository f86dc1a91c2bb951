"""Rotary positions: queries and keys are rotated by angles proportional to position (Su et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def positions(text: int, height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column) of every token, (text + height*width, 3): text comes first, at position 0."""
    sides = (torch.arange(size, device=device) for size in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return torch.cat([image.new_zeros(text, 3), image])


def rotations(positions: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """Cosine and sine of the angles of positions (L, n), in (L, d/2, 2); computed in float64, then rounded.

    d = sum(axes): axes[i] features rotate with coordinate i, at the frequencies theta^(-2k/axes[i]) (eq. 15).
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64  # which MPS does not have
    angles = []
    for coordinate, dim in zip(positions.to(wide).unbind(-1), axes, strict=True):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=wide, device=positions.device) / dim)
        angles.append(coordinate[:, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotates pairs of features of x (B, H, L, d), as complex numbers (eq. 13), at least in float32."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it fuses real numbers with their neighbours, but not complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        out = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
    return out.flatten(-2).to(x.dtype)
