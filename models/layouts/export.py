"""Shared by all published layouts for writing models."""

from __future__ import annotations

from collections.abc import Mapping, Set
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
    """The model's family, or the plain one of its architecture.

    ValueError for models of no published family, and if readers would use the network in another role.
    """
    architecture = architecture_of(getattr(model.backbone, "params", None))
    if not (name := model.spec.get("family") or (architecture and architecture.name)):
        raise ValueError("this model is of no published family: use layout='native'")
    family = lookup("family", name, FAMILIES)
    theirs = family.architecture.channels.get(model.image_channels)
    if model.sees != (family.architecture.roles[theirs] if theirs else ()):
        roles = f"for {theirs} instead of {model.role}"
        raise ValueError(f"readers would use this network {roles}: use layout='native'")
    return family


def kinds_of(model: Model) -> dict[str, Kind]:
    """The kinds of a model's parts except text encoders. ValueError for models of no published family."""
    kinds = {"preview": PREVIEW}
    if model.backbone is not None or model.vae is not None:
        architecture = family_of_model(model).architecture
        kinds |= {"backbone": architecture.kind, "vae": architecture.autoencoder}
    return {name: kinds[name] for name in model.parts if name in kinds}


def in_folders(text: TextParams) -> dict[str, Set[str]]:
    """The parameters of text encoders, by name, that diffusers' folders contain; "text" for all of them."""
    readers = {name: reader.FOLDER_FIELDS for name, reader in text.readers.items()}
    return {"text": {"null"} if text.numbers else set(), **readers}


def check_text(model: Model, family: Family, written: Mapping[str, Set[str]]) -> None:
    """ValueError if readers of files that contain only `written` would encode prompts differently."""
    text = model.require("text").params
    usual = family.text_params({name: reader.network for name, reader in text.readers.items()})
    compared: list[tuple[str, Any, Any, list[str]]] = [("text", text, usual, ["null", "numbers", "zeros"])]
    for what, reader in text.readers.items():
        names = [field.name for field in fields(reader) if field.name != "network"]
        compared.append((what, reader, usual.readers[what], names))
    for what, ours, theirs, names in compared:
        for name in names:
            if name in written.get(what, ()) or name in family.architecture.recorded:
                continue
            if (mine := getattr(ours, name)) != (other := getattr(theirs, name)):
                layouts = "'diffusers' or 'native'" if name in in_folders(text)[what] else "'native'"
                lack = f"files of this layout do not say {name}={mine!r} of {what}"
                raise ValueError(f"{lack}, and readers assume {other!r}: use layout={layouts}")


def published(
    network: nn.Module, layout: Layout, kind: Kind, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The network's tensors by published names. ValueError unless readers make the same network of them."""
    state = network.state_dict()
    tensors = scatter(layout.table(state), state)
    try:
        read = kind.recognise({key: tuple(value.shape) for key, value in tensors.items()}, config or {})
    except (KeyError, IndexError, ValueError):
        read = None
    theirs = _structure(read[0]) if read else {}
    for name, value in _structure(network.params).items():
        if name not in theirs or theirs[name] != value:
            ours = f"a {type(network).__name__} with {name}={value}"
            instead = f"readers would assume {theirs[name]}" if name in theirs else "readers know none"
            raise ValueError(
                f"the layout {layout.name!r} cannot express {ours}, {instead}: use layout='native'"
            )
    return tensors


def _structure(params: Any) -> dict[str, Any]:
    """The parameters of a network that a reader finds out from its tensors."""
    structure = asdict(params)
    for name in ("dropout", "activation", "scale", "shift", "mean", "std"):
        structure.pop(name, None)
    if isinstance(params, UNetParams):  # which sets either heads or head_dim
        heads = [params.count_heads(params.channels * m) for m in params.channel_mult]
        structure |= {"heads": heads, "head_dim": None}
    return structure


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {key: value.to(dtype or value.dtype) for key, value in tensors.items()}
