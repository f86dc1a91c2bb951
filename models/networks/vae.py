"""The autoencoder of latent diffusion: images to latents and back (Kingma & Welling 2013; Rombach et al.
2022).

It is trained in units of its own, diffusion models in others, where latents have a standard deviation of
about 1. Here latents are in the diffusion model's units on both sides: what `encode` returns is what the
model is trained on, what it makes is what `decode` takes, and nobody else scales. SD 1 / 2 / XL / 3,
Playground 2.5 and FLUX.1 are configurations of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.noise import initial_noise, require_seeds
from diffusion.spec import check_at_least_one
from models.layers.attention import SelfAttention
from models.layers.finite import find_nonfinite
from models.layers.half import InFloat32, enough_precision
from models.layers.upsample import Upsample


@dataclass(frozen=True)
class VAEParams:
    """One autoencoder; the defaults are that of SD 1 and 2.

    image_channels, latent_channels
    channels      width at the finest level; a level is channels * channel_mult wide, from the finest to the
                  coarsest
    blocks        residual blocks per level of the encoder (one more in the decoder)
    groups        of every group normalisation; divides every width
    quant_conv    1x1 convolutions around the latents (not in SD 3 and FLUX.1)
    scale, shift  the diffusion model's units: (z - shift) * scale, z being what the networks make and take;
                  scale > 0
    mean, std     per channel, in place of shift: (z - mean) / std * scale (Playground 2.5)
    """

    image_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    groups: int = 32
    quant_conv: bool = True
    scale: float = 0.18215
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_at_least_one(
            self, "image_channels", "latent_channels", "channels", "channel_mult", "blocks", "groups"
        )
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"a level of {width} channels does not divide into groups={self.groups}")
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, not {self.scale:g}")
        if (self.mean is None) != (self.std is None) or (self.mean is not None and self.shift):
            raise ValueError(
                "give both mean and std, one value per latent channel, and no shift; or only scale and shift"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(values)} values for {self.latent_channels} latent channels"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"every std must be above 0, not {min(self.std):g}")

    @property
    def widths(self) -> list[int]:
        """Channels per level, from the finest to the coarsest."""
        return [self.channels * m for m in self.channel_mult]

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.channel_mult) - 1))

    @property
    def origin(self) -> tuple[float, ...]:
        """What is 0 in the diffusion model's units, per channel, in the autoencoder's own."""
        return self.mean or (self.shift,) * self.latent_channels

    @property
    def unit(self) -> tuple[float, ...]:
        """What is 1 in the diffusion model's units, per channel, in the autoencoder's own."""
        return tuple(s / self.scale for s in self.std or (1.0,) * self.latent_channels)


@dataclass(frozen=True)
class LatentDistribution:
    """A normal distribution per latent, independent, in the diffusion model's units; mean and std are (B, C,
    H, W)."""

    mean: Tensor
    std: Tensor

    @property
    def mode(self) -> Tensor:
        """The likeliest latents: the mean."""
        return self.mean

    def sample(self, seeds: Sequence[int]) -> Tensor:
        """One draw per image, with a seed of its own each. ValueError unless there is one seed per image."""
        require_seeds(seeds, self.mean)
        return self.mean + self.std * initial_noise(
            seeds, self.mean.shape[1:], self.mean.dtype, self.mean.device
        )


class VAE(nn.Module):
    """encode(images (B, 3, H, W) in [-1, 1]) -> LatentDistribution; decode(latents (B, C, H/8, W/8)) ->
    images, about [-1, 1].

    It computes in the dtype of its weights and returns at least float32. Where half precision overflows it
    computes again in float32 (`run_finite`). To compile it: `vae.encoder.compile()`, `vae.decoder.compile()`.
    """

    def __init__(self, params: VAEParams) -> None:
        super().__init__()
        self.params = p = params
        self.encoder = Encoder(p)
        self.decoder = Decoder(p)
        self.quant = nn.Conv2d(2 * p.latent_channels, 2 * p.latent_channels, 1) if p.quant_conv else None
        self.post_quant = nn.Conv2d(p.latent_channels, p.latent_channels, 1) if p.quant_conv else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's defaults, and zero for the last layer of every residual branch: each block starts as the
        identity."""
        for module in self.modules():
            if isinstance(module, (ResBlock, MiddleAttention)):
                last = module.conv2 if isinstance(module, ResBlock) else module.attention.out
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)

    @property
    def factor(self) -> int:
        """Pixels per latent along each side: 8 for the published ones."""
        return self.params.factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image of that many pixels. ValueError where they do not divide by
        the factor."""
        check_size(height, width, self.factor)
        return self.params.latent_channels, height // self.factor, width // self.factor

    def encode(self, images: Tensor) -> LatentDistribution:
        """The distribution of the latents. ValueError for another shape, FloatingPointError as `run_finite`
        says."""
        check_batch("images", images, self.params.image_channels, self.factor)
        moments = run_finite(_stages(encoder=self.encoder, quant=self.quant), images)
        mean, log_variance = moments.chunk(2, dim=1)
        origin, unit = self._units(moments)
        # The range is the one that the published weights were trained with.
        return LatentDistribution((mean - origin) / unit, (log_variance.clamp(-30, 20) / 2).exp() / unit)

    def decode(self, latents: Tensor) -> Tensor:
        """The images, not clipped. ValueError for another shape, FloatingPointError as `run_finite` says."""
        check_batch("latents", latents, self.params.latent_channels)
        return run_finite(_stages(post_quant=self.post_quant, decoder=self.decoder), self.unscaled(latents))

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the autoencoder's own units, which networks that edit images were trained to see
        (pix2pix)."""
        origin, unit = self._units(latents)
        return latents * unit + origin

    def forward(self, images: Tensor) -> Tensor:
        """The images through the likeliest latents and back."""
        return self.decode(self.encode(images).mode)

    def _units(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        origin, unit = (
            torch.tensor(values, dtype=dtype) for values in (self.params.origin, self.params.unit)
        )
        # Made on the host and sent: with device=..., torch.tensor waits for the device.
        origin, unit = (values[:, None, None].to(like.device, non_blocking=True) for values in (origin, unit))
        return origin, unit


class Encoder(nn.Module):
    """(B, image_channels, H, W) -> (B, 2 * latent_channels, H/8, W/8): means, then log-variances."""

    def __init__(self, p: VAEParams) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(p.image_channels, p.channels, 3, padding=1)
        layers: list[nn.Module] = []
        for level, (width_in, width) in enumerate(pairwise([p.channels, *p.widths])):
            layers += [ResBlock(p, width if i else width_in, width) for i in range(p.blocks)]
            if level < len(p.widths) - 1:
                layers.append(Downsample(width))
        self.down = nn.Sequential(*layers)
        self.middle = nn.Sequential(
            ResBlock(p, width, width), MiddleAttention(p, width), ResBlock(p, width, width)
        )
        self.norm_out = _norm(p, width)
        self.conv_out = nn.Conv2d(width, 2 * p.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Decoder(nn.Module):
    """(B, latent_channels, H/8, W/8) -> (B, image_channels, H, W)."""

    def __init__(self, p: VAEParams) -> None:
        super().__init__()
        widths = p.widths[::-1]
        self.conv_in = nn.Conv2d(p.latent_channels, widths[0], 3, padding=1)
        self.middle = nn.Sequential(
            ResBlock(p, widths[0], widths[0]),
            MiddleAttention(p, widths[0]),
            ResBlock(p, widths[0], widths[0]),
        )
        layers: list[nn.Module] = []
        for level, (width_in, width) in enumerate(pairwise([widths[0], *widths])):
            layers += [ResBlock(p, width if i else width_in, width) for i in range(p.blocks + 1)]
            if level < len(widths) - 1:
                layers.append(Upsample(width))
        self.up = nn.Sequential(*layers)
        self.norm_out = _norm(p, p.channels * p.channel_mult[0])
        self.conv_out = nn.Conv2d(p.channels * p.channel_mult[0], p.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.middle(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice; the input is added at the end."""

    def __init__(self, p: VAEParams, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(p, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(p, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # In place, as nobody else holds what the normalisation made: at full resolution the memory costs as
        # much as the mathematics.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.skip(x))


class MiddleAttention(nn.Module):
    """Every place attends to every other, with one head as wide as the features."""

    def __init__(self, p: VAEParams, width: int) -> None:
        super().__init__()
        self.norm = _norm(p, width)
        self.attention = SelfAttention(width, heads=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Half the resolution by a strided convolution, padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def run_finite(network: nn.Module, x: Tensor) -> Tensor:
    """network(x) in the dtype of its weights (`enough_precision`), returned in float32 (float64 stays), never
    with NaN or infinity in it.

    The widest activations of published autoencoders exceed 65504, where fp16 ends. Where the output of a
    narrow dtype is not finite, all of it is computed again in float32, with a RuntimeWarning that says so;
    the weights stay as they are. What is not finite even then raises FloatingPointError, which names the
    cause.
    """
    dtype = next(network.parameters()).dtype
    wide = torch.promote_types(dtype, torch.float32)
    # Channels last: on a CPU with AVX2 decoding takes 1 / 1.11 of the time, encoding 1 / 1.09.
    with enough_precision(network):
        out = network(x.to(dtype, memory_format=torch.channels_last))
    if not torch.isfinite(out).all():
        _check_finite(network, x)
        if out.dtype == wide:
            raise FloatingPointError(
                f"the autoencoder overflows {wide}: its weights, or what it was given, are far out of range"
            )
        warnings.warn(
            f"the autoencoder overflowed in {out.dtype} and ran again in {wide}; convert it to "
            "torch.bfloat16 or float32 to save the time",
            RuntimeWarning,
            stacklevel=3,
        )
        with torch.autocast(x.device.type, enabled=False), InFloat32():
            out = network(x.to(wide, memory_format=torch.channels_last))
        if not torch.isfinite(out).all():
            raise FloatingPointError(
                f"the autoencoder overflows even {wide}: its weights, or what it was given, are far out of "
                "range"
            )
    return out.to(wide, memory_format=torch.contiguous_format)


def check_batch(what: str, x: Tensor, channels: int, factor: int = 1) -> None:
    """ValueError unless x is floating point (B, channels, H, W), with H and W that divide by the factor."""
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(
            f"{what} must be floating point (B, {channels}, H, W), not {x.dtype} of shape {tuple(x.shape)}"
        )
    check_size(x.shape[2], x.shape[3], factor)


def check_size(height: int, width: int, factor: int) -> None:
    """ValueError unless height and width divide by the factor."""
    if height % factor or width % factor or min(height, width) < 1:
        raise ValueError(
            f"an image of {height}x{width} pixels does not divide into latents of {factor}x{factor}: crop "
            "or resize it"
        )


def _check_finite(network: nn.Module, x: Tensor) -> None:
    lost = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if lost:
        raise FloatingPointError(
            f"the autoencoder was given {len(lost)} of {len(x)} samples that are not finite, the first at "
            f"{lost[0]}"
        )
    if name := find_nonfinite(network):
        raise FloatingPointError(
            f"the autoencoder's weight {name!r} is not finite: load it again from an intact file"
        )


def _stages(**modules: nn.Module | None) -> nn.Sequential:
    """Those modules that there are, one after the other."""
    stages = nn.Sequential()
    for name, module in modules.items():
        if module is not None:
            stages.add_module(name, module)
    return stages


def _norm(p: VAEParams, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(p.groups, width, eps=1e-6)
