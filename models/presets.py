"""Models of the published families without their weights: at their own size, and tiny ones to try code on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffusion.spec import lookup
from models.clip import CLIP_G, CLIP_H, CLIP_L, CLIPTextParams
from models.families import FAMILIES, TOWERS, Family, Network, description, recipe
from models.flux import FluxParams
from models.model import Model, build
from models.recipes import TextParams
from models.sd3 import SD3Params
from models.t5 import T5Params
from models.t5_tokenizer import T5Tokenizer
from models.taesd import TAESDParams
from models.unet import UNetParams
from models.vae import VAEParams

# As published ----------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, Network] = {
    "sd1": UNetParams(heads=8, head_dim=None, context_dim=768),
    "sd2": UNetParams(context_dim=1024, linear_projection=True),
    "sdxl": UNetParams(
        channel_mult=(1, 2, 4), attention=(0, 2, 10), middle_attention=10, context_dim=2048, vector_dim=2816, linear_projection=True
    ),
    "sdxl-refiner": UNetParams(
        channels=384, attention=(0, 4, 4, 0), middle_attention=4, context_dim=1280, vector_dim=2560, linear_projection=True
    ),
    "flux-dev": FluxParams(),
    "flux-schnell": FluxParams(guidance_dim=None),
    "flux-fill": FluxParams(in_channels=96),
    "flux-canny": FluxParams(in_channels=32),
    "sd3": SD3Params(),
    "sd3.5-medium": SD3Params(positions=384, qk_norm=True, dual=13),
    "sd3.5-large": SD3Params(depth=38, qk_norm=True),
}
TOWER: dict[str, CLIPTextParams | T5Params] = {"clip_l": CLIP_L, "clip_h": CLIP_H, "clip_g": CLIP_G, "t5": T5Params()}


def published(family: str, device: torch.device | str = "meta", **network: Any) -> Model:
    """A model of that family (a name in FAMILIES) at its published size, with fresh weights, or none at all on the meta device.

    To count, measure and test with; `network` changes parameters of its network: published("sd1", in_channels=9) is the one for inpainting.
    """
    of = lookup("family", family, FAMILIES)
    params = NETWORKS[of.base]
    if of.consistency:
        network = {"guidance_dim": 256, **network}
    return build(description(family, replace(params, **network), _vae(of), _text(of, TOWER)), device)


def _vae(of: Family, **params: Any) -> VAEParams:
    if of.prediction == "flow":
        params |= {"latent_channels": 16, "quant_conv": False}
    return VAEParams(scale=of.scale, shift=of.shift, mean=of.mean, std=of.std, **params)


def _text(of: Family, towers: Mapping[str, CLIPTextParams | T5Params], **choices: Any) -> TextParams:
    return recipe(of, {name: towers[name] for name in TOWERS[of.base]}, **choices)


# Tiny ------------------------------------------------------------------------------------------------------------------

TINY_TOWERS: dict[str, CLIPTextParams | T5Params] = {
    "clip_l": CLIPTextParams(width=64, layers=3, heads=1),
    "clip_h": CLIPTextParams(width=128, layers=3, heads=2, activation="gelu", projection=128),
    "clip_g": CLIPTextParams(width=128, layers=3, heads=2, activation="gelu", projection=128),
    "t5": T5Params(vocab=256, width=224, layers=2, heads=4, head_dim=16, hidden=128),
}
FLUX = FluxParams(hidden=64, heads=2, depth=2, depth_single=2, axes=(4, 14, 14))
TINY_NETWORKS: dict[str, Network] = {
    "sd1": UNetParams(channels=32, channel_mult=(1, 2), blocks=1, attention=(1, 0), heads=8, head_dim=None),
    "sd2": UNetParams(channels=64, channel_mult=(1, 2), blocks=1, attention=(1, 0), linear_projection=True),
    "sdxl": UNetParams(channels=64, channel_mult=(1, 2), blocks=1, attention=(0, 2), middle_attention=2, linear_projection=True),
    "sdxl-refiner": UNetParams(channels=64, channel_mult=(1, 2, 2), blocks=1, attention=(0, 1, 0), linear_projection=True),
    "flux-dev": FLUX,
    "flux-schnell": replace(FLUX, guidance_dim=None),
    "flux-fill": replace(FLUX, in_channels=96),
    "flux-canny": replace(FLUX, in_channels=32),
    "sd3": SD3Params(depth=2, positions=32),
    "sd3.5-medium": SD3Params(depth=3, positions=32, qk_norm=True, dual=1),
    "sd3.5-large": SD3Params(depth=3, positions=32, qk_norm=True),
}
SIZE = 16  # latents along each side of a miniature's sample


def miniature(family: str = "sd1", seed: int = 0, **network: Any) -> Model:
    """A tiny model of that family with the random weights of that seed: the same parts, structure and traps, in seconds on a CPU.

    To try code, tests and lessons on, not to look at what it draws; `network` as for `published`. Its T5 reads letters.
    """
    from models.checkpoints.blank import Blank  # here: to import this library needs no file format

    of = lookup("family", family, FAMILIES)
    with Blank():  # all parameters are drawn below
        model = build({**tiny_description(family, TINY_TOWERS, **network), "shape": [_vae(of).latent_channels, SIZE, SIZE]})
    if "t5" in TOWERS[of.base]:
        model.require("text").t5_tokenizer = T5Tokenizer.of_letters()
    generator = torch.Generator().manual_seed(seed)
    for part in model.parts.values():
        randomise(part, generator)
    return model


def tiny_description(family: str, towers: Mapping[str, CLIPTextParams | T5Params], **network: Any) -> dict[str, Any]:
    """The description of a miniature with these text towers."""
    of = FAMILIES[family]
    text = _text(of, towers, **({"blocks": 2} if of.base == "sd2" else {}))
    conditions = {"context_dim": text.context_dim, "vector_dim": text.vector_dim} | ({"guidance_dim": 8} if of.consistency else {})
    params = replace(TINY_NETWORKS[of.base], **{**conditions, **network})
    vae = _vae(of, channels=32, channel_mult=(1, 1, 2, 2), blocks=1)
    return description(family, params, vae, text, TAESDParams(vae.latent_channels, channels=16))


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
