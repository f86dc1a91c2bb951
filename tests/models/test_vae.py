"""The autoencoder: what diffusers computes with the same weights, in the diffusion model's units, and never
an image that is not finite."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion.noise import initial_noise
from models.networks.vae import VAE, LatentDistribution, VAEParams
from tests.models.small import randomised, relative_error, renamed
from tests.peers import diffusers

SMALL: dict[str, Any] = dict(channels=16, channel_mult=(1, 2), blocks=1, groups=4)
PLAYGROUND: dict[str, Any] = dict(
    scale=0.5, mean=(-1.6574, 1.886, -1.383, 2.5155), std=(8.4927, 5.9022, 6.5498, 5.2299)
)
PUBLISHED = {
    "SD, SDXL": (VAEParams(), 248, 83_653_863),
    "SD 3, FLUX.1": (
        VAEParams(latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609),
        244,
        83_819_683,
    ),
}
KINDS = {
    "small": VAEParams(**SMALL),
    "three levels": VAEParams(
        image_channels=1, latent_channels=2, channels=8, channel_mult=(1, 3, 2), blocks=2, groups=2
    ),
    "SD 3": VAEParams(**SMALL, latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609),
    "Playground": VAEParams(**SMALL, **PLAYGROUND),
}

# House names, with the blocks already counted level by level, to diffusers names.
NAMES = {
    r"^(en|de)coder\.middle\.1\.norm\.": r"\1coder.mid_block.attentions.0.group_norm.",
    r"^(en|de)coder\.middle\.1\.attention\.qkv\.": r"\1coder.mid_block.attentions.0.to_[qkv].",
    r"^(en|de)coder\.middle\.1\.attention\.out\.": r"\1coder.mid_block.attentions.0.to_out.0.",
    r"^(en|de)coder\.middle\.0\.": r"\1coder.mid_block.resnets.0.",
    r"^(en|de)coder\.middle\.2\.": r"\1coder.mid_block.resnets.1.",
    r"^(\w+)\.(down|up)\.(\d)\.\d\.conv\.": r"\1.\2_blocks.\3.\2samplers.0.conv.",
    r"^(\w+)\.(down|up)\.(\d)\.(\d)\.": r"\1.\2_blocks.\3.resnets.\4.",
    r"\.skip\.": ".conv_shortcut.",
    r"coder\.norm_out\.": "coder.conv_norm_out.",
    r"^(post_)?quant\.": r"\1quant_conv.",
}


def translated(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """A state dict under the names of diffusers."""
    stage = {"down": blocks + 1, "up": blocks + 2}  # a level's residual blocks and its resampling

    def by_level(match: re.Match[str]) -> str:
        level, i = divmod(int(match[2]), stage[match[1]])
        return f".{match[1]}.{level}.{i}."

    result: dict[str, Tensor] = {}
    for name, value in state.items():
        result |= renamed(re.sub(r"\.(down|up)\.(\d+)\.", by_level, name), value, NAMES)
    return result


def peer(p: VAEParams) -> Any:
    """The same autoencoder by diffusers."""
    levels = len(p.channel_mult)
    return diffusers.AutoencoderKL(
        in_channels=p.image_channels,
        out_channels=p.image_channels,
        latent_channels=p.latent_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=p.widths,
        layers_per_block=p.blocks,
        norm_num_groups=p.groups,
        use_quant_conv=p.quant_conv,
        use_post_quant_conv=p.quant_conv,
    ).eval()


def made(params: VAEParams) -> VAE:
    with torch.device("meta"):
        vae = VAE(params)
    randomised(vae.to_empty(device="cpu"))
    return vae


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pictures(params: VAEParams, height: int, width: int) -> Tensor:
    return normal(2, params.image_channels, height, width).tanh()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    """The published configurations have the published number of parameters, in the published number of
    tensors of the published shapes."""
    params, tensors, count = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = VAE(params), peer(params)
        names = translated(ours.state_dict(), params.blocks)
    assert sum(p.numel() for p in ours.parameters()) == count
    assert len(names) == tensors
    assert {k: v.shape for k, v in names.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


class Pair:
    """One autoencoder by us and by diffusers, with the same random weights."""

    def __init__(self, params: VAEParams, dtype: torch.dtype) -> None:
        self.params = params
        self.ours = made(params).to(dtype)
        with torch.device("meta"):
            self.theirs = peer(params)
        self.theirs.load_state_dict(
            translated(self.ours.state_dict(), params.blocks), strict=True, assign=True
        )
        # As pipelines that use these autoencoders convert.
        self.origin = torch.tensor(params.mean or params.shift, dtype=dtype).view(1, -1, 1, 1)
        self.unit = torch.tensor(params.std or 1.0, dtype=dtype).view(1, -1, 1, 1) / params.scale

    def outputs(self, images: Tensor, latents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and standard deviation of the latents of images, and the images of latents."""
        encoded, posterior = self.ours.encode(images), self.theirs.encode(images).latent_dist
        mine = [encoded.mean, encoded.std, self.ours.decode(latents)]
        decoded = self.theirs.decode(latents * self.unit + self.origin).sample
        return mine, [(posterior.mean - self.origin) / self.unit, posterior.std / self.unit, decoded]


def test_output_of_the_published_size_equals_diffusers() -> None:
    """The autoencoder of SD 1, 2 and XL as it is, on a small image."""
    pair = Pair(VAEParams(), torch.float32)
    with torch.no_grad():
        mine, theirs = pair.outputs(pictures(pair.params, 64, 64)[:1], normal(1, 4, 8, 8))
    for out, expected in zip(mine, theirs, strict=True):
        assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_output_and_gradients_equal_diffusers(
    params: VAEParams, dtype: torch.dtype, tolerance: float
) -> None:
    """Mean, standard deviation, images, and the gradients of all weights and of what was given."""
    pair = Pair(params, dtype)
    images = pictures(params, 16, 24).to(dtype).requires_grad_()
    latents = normal(2, *pair.ours.latent_shape(16, 24)).to(dtype).requires_grad_()
    mine, theirs = pair.outputs(images, latents)
    for out, expected in zip(mine, theirs, strict=True):
        assert out.dtype == dtype
        assert relative_error(out, expected) <= tolerance

    def gradients(network: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
        loss = torch.stack([(x * normal(*x.shape).to(dtype)).sum() for x in outputs]).sum()
        inputs = {"images": images, "latents": latents, **dict(network.named_parameters())}
        return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))

    ours = translated(gradients(pair.ours, mine), params.blocks)
    for name, grad in gradients(pair.theirs, theirs).items():
        # A key's bias shifts all scores of a query alike, so its gradient is zero: there, both sides hold
        # rounding only.
        assert (ours[name] - grad).norm() <= 10 * tolerance * max(grad.norm(), torch.ones(())), name


def test_samples_are_those_of_diffusers_with_a_generator_per_image() -> None:
    """mean + std * the noise of each image's own seed, whatever batch it is in."""
    distribution = LatentDistribution(normal(3, 4, 2, 5), normal(3, 4, 5, 2).mT.exp())
    seeds = [7, 0, 2**40]
    out = distribution.sample(seeds)
    assert torch.equal(out, distribution.mean + distribution.std * initial_noise(seeds, (4, 2, 5)))
    assert torch.equal(
        LatentDistribution(distribution.mean[2:], distribution.std[2:]).sample(seeds[2:]), out[2:]
    )
    assert torch.equal(distribution.mode, distribution.mean)
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        distribution.sample([0, 1])

    pair = Pair(KINDS["small"], torch.float32)
    images = pictures(pair.params, 8, 12)
    with torch.no_grad():
        expected = pair.theirs.encode(images).latent_dist.sample(
            [torch.Generator().manual_seed(seed) for seed in seeds[:2]]
        )
        torch.testing.assert_close(
            pair.ours.encode(images).sample(seeds[:2]), expected * 0.18215, rtol=1e-5, atol=1e-5
        )


def test_log_variance_is_limited_as_in_training() -> None:
    """e^-15 to e^10 in the autoencoder's units."""
    vae = made(KINDS["small"])
    with torch.no_grad():
        vae.get_parameter("quant.weight")[4:] = 0
        for bias, log_std in ((100.0, 10.0), (-100.0, -15.0), (3.0, 1.5)):
            vae.get_parameter("quant.bias")[4:] = bias
            std = vae.encode(pictures(vae.params, 8, 12)).std
            torch.testing.assert_close(std, torch.full_like(std, 0.18215) * torch.tensor(log_std).exp())


def test_fresh_blocks_are_the_identity() -> None:
    """Before training, every residual block and attention that keeps the width adds nothing."""
    vae = VAE(KINDS["small"])
    x = normal(2, 32, 3, 4)
    for block in (*vae.encoder.middle, *vae.decoder.middle, vae.decoder.up[0]):
        assert torch.equal(block(x), x)
    assert vae(pictures(vae.params, 8, 12)).std() > 1e-3


@pytest.mark.usefixtures("native_halves")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_the_dtype_of_its_weights_and_returns_float32(dtype: torch.dtype) -> None:
    """Half precision costs its rounding, and no more; the input may have any floating dtype."""
    wide, vae = made(KINDS["small"]), made(KINDS["small"]).to(dtype)
    images = pictures(vae.params, 8, 12)
    seen: list[torch.dtype] = []
    vae.decoder.up[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        latents, narrow = wide.encode(images), vae.encode(images.double())
        out = vae.decode(latents.mean.to(dtype))
        assert {narrow.mean.dtype, narrow.std.dtype, out.dtype} == {torch.float32}
        assert seen == [dtype]
        rounding = 20 * torch.finfo(dtype).eps
        assert relative_error(narrow.mean, latents.mean) < rounding
        assert relative_error(out, wide.decode(latents.mean)) < rounding


def overflowing(part: str) -> VAE:
    """An autoencoder in fp16 with one convolution that leads beyond 65504."""
    vae = made(KINDS["small"]).half()
    with torch.no_grad():
        vae.get_parameter(f"{part}.middle.0.conv2.weight").mul_(1e5)
    return vae


@pytest.mark.usefixtures("native_halves")
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_overflow_in_fp16_is_computed_again_in_float32(part: str) -> None:
    """The result is that of the fp16 weights in float32, with a warning once, gradients and all; the module
    stays as it was."""
    vae = overflowing(part)
    before = copy.deepcopy(vae.state_dict())
    wide = copy.deepcopy(vae).float()

    def output(vae: VAE, x: Tensor) -> Tensor:
        return vae.encode(x).mean if part == "encoder" else vae.decode(x)

    x = (pictures(vae.params, 8, 12) if part == "encoder" else normal(2, 4, 4, 6)).requires_grad_()
    with pytest.warns(RuntimeWarning, match=r"overflowed in torch.float16 and ran again in torch.float32"):
        out = output(vae, x)
    expected = output(wide, x)
    assert out.isfinite().all()
    assert torch.equal(out, expected)
    names = [
        name for name in before if name.startswith((part, "quant" if part == "encoder" else "post_quant"))
    ]
    mine, theirs = (
        torch.autograd.grad(result.square().mean(), [x, *map(network.get_parameter, names)])
        for network, result in ((vae, out), (wide, expected))
    )
    assert all(
        torch.equal(grad, reference.to(grad.dtype)) and reference.any()
        for grad, reference in zip(mine, theirs, strict=True)
    )
    assert all(
        value.dtype == torch.float16 and torch.equal(value, before[name])
        for name, value in vae.state_dict().items()
    )

    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(2):
            output(vae, x)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("native_halves")
def test_what_float32_cannot_hold_raises_and_names_the_cause() -> None:
    """Not finite: what was given, a weight, or the computation itself; never the output."""
    vae = overflowing("decoder").bfloat16()
    latents = normal(3, 4, 4, 6)
    latents[1, 2, 3, 4] = torch.nan
    with pytest.raises(FloatingPointError, match=r"is not finite in 1 of 3 samples, the first at 1"):
        vae.decode(latents)
    with torch.no_grad():
        vae.get_parameter("decoder.middle.0.conv2.weight").fill_(2e38)
    with (
        pytest.warns(RuntimeWarning, match="overflowed in torch.bfloat16"),
        pytest.raises(FloatingPointError, match=r"overflows torch\.float32"),
    ):
        vae.decode(normal(1, 4, 4, 6))
    vae = vae.float()
    with pytest.raises(FloatingPointError, match=r"overflows torch\.float32"):
        vae.decode(normal(1, 4, 4, 6))
    with torch.no_grad():
        vae.get_parameter("decoder.middle.0.conv2.weight")[1, 2, 0, 1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"weight 'decoder\.middle\.0\.conv2\.weight' is not finite"):
        vae.decode(normal(1, 4, 4, 6))


def test_overflow_under_autocast_is_computed_again() -> None:
    """Float32 weights that autocast takes to fp16 are the same case."""
    vae = overflowing("decoder").float()
    latents = normal(1, 4, 4, 6)
    with torch.no_grad():
        expected = vae.decode(latents)
        with torch.autocast("cpu", torch.float16), pytest.warns(RuntimeWarning, match="ran again"):
            assert torch.equal(vae.decode(latents), expected)


def test_encoder_and_decoder_compile_as_one_graph() -> None:
    """Compiled in place they compute the same, and the guard against overflow stays outside."""
    torch._dynamo.reset()
    vae = made(KINDS["small"])
    images = pictures(vae.params, 8, 12)
    with torch.no_grad():
        expected = vae(images)
        for network in (vae.encoder, vae.decoder):
            network.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(vae(images), expected)


def test_latent_shape_and_sizes_that_do_not_divide() -> None:
    """Latents are an eighth of the image, and the error says by what a size must divide."""
    vae = VAE(VAEParams(latent_channels=16, channels=4, blocks=1, groups=2))
    assert vae.factor == 8
    assert vae.latent_shape(512, 768) == (16, 64, 96)
    for height, width in ((100, 64), (64, 63), (0, 8)):
        with pytest.raises(ValueError, match=f"{height}x{width} pixels does not divide into latents of 8x8"):
            vae.latent_shape(height, width)
        with pytest.raises(ValueError, match=f"{height}x{width} pixels does not divide"):
            vae.encode(torch.zeros(1, 3, height, width))


def test_refuses_what_is_no_batch_of_images_or_latents() -> None:
    """Bytes, a single image, another number of channels."""
    vae = VAE(KINDS["small"])
    with pytest.raises(
        ValueError,
        match=r"images must be floating point \(B, 3, H, W\), not torch.uint8 of shape \(1, 3, 8, 8\)",
    ):
        vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for shape in ((3, 8, 8), (1, 4, 8, 8)):
        with pytest.raises(ValueError, match=r"images must be floating point \(B, 3, H, W\)"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"latents must be floating point \(B, 4, H, W\)"):
        vae.decode(torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(channels=0), "channels must be at least 1"),
        (dict(groups=24), "a level of 16 channels does not divide into groups=24"),
        (dict(scale=0.0), "scale must be above 0, not 0"),
        (dict(mean=(0.0,) * 4), "give either mean and std"),
        (dict(std=(1.0,) * 4), "give either mean and std"),
        (dict(mean=(0.0,) * 4, std=(1.0,) * 4, shift=0.1), "or shift"),
        (dict(mean=(0.0,) * 4, std=(1.0,) * 3), "std has 3 values for 4 latent channels"),
        (dict(mean=(0.0,) * 16, std=(1.0,) * 4), "mean has 16 values for 4 latent channels"),
        (dict(mean=(0.0,) * 4, std=(1.0, 1.0, 0.0, 1.0)), "every std must be above 0, not 0"),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is a network."""
    with pytest.raises(ValueError, match=message):
        VAEParams(**{**SMALL, **wrong})
