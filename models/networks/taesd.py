"""TAESD: a tiny autoencoder for the latents of a large one, for previews (Bohan 2023, madebyollin/taesd)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.spec import check_at_least_one
from models.networks.vae import check_batch, run_finite


@dataclass(frozen=True)
class TAESDParams:
    """Parameters of a tiny autoencoder: 4 latent channels for SD 1, 2 and XL, 16 for SD 3 and FLUX.1."""

    latent_channels: int = 4
    channels: int = 64

    def __post_init__(self) -> None:
        check_at_least_one(self, "latent_channels", "channels")


class TAESD(nn.Module):
    """encode(images (B, 3, H, W) in [-1, 1]) -> latents (B, C, H/8, W/8); decode(latents) -> images.

    Latents are in the diffusion model's units. It computes in the dtype of its weights and returns at least
    float32 (`run_finite`). Layers are numbered as published: encoder.N is N of taesd_encoder and
    encoder.layers.N of diffusers; decoder.N is N of taesd_decoder and decoder.layers.(N-1) of diffusers,
    which does not count the clamp. A block's conv1, conv2 and conv3 are conv.0, conv.2 and conv.4 in both.
    """

    factor = 8  # pixels per latent along each side

    def __init__(self, params: TAESDParams) -> None:
        super().__init__()
        self.params = p = params
        n = p.channels
        encoder: list[nn.Module] = [_conv(3, n), Block(n)]
        for _ in range(3):
            encoder += [_conv(n, n, stride=2, bias=False), Block(n), Block(n), Block(n)]
        self.encoder = nn.Sequential(*encoder, _conv(n, p.latent_channels))
        decoder: list[nn.Module] = [SoftClamp(), _conv(p.latent_channels, n), nn.ReLU()]
        for _ in range(3):
            decoder += [Block(n), Block(n), Block(n), nn.Upsample(scale_factor=2), _conv(n, n, bias=False)]
        self.decoder = nn.Sequential(*decoder, Block(n), _conv(n, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's defaults, and zero for the last layer of every residual branch."""
        for module in self.modules():
            if isinstance(module, Block):
                for parameter in module.conv3.parameters():
                    nn.init.zeros_(parameter)

    def encode(self, images: Tensor) -> Tensor:
        """The latents themselves, not a distribution. ValueError for a wrong shape; see also `run_finite`."""
        check_batch("images", images, 3, self.factor)
        return run_finite(self.encoder, (images + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        """The images, not clipped. ValueError for a wrong shape; see also `run_finite`."""
        check_batch("latents", latents, self.params.latent_channels)
        return run_finite(self.decoder, latents) * 2 - 1

    def forward(self, images: Tensor) -> Tensor:
        """decode(encode(images))."""
        return self.decode(self.encode(images))


class Block(nn.Module):
    """Three convolutions with ReLU; the input is added before the last ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (_conv(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.conv1(x))
        h = torch.relu_(self.conv2(h))
        return torch.relu_(self.conv3(h) + x)


class SoftClamp(nn.Module):
    """Limits latents smoothly to -3 ... 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(width_in: int, width: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=bias)
