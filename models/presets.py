"""Models of the published families without their weights: at their own size, and tiny ones to try code on."""

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
    """A model of that family (a name in FAMILIES) at its published size, with fresh weights, or none at all
    on the meta device.

    To count, measure and test with; `network` changes parameters of its network: published("sd1",
    in_channels=9) is the one for inpainting.
    """
    of = lookup("family", family, FAMILIES)
    if of.consistency:
        network = {"guidance_dim": 256, **network}
    return build(
        of.description(replace(of.architecture.network, **network), of.vae, of.join_readers(of.readers)),
        device,
    )


def miniature(family: str = "sd1", seed: int = 0, **network: Any) -> Model:
    """A tiny model of that family with the random weights of that seed: the same parts, structure and traps,
    in seconds on a CPU.

    To try code, tests and lessons on, not to look at what it draws; `network` as for `published`. Its T5
    reads miniature_tokenizer.
    """
    from models.files.blank import Blank  # here: to import this library needs no file format

    of = lookup("family", family, FAMILIES)
    with Blank():  # all parameters are drawn below
        model = build(
            {
                **tiny_description(family, TINY_TOWERS, **network),
                "shape": [of.architecture.vae.latent_channels, SIZE, SIZE],
            }
        )
    text = model.require("text")
    text.tokenizers = {
        name: miniature_tokenizer
        for name, reader in text.params.readers.items()
        if (miniature_tokenizer := reader.miniature_tokenizer()) is not None
    }
    generator = torch.Generator().manual_seed(seed)
    for part in model.parts.values():
        randomise(part, generator)
    return model


def tiny_description(family: str, towers: Mapping[str, Any], **network: Any) -> dict[str, Any]:
    """The description of a miniature with these text towers."""
    of = FAMILIES[family]
    text = of.text_params(towers)
    told = {
        "context_dim": text.context_dim,
        "vector_dim": text.vector_dim,
        "guidance_dim": 8 if of.consistency else None,
    }
    params = replace(
        of.architecture.tiny, **{**{name: size for name, size in told.items() if size is not None}, **network}
    )
    vae = replace(of.vae, **of.architecture.tiny_vae)
    return of.description(params, vae, text, TAESDParams(vae.latent_channels, channels=16))


def randomise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew, so that activations keep their size and no zero hides a mistake; evaluation
    mode."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(generator=generator)
            if p.ndim > 1:
                p.div_(p[0].numel() ** 0.5)
            else:
                p.mul_(0.1).add_(float(name.endswith("weight")))  # norms stay near 1, biases near 0
    network.eval()
