"""Rotary positions: queries and keys are turned by angles that grow with position, so that products know
distances (Su et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def positions(text: int, height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column) of every token, (text + height*width, 3): text stands at 0, and comes first."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return torch.cat([image.new_zeros(text, 3), image])


def turns(positions: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """Cosine and sine of every token's angles, (L, d/2, 2), computed in float64 and rounded.

    Of d = sum(axes) features axes[i] turn with coordinate i, at the frequencies theta^(-2k/axes[i]) (eq. 15).
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64  # which is not everywhere
    angles = []
    for coordinate, dim in zip(positions.to(wide).unbind(-1), axes, strict=True):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=wide, device=positions.device) / dim)
        angles.append(coordinate[:, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Each pair of neighbouring features of x (B, H, L, d) is a complex number, and turns (eq. 13); in
    float32 whatever less x has."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if (
        torch.compiler.is_compiling()
    ):  # real numbers are computed together with what stands around them, complex ones are not
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(-2).to(x.dtype)
