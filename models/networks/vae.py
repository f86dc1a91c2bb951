"""The autoencoder of latent diffusion (Kingma & Welling 2013; Rombach et al. 2022), from SD 1 to FLUX.1.

Autoencoders have their own units for latents. Diffusion models are trained on scaled latents, with a standard
deviation of about 1. `encode` and `decode` use the diffusion model's units, and nothing else scales latents.
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
    """Parameters of an autoencoder; the defaults are SD 1 and 2.

    channels      width of the finest level; levels are channels * channel_mult wide, from the finest on
    blocks        residual blocks per level of the encoder; the decoder has one more
    groups        of all group norms; must divide every width
    quant_conv    1x1 convolutions around the latents (not in SD 3 and FLUX.1)
    scale, shift  units: latents = (z - shift) * scale with the networks' own z, scale > 0
    mean, std     per channel, instead of shift: latents = (z - mean) / std * scale (Playground 2.5)
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
        check_at_least_one(self, "image_channels", "latent_channels", "channels", "channel_mult")
        check_at_least_one(self, "blocks", "groups")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"a level of {width} channels does not divide into groups={self.groups}")
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, not {self.scale:g}")
        if (self.mean is None) != (self.std is None) or (self.mean is not None and self.shift):
            raise ValueError("give either mean and std, one value per latent channel, or shift")
        n = self.latent_channels
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != n:
                raise ValueError(f"{name} has {len(values)} values for {n} latent channels")
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
        """The value, per channel, that is 0 in the diffusion model's units."""
        return self.mean or (self.shift,) * self.latent_channels

    @property
    def unit(self) -> tuple[float, ...]:
        """The difference, per channel, that is 1 in the diffusion model's units."""
        return tuple(s / self.scale for s in self.std or (1.0,) * self.latent_channels)


@dataclass(frozen=True)
class LatentDistribution:
    """Independent normal distributions of latents in the diffusion model's units; mean, std (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    @property
    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, seeds: Sequence[int]) -> Tensor:
        """One sample per image. ValueError unless there is one seed per image."""
        require_seeds(seeds, self.mean)
        noise = initial_noise(seeds, self.mean.shape[1:], self.mean.dtype, self.mean.device)
        return self.mean + self.std * noise


class VAE(nn.Module):
    """encode(images (B, 3, H, W) in [-1, 1]) -> LatentDistribution of (B, C, H/8, W/8); decode -> images.

    It computes in the dtype of its weights, again in float32 if that overflows (`run_finite`), and returns at
    least float32. To compile it: `vae.encoder.compile()`, `vae.decoder.compile()`.
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
        """torch's defaults, but the last layer of residual branches is zero: blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, (ResBlock, MiddleAttention)):
                last = module.conv2 if isinstance(module, ResBlock) else module.attention.out
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)

    @property
    def factor(self) -> int:
        """Pixels per latent along each side: 8 in published autoencoders."""
        return self.params.factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image. ValueError unless height and width divide by the factor."""
        check_size(height, width, self.factor)
        return self.params.latent_channels, height // self.factor, width // self.factor

    def encode(self, images: Tensor) -> LatentDistribution:
        """The distribution of the latents. ValueError for a wrong shape; see also `run_finite`."""
        check_batch("images", images, self.params.image_channels, self.factor)
        moments = run_finite(_stages(encoder=self.encoder, quant=self.quant), images)
        mean, log_variance = moments.chunk(2, dim=1)
        origin, unit = self._units(moments)
        # Published weights were trained with this range.
        return LatentDistribution((mean - origin) / unit, (log_variance.clamp(-30, 20) / 2).exp() / unit)

    def decode(self, latents: Tensor) -> Tensor:
        """The images, not clipped. ValueError for a wrong shape; see also `run_finite`."""
        check_batch("latents", latents, self.params.latent_channels)
        return run_finite(_stages(post_quant=self.post_quant, decoder=self.decoder), self.unscaled(latents))

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the autoencoder's own units, which networks that edit images take (InstructPix2Pix)."""
        origin, unit = self._units(latents)
        return latents * unit + origin

    def forward(self, images: Tensor) -> Tensor:
        """The images decoded from their most likely latents."""
        return self.decode(self.encode(images).mode)

    def _units(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Made on the host and then copied: with device=..., torch.tensor waits for the device.
        units = (torch.tensor(values, dtype=dtype) for values in (self.params.origin, self.params.unit))
        origin, unit = (values[:, None, None].to(like.device, non_blocking=True) for values in units)
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
        self.middle = _middle(p, width)
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
        self.middle = _middle(p, widths[0])
        layers: list[nn.Module] = []
        for level, (width_in, width) in enumerate(pairwise([widths[0], *widths])):
            layers += [ResBlock(p, width if i else width_in, width) for i in range(p.blocks + 1)]
            if level < len(widths) - 1:
                layers.append(Upsample(width))
        self.up = nn.Sequential(*layers)
        self.norm_out = _norm(p, width)
        self.conv_out = nn.Conv2d(width, p.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.middle(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a residual connection."""

    def __init__(self, p: VAEParams, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(p, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(p, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # In place: at full resolution, allocating memory takes as long as computing.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.skip(x))


class MiddleAttention(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, p: VAEParams, width: int) -> None:
        super().__init__()
        self.norm = _norm(p, width)
        self.attention = SelfAttention(width, heads=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """A convolution of stride 2, padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def run_finite(network: nn.Module, x: Tensor) -> Tensor:
    """network(x) in the dtype of its weights (`enough_precision`), and finite, in float32 or float64.

    Activations of published autoencoders exceed 65504, the limit of float16. If the output is not finite, it
    is computed again in float32, with a RuntimeWarning; the weights keep their dtype. FloatingPointError,
    which names the cause, if that is not finite either.
    """
    dtype = next(network.parameters()).dtype
    wide = torch.promote_types(dtype, torch.float32)
    # Channels last: on a CPU with AVX2, decoding is 11 % faster and encoding 9 %.
    with enough_precision(network):
        out = network(x.to(dtype, memory_format=torch.channels_last))
    if not torch.isfinite(out).all():
        _check_finite(network, x)
        failure = f"the autoencoder overflows {wide}: its weights or its input are far out of range"
        if out.dtype == wide:
            raise FloatingPointError(failure)
        remedy = "convert it to torch.bfloat16 or float32 to save the time"
        message = f"the autoencoder overflowed in {out.dtype} and ran again in {wide}; {remedy}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        with torch.autocast(x.device.type, enabled=False), InFloat32():
            out = network(x.to(wide, memory_format=torch.channels_last))
        if not torch.isfinite(out).all():
            raise FloatingPointError(failure)
    return out.to(wide, memory_format=torch.contiguous_format)


def check_batch(what: str, x: Tensor, channels: int, factor: int = 1) -> None:
    """ValueError unless x is floating point (B, channels, H, W), where H and W divide by the factor."""
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        wrong = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"{what} must be floating point (B, {channels}, H, W), not {wrong}")
    check_size(x.shape[2], x.shape[3], factor)


def check_size(height: int, width: int, factor: int) -> None:
    """ValueError unless height and width divide by the factor."""
    if height % factor or width % factor or min(height, width) < 1:
        sizes = f"{height}x{width} pixels does not divide into latents of {factor}x{factor}"
        raise ValueError(f"an image of {sizes}: crop or resize it")


def _check_finite(network: nn.Module, x: Tensor) -> None:
    """FloatingPointError if samples or weights are not finite."""
    wrong = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if wrong:
        count = f"{len(wrong)} of {len(x)} samples"
        raise FloatingPointError(f"the autoencoder's input is not finite in {count}, the first at {wrong[0]}")
    if name := find_nonfinite(network):
        remedy = "load it again from an intact file"
        raise FloatingPointError(f"the autoencoder's weight {name!r} is not finite: {remedy}")


def _stages(**modules: nn.Module | None) -> nn.Sequential:
    """Those modules that there are, one after the other."""
    stages = nn.Sequential()
    for name, module in modules.items():
        if module is not None:
            stages.add_module(name, module)
    return stages


def _middle(p: VAEParams, width: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(p, width, width), MiddleAttention(p, width), ResBlock(p, width, width))


def _norm(p: VAEParams, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(p.groups, width, eps=1e-6)
