"""Large images in little memory: autoencoders tile by tile, or sample by sample."""

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
    """function(x) from overlapping tiles, blended linearly: it needs the memory of one tile and the output.

    function  (B, C, h, w) -> (B, C', h * factor, w * factor) for any h and w
    tile      height and width of a tile of x; if x is smaller, function(x) is called once
    overlap   minimum overlap of neighbours, at most half a tile; tiles are spread evenly, so it may be larger
    factor    output pixels per pixel of x: 8 for decoding, Fraction(1, 8) for encoding

    Exact for pointwise functions. Convolutions and group norms do not see beyond a tile. Gradients need the
    memory of all tiles. ValueError unless tile, overlap and x give whole numbers of output pixels.
    """
    factor = Fraction(factor)
    cell = factor.denominator  # pixels of x per whole number of output pixels
    if not 0 <= 2 * overlap <= tile or tile < 1:
        raise ValueError(f"tiles need 0 <= overlap <= tile / 2, not overlap={overlap} with tile={tile}")
    for name, size in (("tile", tile), ("overlap", overlap), ("height", x.shape[-2]), ("width", x.shape[-1])):
        if size % cell:
            ratio = f"{cell} pixels of the input make {factor.numerator} of the output"
            raise ValueError(f"{name}={size} must divide by {cell}: {ratio}")
    if x.shape[-2] <= tile and x.shape[-1] <= tile:
        return function(x)

    def strip(rows: Tensor) -> Tensor:
        return _tile_along(-1, function, rows, tile // cell, overlap // cell, factor)

    return _tile_along(-2, strip, x, tile // cell, overlap // cell, factor)


def sliced(function: Callable[[Tensor], Tensor], x: Tensor, size: int = 1) -> Tensor:
    """function(x), computed for `size` samples at a time to save memory."""
    if size < 1:
        raise ValueError(f"slices need at least one sample, not size={size}")
    return torch.cat([function(part) for part in x.split(size)])


def decode_tiled(vae: VAE | TAESD, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """vae.decode(latents) in blended tiles of latents. Tones may drift, as group norms differ per tile."""
    return tiled(vae.decode, latents, tile, overlap, vae.factor)


def encode_tiled(vae: VAE, images: Tensor, tile: int = 512, overlap: int = 128) -> LatentDistribution:
    """vae.encode(images) in tiles of pixels; means and standard deviations are blended."""

    def moments(part: Tensor) -> Tensor:
        latents = vae.encode(part)
        return torch.cat([latents.mean, latents.std], dim=1)

    mean, std = tiled(moments, images, tile, overlap, Fraction(1, vae.factor)).chunk(2, dim=1)
    return LatentDistribution(mean, std)


def _tile_along(
    dim: int, function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: Fraction
) -> Tensor:
    """The function on tiles along one dimension, blended; sizes are in cells."""
    size, cell = x.shape[dim] // factor.denominator, factor.denominator
    out, done = x, 0
    for start in _starts(size, tile, overlap):
        part = function(x.narrow(dim, start * cell, min(tile, size) * cell))
        out = _blend(out, part, dim, (done - start) * factor.numerator) if done else part
        done = start + tile
    return out


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Starts of the fewest tiles that cover the size with that overlap, evenly spread up to the end."""
    if size <= tile:
        return [0]
    steps = -(-(size - tile) // (tile - overlap))
    return [i * (size - tile) // steps for i in range(steps + 1)]


def _blend(left: Tensor, right: Tensor, dim: int, shared: int) -> Tensor:
    """Two neighbours, faded into each other over the shared pixels. Exact where they are equal."""
    fade = (torch.arange(shared, dtype=left.dtype, device=left.device) + 0.5) / shared
    fade = fade if dim == -1 else fade[:, None]
    before, after = left.shape[dim] - shared, right.shape[dim] - shared
    middle = torch.lerp(left.narrow(dim, before, shared), right.narrow(dim, 0, shared), fade)
    return torch.cat([left.narrow(dim, 0, before), middle, right.narrow(dim, shared, after)], dim=dim)
