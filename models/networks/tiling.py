"""Large images in little memory: an autoencoder tile by tile, or sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from models.networks.taesd import TAESD
from models.networks.vae import VAE, LatentDistribution


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: int | Fraction = 1
) -> Tensor:
    """function(x) from its values on overlapping tiles, blended linearly where they overlap. Memory is that
    of one tile, and the output.

    function  (B, C, h, w) -> (B, C', h * factor, w * factor) for any h and w
    tile      height and width of a tile of x, and of x itself where that is smaller; a tile that covers x is
              a plain call
    overlap   how much neighbours share at least, at most half a tile; tiles are spread evenly, so that it may
              be more
    factor    pixels of the output per pixel of x: 8 for decoding, Fraction(1, 8) for encoding

    Exact for a function that is local; one that looks around, or at the whole (group normalisation), is cut
    at the borders of tiles. Gradients flow, and then memory is that of all tiles. ValueError where tile,
    overlap or x do not come out even under the factor.
    """
    factor = Fraction(factor)
    cell = factor.denominator  # pixels of x for a whole number of the output
    if not 0 <= 2 * overlap <= tile or tile < 1:
        raise ValueError(f"tiles need 0 <= overlap <= tile / 2, not overlap={overlap} with tile={tile}")
    for name, size in (("tile", tile), ("overlap", overlap), ("height", x.shape[-2]), ("width", x.shape[-1])):
        if size % cell:
            raise ValueError(
                f"{name}={size} must divide by {cell}: {cell} pixels of the input make {factor.numerator} "
                "of the output"
            )
    if x.shape[-2] <= tile and x.shape[-1] <= tile:
        return function(x)

    def strip(rows: Tensor) -> Tensor:
        return _joined(function, rows, -1, tile // cell, overlap // cell, factor)

    return _joined(strip, x, -2, tile // cell, overlap // cell, factor)


def sliced(function: Callable[[Tensor], Tensor], x: Tensor, size: int = 1) -> Tensor:
    """function(x) from `size` samples at a time: memory is that of so many."""
    if size < 1:
        raise ValueError(f"slices need at least one sample each, not size={size}")
    return torch.cat([function(part) for part in x.split(size)])


def decode_tiled(vae: VAE | TAESD, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """vae.decode(latents) by tiles of that many latents. Each has group statistics of its own, so that tone
    may drift; seams are faded."""
    return tiled(vae.decode, latents, tile, overlap, vae.factor)


def encode_tiled(vae: VAE, images: Tensor, tile: int = 512, overlap: int = 128) -> LatentDistribution:
    """vae.encode(images) by tiles of that many pixels; means and standard deviations are blended."""

    def moments(part: Tensor) -> Tensor:
        latents = vae.encode(part)
        return torch.cat([latents.mean, latents.std], dim=1)

    mean, std = tiled(moments, images, tile, overlap, Fraction(1, vae.factor)).chunk(2, dim=1)
    return LatentDistribution(mean, std)


def _joined(
    function: Callable[[Tensor], Tensor], x: Tensor, dim: int, tile: int, overlap: int, factor: Fraction
) -> Tensor:
    """The function on tiles along one dimension, joined; sizes are in cells."""
    size, cell = x.shape[dim] // factor.denominator, factor.denominator
    out, done = x, 0
    for start in _starts(size, tile, overlap):
        part = function(x.narrow(dim, start * cell, min(tile, size) * cell))
        out = _blended(out, part, dim, (done - start) * factor.numerator) if done else part
        done = start + tile
    return out


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: as few as cover the size with that overlap, evenly spread, the last one flush with
    the end."""
    if size <= tile:
        return [0]
    steps = -(-(size - tile) // (tile - overlap))
    return [i * (size - tile) // steps for i in range(steps + 1)]


def _blended(left: Tensor, right: Tensor, dim: int, shared: int) -> Tensor:
    """Two neighbours joined; over the shared pixels it fades from the left to the right one. Exact where they
    are equal."""
    fade = (torch.arange(shared, dtype=left.dtype, device=left.device) + 0.5) / shared
    fade = fade if dim == -1 else fade[:, None]
    kept, added = left.shape[dim] - shared, right.shape[dim] - shared
    middle = torch.lerp(left.narrow(dim, kept, shared), right.narrow(dim, 0, shared), fade)
    return torch.cat([left.narrow(dim, 0, kept), middle, right.narrow(dim, shared, added)], dim=dim)
