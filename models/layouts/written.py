"""What all published layouts share when they write a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.spec import lookup
from models.families import FAMILIES, Family, architecture_of
from models.families.taesd_keys import PREVIEW
from models.files.structure import Kind
from models.files.table import Layout, scatter
from models.model import Model
from models.networks.unet import UNetParams
from models.text.recipes import TextParams


def family_of_model(model: Model) -> Family:
    """The family that the model is of, or the plain one that it is built like.

    ValueError for one of no published family, and for a network that readers would use in another role than
    its own.
    """
    built = architecture_of(getattr(model.backbone, "params", None))
    if not (name := model.spec.get("family") or (built and built.name)):
        raise ValueError("this model is of no published family: use layout='native'")
    of = lookup("family", name, FAMILIES)
    theirs = of.architecture.channels.get(model.image_channels)
    if model.sees != (of.architecture.roles[theirs] if theirs else ()):
        raise ValueError(
            f"readers would take this network, which is for {model.role}, for one for {theirs}: use "
            "layout='native'"
        )
    return of


def kinds_of(model: Model) -> dict[str, Kind]:
    """The kinds of a model's parts but its text encoders, by part. ValueError for a network of no published
    family."""
    kinds = {"preview": PREVIEW}
    if model.backbone is not None or model.vae is not None:
        built = family_of_model(model).architecture
        kinds |= {"backbone": built.kind, "vae": built.autoencoder}
    return {name: kinds[name] for name in model.parts if name in kinds}


def said_in_folders(text: TextParams) -> dict[str, Set[str]]:
    """What diffusers' folders say of how prompts are read, by text encoder, and under "text" of all."""
    return {
        "text": {"null"} if text.numbers else set(),
        **{name: reader.FOLDER_FIELDS for name, reader in text.readers.items()},
    }


def check_text(model: Model, of: Family, said: Mapping[str, Set[str]]) -> None:
    """ValueError if readers of a layout would encode prompts differently: its files say only the parameters
    `said`."""
    text = model.require("text").params
    usual = of.text_params({name: reader.network for name, reader in text.readers.items()})
    compared: list[tuple[str, Any, Any, Sequence[str]]] = [
        ("text", text, usual, ("null", "numbers", "zeros"))
    ]
    for name, reader in text.readers.items():
        compared.append(
            (
                name,
                reader,
                usual.readers[name],
                [field.name for field in fields(reader) if field.name != "network"],
            )
        )
    for what, own, others, names in compared:
        for name in sorted(set(names) - said.get(what, set()) - of.architecture.recorded, key=names.index):
            if (mine := getattr(own, name)) != (theirs := getattr(others, name)):
                where = "'diffusers' or 'native'" if name in said_in_folders(text)[what] else "'native'"
                raise ValueError(
                    f"files of this layout do not say {name}={mine!r} of {what}, readers take {theirs!r}: "
                    f"use layout={where}"
                )


def published(
    network: nn.Module, layout: Layout, kind: Kind, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The network's tensors under their published names. ValueError unless a reader makes the same network of
    them."""
    state = network.state_dict()
    tensors = scatter(layout.table(state), state)
    try:
        read = kind.recognise({key: tuple(value.shape) for key, value in tensors.items()}, config or {})
    except (KeyError, IndexError, ValueError):
        read = None
    mine, theirs = _structure(network.params), _structure(read[0]) if read else {}
    for name, value in mine.items():
        if theirs.get(name, "no network of theirs") != value:
            ours = f"a {type(network).__name__} with {name}={value}"
            raise ValueError(
                f"the layout {layout.name!r} has no words for {ours}, and readers would take it for "
                f"{theirs.get(name, 'none of theirs')}: use layout='native'"
            )
    return tensors


def _structure(params: Any) -> dict[str, Any]:
    """The parameters of a network that a reader has to find out from its tensors."""
    known = asdict(params)
    for name in ("dropout", "activation", "scale", "shift", "mean", "std"):
        known.pop(name, None)
    if isinstance(params, UNetParams):  # which fix either of two
        known |= {
            "heads": [params.count_heads(params.channels * m) for m in params.channel_mult],
            "head_dim": None,
        }
    return known


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {key: value.to(dtype or value.dtype) for key, value in tensors.items()}
