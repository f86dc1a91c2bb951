"""Tiles: exact for local functions, faded by the stated weights, never larger than a tile; and what they cost
an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.taesd import TAESD, TAESDParams
from models.networks.tiling import decode_tiled, encode_tiled, sliced, tiled
from models.networks.vae import VAE, VAEParams
from tests.models.small import randomised

LOCAL: dict[str, tuple[Callable[[Tensor], Tensor], int | Fraction]] = {
    "pointwise": (lambda x: x.square() - 3, 1),
    "enlarged": (lambda x: F.interpolate(x, scale_factor=8.0, mode="nearest"), 8),
    "pooled": (lambda x: F.max_pool2d(x, 4), Fraction(1, 4)),
    "two to three": (
        lambda x: F.max_pool2d(F.interpolate(x, scale_factor=3.0, mode="nearest"), 2),
        Fraction(3, 2),
    ),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def small_vae() -> VAE:
    vae = VAE(VAEParams(channels=8, channel_mult=(1, 2), blocks=1, groups=4))
    randomised(vae)
    return vae


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (8, 4), (12, 4), (16, 8), (64, 32)])
@pytest.mark.parametrize("size", [(16, 40), (44, 4), (12, 20)])
@pytest.mark.parametrize("kind", LOCAL)
def test_local_functions_are_exact(kind: str, size: tuple[int, int], tile: int, overlap: int) -> None:
    """Bit by bit what the function gives at once, and its gradient."""
    function, factor = LOCAL[kind]
    x = normal(2, 3, *size).double().requires_grad_()
    out, plain = tiled(function, x, tile, overlap, factor), function(x)
    assert torch.equal(out, plain)
    weight = normal(*plain.shape).double()
    (mine,), (expected,) = (torch.autograd.grad((y * weight).sum(), x) for y in (out, plain))
    torch.testing.assert_close(mine, expected, rtol=1e-14, atol=1e-14)


def test_tiles_fade_linearly_into_each_other() -> None:
    """Tiles of constants 0, 1, 2, ... in reading order: piecewise linear, with a step of 1/n at each of n
    shared pixels' edges."""
    numbers = iter(range(4))
    out = tiled(
        lambda x: torch.full_like(x, next(numbers)).repeat_interleave(2, -1).repeat_interleave(2, -2),
        normal(1, 1, 6, 5),
        4,
        2,
        2,
    )
    down = torch.tensor(
        [0, 0, 0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1, 1, 1]
    )  # two tiles of 8 on 12: 4 are shared
    across = torch.tensor([0, 0, 1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12, 1, 1])  # on 10: 6 are
    torch.testing.assert_close(out[0, 0], 2 * down[:, None] + across, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "tiles"),
    [(64, 64, 16, 1), (65, 64, 16, 2), (112, 64, 16, 2), (113, 64, 16, 3), (1000, 64, 32, 31)],
)
def test_no_tile_is_larger_than_asked(size: int, tile: int, overlap: int, tiles: int) -> None:
    """As few tiles as cover the image with at least that overlap, all of one size."""
    seen: list[tuple[int, ...]] = []

    def watched(x: Tensor) -> Tensor:
        seen.append((int(x[0, 0, 0, 0]), *x.shape))
        return x

    x = torch.arange(size, dtype=torch.float64).expand(1, 1, 20, size)
    assert torch.equal(tiled(watched, x, tile, overlap), x)
    assert {tuple(shape) for _, *shape in seen} == {(1, 1, 20, tile)}
    starts = [start for start, *_ in seen]
    assert len(starts) == tiles
    assert (starts[0], starts[-1]) == (0, size - tile)
    assert all(b - a <= tile - overlap for a, b in pairwise(starts))


def test_slices_are_single_samples() -> None:
    """A function of each sample alone gives the same, from batches of the size asked for."""
    seen: list[int] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x / x.amax(dim=(1, 2, 3), keepdim=True)

    x = normal(5, 3, 4, 4)
    assert torch.equal(sliced(watched, x), watched(x))
    assert torch.equal(sliced(watched, x, size=2), watched(x))
    assert seen == [1, 1, 1, 1, 1, 5, 2, 2, 1, 5]
    with pytest.raises(ValueError, match="slices need at least one sample, not size=0"):
        sliced(watched, x, size=0)


@pytest.mark.parametrize("tile", [12, 64])
def test_a_tile_that_covers_the_image_is_the_plain_call(tile: int) -> None:
    """Bit by bit, encoding and decoding."""
    vae = small_vae()
    latents, images = normal(2, 4, 12, 7), normal(2, 3, 24, 14)
    with torch.no_grad():
        assert torch.equal(decode_tiled(vae, latents, tile, 4), vae.decode(latents))
        tiles, plain = encode_tiled(vae, images, 2 * tile, 8), vae.encode(images)
    assert torch.equal(tiles.mean, plain.mean)
    assert torch.equal(tiles.std, plain.std)


def test_tiny_autoencoder_differs_within_the_overlap_only() -> None:
    """It sees 19 latents far, so that an overlap of that many hides every cut but within itself."""
    network = TAESD(TAESDParams(channels=8))
    randomised(network)
    latents = normal(1, 4, 8, 70)
    with torch.no_grad():
        plain, tiles = network.decode(latents), decode_tiled(network, latents, 48, 20)
    start, stop = 8 * (70 - 48), 8 * 48
    for outside in (slice(0, start), slice(stop, None)):
        torch.testing.assert_close(tiles[..., outside], plain[..., outside], rtol=0, atol=1e-5)
    assert not torch.allclose(tiles, plain, atol=1e-3)


def test_seams_of_an_autoencoder_are_small() -> None:
    """Every tile has its own group statistics and borders: a step at the seam where tiles are butted, lost
    among the others when faded."""
    vae = small_vae()
    latents = F.interpolate(normal(1, 4, 6, 8), scale_factor=8.0, mode="bicubic") + 0.3 * normal(1, 4, 48, 64)

    def steps(image: Tensor) -> Tensor:
        """How much neighbouring columns differ."""
        return image.diff(dim=-1).abs().mean(dim=(0, 1, 2))

    with torch.no_grad():
        plain = vae.decode(latents)
        butted, faded = (
            steps(decode_tiled(vae, latents, 32, overlap) - plain) / steps(plain) for overlap in (0, 8)
        )
    assert butted[60:68].max() > 2  # the seam is at 64
    assert faded.max() < 0.5


@pytest.mark.parametrize(
    ("tile", "overlap", "factor", "message"),
    [
        (8, 5, 1, "overlap <= tile / 2, not overlap=5 with tile=8"),
        (8, -1, 1, "0 <= overlap"),
        (0, 0, 1, "not overlap=0 with tile=0"),
        (12, 0, Fraction(1, 8), "tile=12 must divide by 8: 8 pixels of the input make 1 of the output"),
        (16, 4, Fraction(1, 8), "overlap=4 must divide by 8"),
        (8, 0, Fraction(1, 8), "width=20 must divide by 8"),
        (10, 0, Fraction(1, 5), "height=16 must divide by 5"),
    ],
)
def test_refuses_tiles_that_do_not_come_out_even(
    tile: int, overlap: int, factor: int | Fraction, message: str
) -> None:
    """Before anything is computed."""
    with pytest.raises(ValueError, match=message):
        tiled(lambda x: x, torch.zeros(1, 1, 16, 20), tile, overlap, factor)
