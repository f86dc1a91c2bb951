"""Models of the published families without their weights: at full size, and tiny ones to try code on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffusion.spec import lookup
from models.families import FAMILIES, TOWERS
from models.model import Model, build
from models.networks.taesd import TAESDParams

TINY_TOWERS: dict[str, Any] = {tower.name: tower.tiny for tower in TOWERS}
SIZE = 16  # latents along each side of a miniature's sample


def published(family: str, device: torch.device | str = "meta", **network: Any) -> Model:
    """A model of a family in FAMILIES at its published size, by default without weights.

    device   "meta" makes no weights, any other device fresh ones
    network  changes parameters of the network: published("sd1", in_channels=9) is the one for inpainting
    """
    preset = lookup("family", family, FAMILIES)
    if preset.consistency:
        network = {"guidance_dim": 256, **network}
    params = replace(preset.architecture.network, **network)
    return build(preset.description(params, preset.vae, preset.join_readers(preset.readers)), device)


def miniature(family: str = "sd1", seed: int = 0, **network: Any) -> Model:
    """A tiny model of a family with random weights, to try code on: the same parts, made in seconds on a CPU.

    `network` as for `published`. A T5 encoder gets a tokenizer of single letters.
    """
    from models.files.blank import Blank  # here: importing this library should not import file formats

    preset = lookup("family", family, FAMILIES)
    shape = [preset.architecture.vae.latent_channels, SIZE, SIZE]
    with Blank():  # because all parameters are drawn below
        model = build({**tiny_description(family, TINY_TOWERS, **network), "shape": shape})
    text = model.require("text")
    letters = {name: reader.miniature_tokenizer() for name, reader in text.params.readers.items()}
    text.tokenizers = {name: tokenizer for name, tokenizer in letters.items() if tokenizer is not None}
    generator = torch.Generator().manual_seed(seed)
    for part in model.parts.values():
        randomise(part, generator)
    return model


def tiny_description(family: str, towers: Mapping[str, Any], **network: Any) -> dict[str, Any]:
    """The description of a miniature with these text towers."""
    preset = FAMILIES[family]
    text = preset.text_params(towers)
    sizes = {"context_dim": text.context_dim, "vector_dim": text.vector_dim}
    sizes["guidance_dim"] = 8 if preset.consistency else None
    network = {**{name: size for name, size in sizes.items() if size is not None}, **network}
    vae = replace(preset.vae, **preset.architecture.tiny_vae)
    preview = TAESDParams(vae.latent_channels, channels=16)
    return preset.description(replace(preset.architecture.tiny, **network), vae, text, preview)


def randomise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter at random, so that no zero hides a mistake; switches to evaluation mode."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(generator=generator)
            if p.ndim > 1:
                p.div_(p[0].numel() ** 0.5)  # activations keep their size
            else:
                p.mul_(0.1).add_(float(name.endswith("weight")))  # norms stay near 1, biases near 0
    network.eval()
