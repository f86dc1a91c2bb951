"""Where the tensors of an adapter belong: rows of our weights, by every name that adapters use for them.

Whatever wrote an adapter, it names weights as they are published: as the family's single files, or as
diffusers and transformers name them, behind a prefix and with dots or underscores. The families' tables have
all of these names, so no dialect needs a converter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.families import Tower, architecture_of
from models.files.table import Form, Layout, Source
from models.layers.packed import PackedLinear
from models.layers.streaming import all_layers
from models.model import Model

BACKBONE = "network."
PREFIXES = (  # of backbones
    *("lora_unet_", "lora_transformer_", "lycoris_"),
    *("unet.", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", ""),
)


@dataclass(frozen=True)
class Place:
    """Rows of one of our weights, which are one published tensor.

    name   in `Model.state_dict()`
    rows   the first of them, and the one behind the last
    form   how the published tensor is written
    shape  the published tensor's
    key    its published name, for error messages
    """

    name: str
    rows: tuple[int, int]
    form: Form
    shape: tuple[int, ...]
    key: str

    def published(self, weight: Tensor) -> Tensor:
        """These rows of our weight, as they are published."""
        return Source((self.key,), self.form).convert(weight[slice(*self.rows)])

    def ours(self, value: Tensor) -> Tensor:
        """`published` backwards, of the rows alone."""
        if self.form == "conv":
            return value.flatten(1) if value.ndim > 1 else value
        return Source((self.key,), self.form).convert(value)  # the other forms are their own inverse


Module = dict[str, Place]
"""The tensors of one published module: "weight", "bias", ..."""


def places(model: Model) -> dict[str, Module]:
    """Every published module of the backbone and of the text encoders, by all names that adapters use."""
    found = {} if model.backbone is None else backbone_places(model.backbone)
    if model.text is not None and model.family is not None:
        towers = {tower.name: tower for tower in model.family.architecture.towers}
        for name, network in model.text.towers.items():
            layout = model.text.params.readers[name].NETWORK.diffusers(network.params)
            modules = _modules(layout, network, f"text.towers.{name}.")
            found |= _named(modules, _text_prefixes(towers[name], alone=len(towers) == 1))
    return found


def backbone_places(network: nn.Module) -> dict[str, Module]:
    """Those of a backbone; none for one of no published family."""
    params: Any = getattr(network, "params", None)
    architecture = architecture_of(params)
    found: dict[str, Module] = {}
    if architecture is not None:
        kind = architecture.kind
        for layout in (kind.diffusers, kind.single, *kind.in_adapters):
            found = _named(_modules(layout(params), network, BACKBONE), PREFIXES) | found
    return found


def _named(modules: Mapping[str, Module], prefixes: Iterable[str]) -> dict[str, Module]:
    """Modules behind each prefix: behind one that ends in _ the dots of their names are underscores too."""
    return {
        prefix + (name.replace(".", "_") if prefix.endswith("_") else name): module
        for name, module in modules.items()
        for prefix in prefixes
    }


def _text_prefixes(tower: Tower, alone: bool) -> tuple[str, ...]:
    """What stands before the names of a text encoder, always transformers': kohya's number, diffusers'
    folder, ComfyUI's name."""
    number = tower.folder.removeprefix("text_encoder").removeprefix("_") or "1"
    prefixes = [
        f"{tower.folder}.",
        f"lora_te{number}_",
        f"text_encoders.{tower.file or tower.name}.transformer.",
    ]
    if alone:
        prefixes.append("lora_te_")
    if tower.reader.kind == "t5":  # kohya calls it the third, also in models with two
        prefixes.append("lora_te3_")
    return tuple(prefixes)


def _modules(layout: Layout, network: nn.Module, before: str) -> dict[str, Module]:
    """The published modules of a network, each with its tensors."""
    state, modules = _tensors(network), dict[str, Module]()
    for name, source in layout.table(state).items():
        start = 0
        for key, part in zip(source.keys, source.split(state[name]), strict=True):
            stem, _, leaf = key.rpartition(".")
            shape = tuple(source.convert(part).shape)
            rows = (start, start + len(part)) if part.ndim else (0, 1)
            modules.setdefault(stem, {})[leaf] = Place(before + name, rows, source.form, shape, key)
            start = rows[1]
    return modules


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a network by name, for its shape: packed weights as if they were not."""
    found: dict[str, Tensor] = {}
    for place, layer in all_layers(network):
        if isinstance(layer, PackedLinear):
            found[f"{place}.weight"] = torch.empty(layer.out_features, layer.in_features, device="meta")
        found |= {
            f"{place}.{name}".removeprefix("."): value
            for name, value in layer.named_parameters(recurse=False)
        }
    return found
