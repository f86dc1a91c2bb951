"""The three resizes against closed forms and the tools they are named after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.features.protocols import PROTOCOLS, Protocol
from eval.features.resize import RESIZES, SIZE, clean, legacy_pytorch, resized, tensorflow1
from tests.eval.photographs import photographs
from tests.peers import cleanfid, torch_fidelity

ASTRONAUT, COFFEE, CHELSEA = photographs().values()
PICTURES = {
    "512 x 512": ASTRONAUT,
    "400 x 600": COFFEE,
    "300 x 451": CHELSEA,
    "299 x 299": CHELSEA[:, :299, :299],
    "64 x 300": COFFEE[:, :64, :300],
    "32 x 32": ASTRONAUT[:, 100:132, 200:232],
}


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
@pytest.mark.parametrize("name", PICTURES)
def test_as_clean_fid(mode: str, name: str) -> None:
    """Within 0.0014 of 255 of clean-fid's own resizers, on photographs, up and down: its clean one, and the
    one it has for pytorch-fid."""
    expected = cleanfid.resize.build_resizer(mode)(np.ascontiguousarray(PICTURES[name].permute(1, 2, 0)))
    out = RESIZES[mode](PICTURES[name][None])[0].permute(1, 2, 0)
    assert out.dtype == torch.float32
    assert np.abs(out.numpy() - expected).max() < 0.0014


@pytest.mark.parametrize("name", PICTURES)
def test_as_torch_fidelity(name: str) -> None:
    """Within 1e-4 of 255 of torch-fidelity's emulation of TensorFlow 1, which is exact."""
    picture = PICTURES[name][None]
    expected = torch_fidelity.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
        picture.float(), size=(SIZE, SIZE), align_corners=False
    )
    torch.testing.assert_close(tensorflow1(picture), expected, rtol=0, atol=1e-4)


def test_a_ramp_shows_where_pixels_are_read() -> None:
    """On a ramp of 100 columns, TensorFlow 1 reads column i at i / 2.99, the others half a pixel further in;
    to 1e-4, edges aside."""
    ramp = torch.arange(100, dtype=torch.uint8).expand(1, 3, 100, 100)
    columns = torch.arange(SIZE, dtype=torch.float64) * 100 / SIZE
    inside = slice(10, 285)
    for resize, shift in (
        (tensorflow1, 0.0),
        (legacy_pytorch, 0.5 * 100 / SIZE - 0.5),
        (clean, 0.5 * 100 / SIZE - 0.5),
    ):
        torch.testing.assert_close(
            resize(ramp)[0, 0, 7, inside].double(), columns[inside] + shift, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("name", RESIZES)
def test_one_colour_stays_and_range_is_kept(name: str) -> None:
    """A picture of one colour is that colour exactly to 1e-4, and black and white noise stays within [0, 255]
    to as much."""
    flat = torch.tensor([0, 100, 255], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 40, 333)
    torch.testing.assert_close(
        RESIZES[name](flat), flat[:, :, :1, :1].float().expand(1, 3, SIZE, SIZE), rtol=0, atol=1e-4
    )
    noise = 255 * torch.randint(
        2, (1, 3, 50, 400), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    out = RESIZES[name](noise)
    assert -1e-4 < out.min() < out.max() < 255 + 1e-4


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_antialiasing_is_as_the_protocol_says(protocol: Protocol) -> None:
    """A fine checkerboard, three times smaller, becomes grey where antialiased, and stays black and white
    where not."""
    rows = torch.arange(3 * SIZE)
    board = (255 * ((rows[:, None] + rows) % 2)).to(torch.uint8).expand(1, 3, -1, -1)
    contrast = RESIZES[protocol.resize](board).std()
    assert bool(contrast < 10) == protocol.antialias
    assert bool(contrast > 100) != protocol.antialias


@pytest.mark.parametrize("name", RESIZES)
def test_sizes_may_differ(name: str) -> None:
    """A list of several sizes comes back in its order, each picture as if it were alone."""
    every = list(PICTURES.values())
    mixed = [every[i] for i in (5, 0, 3, 5, 1, 0)]
    mixed[3] = 255 - mixed[3]
    out = resized(mixed, RESIZES[name])
    for row, picture in zip(out, mixed, strict=True):
        torch.testing.assert_close(row, RESIZES[name](picture[None])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8).byte(),
    ],
    ids=["float", "grey", "batch", "empty"],
)
def test_what_is_no_picture_is_refused(wrong: Tensor) -> None:
    """Its place, dtype and shape are named."""
    with pytest.raises(ValueError, match=r"picture 1 is torch\.\w+ \(.*\): pictures are uint8 \(3, H, W\)"):
        resized([torch.zeros(3, 8, 8, dtype=torch.uint8), wrong], clean)
    with pytest.raises(ValueError, match="no pictures to resize"):
        resized([], clean)
