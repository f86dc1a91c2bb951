"""Models of the published families without their weights: at their own size, and tiny ones to try code on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffusion.spec import lookup
from models.clip import CLIP_G, CLIP_H, CLIP_L, CLIPTextParams
from models.families import FAMILIES, TOWERS, Family, description, recipe
from models.model import Model, build
from models.taesd import TAESDParams
from models.unet import UNetParams
from models.vae import VAEParams

# As published ----------------------------------------------------------------------------------------------------------

SD1 = UNetParams(heads=8, head_dim=None, context_dim=768)
SD2 = UNetParams(context_dim=1024, linear_projection=True)
SDXL = UNetParams(
    channel_mult=(1, 2, 4), attention=(0, 2, 10), middle_attention=10, context_dim=2048, vector_dim=2816, linear_projection=True
)
REFINER = UNetParams(channels=384, attention=(0, 4, 4, 0), middle_attention=4, context_dim=1280, vector_dim=2560, linear_projection=True)


def published(family: str, device: torch.device | str = "meta", **network: Any) -> Model:
    """A model of that family (a name in FAMILIES) at its published size, with fresh weights, or none at all on the meta device.

    To count, measure and test with; `network` changes parameters of its UNet: published("sd1", in_channels=9) is the one for inpainting.
    """
    of = lookup("family", family, FAMILIES)
    unet = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "sdxl-refiner": REFINER}[of.base]
    unet = replace(unet, guidance_dim=256 if of.consistency else None, **network)
    towers = {"clip_l": CLIP_L, "clip_h": CLIP_H, "clip_g": CLIP_G}
    text = recipe(of.base, {name: towers[name] for name in TOWERS[of.base]})
    return build(description(family, unet, _vae(of), text), device)


def _vae(of: Family, **params: Any) -> VAEParams:
    return VAEParams(scale=of.scale, mean=of.mean, std=of.std, **params)


# Tiny ------------------------------------------------------------------------------------------------------------------

TOWER = {
    "clip_l": CLIPTextParams(width=64, layers=3, heads=1),
    "clip_h": CLIPTextParams(width=128, layers=3, heads=2, activation="gelu", projection=128),
    "clip_g": CLIPTextParams(width=128, layers=3, heads=2, activation="gelu", projection=128),
}
UNETS = {
    "sd1": UNetParams(channels=32, channel_mult=(1, 2), blocks=1, attention=(1, 0), heads=8, head_dim=None),
    "sd2": UNetParams(channels=64, channel_mult=(1, 2), blocks=1, attention=(1, 0), linear_projection=True),
    "sdxl": UNetParams(channels=64, channel_mult=(1, 2), blocks=1, attention=(0, 2), middle_attention=2, linear_projection=True),
    "sdxl-refiner": UNetParams(channels=64, channel_mult=(1, 2, 2), blocks=1, attention=(0, 1, 0), linear_projection=True),
}
SIZE = 16  # latents along each side of a miniature's sample


def miniature(family: str = "sd1", seed: int = 0, **network: Any) -> Model:
    """A tiny model of that family with the random weights of that seed: the same parts, structure and traps, in seconds on a CPU.

    To try code, tests and lessons on, not to look at what it draws; `network` as for `published`.
    """
    of = lookup("family", family, FAMILIES)
    text = recipe(of.base, {name: TOWER[name] for name in TOWERS[of.base]}, sd2_blocks=2)
    unet = replace(UNETS[of.base], context_dim=text.context_dim, vector_dim=text.vector_dim, guidance_dim=8 if of.consistency else None)
    vae = _vae(of, channels=32, channel_mult=(1, 1, 2, 2), blocks=1)
    spec = description(family, replace(unet, **network), vae, text, TAESDParams(channels=16))
    model = build({**spec, "shape": [4, SIZE, SIZE]})
    generator = torch.Generator().manual_seed(seed)
    for part in model.parts.values():
        randomise(part, generator)
    return model


def randomise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew, so that activations keep their size and no zero hides a mistake; evaluation mode."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(generator=generator)
            if p.ndim > 1:
                p.div_(p[0].numel() ** 0.5)
            else:
                p.mul_(0.1).add_(float(name.endswith("weight")))  # norms stay near 1, biases near 0
    network.eval()
