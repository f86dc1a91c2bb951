"""The tiny autoencoder: what diffusers computes with the same weights, and the numbers of the published
layers."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from models.networks.taesd import TAESD, TAESDParams
from tests.models.small import randomised, relative_error
from tests.peers import diffusers


def made(params: TAESDParams) -> TAESD:
    network = TAESD(params)
    randomised(network)
    return network


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def translated(name: str) -> str:
    """A house name to that of diffusers."""
    part, number, rest = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
    rest = re.sub(r"^conv(\d)", lambda match: f"conv.{2 * int(match[1]) - 2}", rest)
    return f"{part}.layers.{int(number) - (part == 'decoder')}.{rest}"


@pytest.mark.parametrize(("channels", "count"), [(4, 2_445_063), (16, 2_458_899)])
def test_output_and_gradients_equal_diffusers(channels: int, count: int) -> None:
    """Latents, images (of latents far beyond the clamp too) and the gradients of all weights, at the
    published sizes."""
    ours = made(TAESDParams(channels))
    theirs: Any = diffusers.AutoencoderTiny(latent_channels=channels)
    assert sum(p.numel() for p in ours.parameters()) == count
    theirs.load_state_dict(
        {translated(name): value for name, value in ours.state_dict().items()}, strict=True
    )
    images, latents = normal(2, 3, 16, 24).tanh(), 4 * normal(2, channels, 3, 2)
    mine, expected = (
        [ours.encode(images), ours.decode(latents)],
        [theirs.encode(images).latents, theirs.decode(latents).sample],
    )
    for out, reference in zip(mine, expected, strict=True):
        assert relative_error(out, reference) <= 1e-5

    # In float64: rounding to float32 puts a ReLU on the other side of zero on some processors, and its
    # gradient with it.
    ours, theirs, images, latents = ours.double(), theirs.double(), images.double(), latents.double()
    mine, expected = (
        [ours.encode(images), ours.decode(latents)],
        [theirs.encode(images).latents, theirs.decode(latents).sample],
    )
    loss, reference = (sum((x * normal(*x.shape)).sum() for x in outputs) for outputs in (mine, expected))
    assert isinstance(loss, Tensor)
    assert isinstance(reference, Tensor)
    loss.backward()
    reference.backward()
    for name, p in ours.named_parameters():
        peer = theirs.get_parameter(translated(name))
        assert p.grad is not None
        assert (p.grad - peer.grad).norm() <= 1e-11 * peer.grad.norm(), name


def test_layers_are_numbered_as_published() -> None:
    """Encoder 0 to 14; decoder 1 to 19 without the activation and the three upsamplings; strided and
    upsampled layers have no bias."""
    with torch.device("meta"):
        network = TAESD(TAESDParams())
    for part, numbers, plain in (
        (network.encoder, range(15), {2, 6, 10}),
        (network.decoder, set(range(1, 20)) - {2, 6, 11, 16}, {7, 12, 17}),
    ):
        names = part.state_dict()
        assert len(names) == 67
        assert {int(name.split(".")[0]) for name in names} == set(numbers)
        assert {
            int(name.split(".")[0])
            for name in names
            if name.count(".") == 1 and f"{name.split('.')[0]}.bias" not in names
        } == plain


def test_images_and_latents_are_in_the_units_of_the_diffusion_model() -> None:
    """The layers see images in [0, 1] and latents softly clamped to 3; outside, images are in [-1, 1]."""
    network = made(TAESDParams(channels=8))
    images, latents = normal(2, 3, 8, 8).tanh(), 10 * normal(2, 4, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network.encode(2 * images - 1), network.encoder(images))
        decoded = network.decoder[1:](3 * (latents / 3).tanh())
        torch.testing.assert_close(network.decode(latents), 2 * decoded - 1)
        torch.testing.assert_close(network(images), network.decode(network.encode(images)))


def test_fresh_blocks_are_the_identity() -> None:
    """Before training a block passes on what is positive, as ReLU left it."""
    network = TAESD(TAESDParams(channels=8))
    x = normal(2, 8, 3, 4).relu()
    for block in (network.encoder[1], network.encoder[13], network.decoder[3], network.decoder[18]):
        assert torch.equal(block(x), x)


@pytest.mark.usefixtures("native_halves")
def test_overflow_in_fp16_is_computed_again_in_float32() -> None:
    """The result is that of the fp16 weights in float32, with a warning."""
    network = made(TAESDParams(channels=8)).half()
    with torch.no_grad():
        network.get_parameter("decoder.7.weight").mul_(1e5)
        network.get_parameter("decoder.19.weight").mul_(1e-4)
        with pytest.warns(RuntimeWarning, match=r"overflowed in torch.float16"):
            out = network.decode(normal(1, 4, 2, 2))
        assert torch.equal(out, copy.deepcopy(network).float().decode(normal(1, 4, 2, 2)))
    assert out.isfinite().all()
    assert out.dtype == torch.float32


def test_refuses_other_shapes() -> None:
    """Sizes that do not divide by 8, and another number of channels."""
    network = TAESD(TAESDParams(channels=8))
    with pytest.raises(ValueError, match="an image of 12x16 pixels does not divide into latents of 8x8"):
        network.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match=r"latents must be floating point \(B, 4, H, W\)"):
        network.decode(torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match="latent_channels must be at least 1"):
        TAESDParams(0)
