"""Applies adapters: a new model that shares every tensor that they do not change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusion.spec import check_type
from models.adapters.delta import Delta, LowRank
from models.adapters.place import BACKBONE, Place
from models.adapters.read import Adapter, load_adapter
from models.layers.beside import Factors, has_factors, put_beside
from models.layers.packed import PackedLinear
from models.layers.streaming import Streamed, all_layers
from models.model import FOLDERS, Model

Strength = float | Mapping[str, float]
"""One for all, or one each for the "network" and the "text" encoders; what is not named is off."""
Change = tuple[Place, Delta, float]


def adapted(model: Model, adapters: Mapping[Any, Strength], *, apart: bool = False) -> Model:
    """A model with these adapters: adapted(model, {"style.safetensors": 0.8, "lcm.safetensors": 1.0}).

    adapters  files, PEFT's folders, or what `load_adapter` gave, each with its strength, 1 as trained
    apart     False computes the weights anew; True leaves them, and adds the product of LoRA's factors to
              theirs at every call, as packed weights and models loaded with memory=... need

    `model` itself is never written to, so to take an adapter off is to go on with it. Weights that no adapter
    changes are shared. Changes of several adapters are computed from the model's own weights in float32, and
    add up, whatever the order; the sum is rounded to the weights' dtype once.

    ValueError for adapters that do not fit (`load_adapter`); for a change that needs a weight's values, of
    one that is packed or lies in its file; and for a model with adapters apart already.
    """
    if any(map(has_factors, model.parts.values())):
        raise ValueError("this model has adapters apart: give its base all of them at once")
    copy = _Copy(model, [f"adapted by {getattr(each, 'path', each)} at {s}" for each, s in adapters.items()])
    for name, changes in _collect(model, adapters).items():
        if not (apart and copy.put_beside(name, changes)):
            copy.merge(name, changes)
    return copy.model


def _collect(model: Model, adapters: Mapping[Any, Strength]) -> dict[str, list[Change]]:
    """The changes of each weight that have a strength."""
    changes: dict[str, list[Change]] = defaultdict(list)
    for each, strength in adapters.items():
        adapter = each if isinstance(each, Adapter) else load_adapter(each, model)
        for place, delta in adapter.deltas.items():
            side = "network" if place.name.startswith(BACKBONE) else "text"
            own = strength.get(side, 0.0) if isinstance(strength, Mapping) else strength
            check_type(f"the strength of {adapter.path.name}", own, float)
            if own:
                changes[place.name].append((place, delta, own))
    return changes


class _Copy:
    """A model's copy that shares all tensors, and whose layers can be changed."""

    def __init__(self, model: Model, notes: list[str]) -> None:
        parts = {name: _shared(part) for name, part in model.parts.items()}
        for name, part in parts.items():
            _chain_up(model.parts[name], part)
        changed: dict[str, Any] = parts
        report = model.report and replace(model.report, notes=(*model.report.notes, *notes))
        self.model = replace(model, report=report, **changed)
        roots = {f"{FOLDERS.get(name, name)}.": part for name, part in parts.items()}
        self.layers = {root + name: layer for root, part in roots.items() for name, layer in all_layers(part)}
        self.held = {
            f"{root}{name}.": layer
            for root, part in roots.items()
            for name, layer in part.named_modules()
            if isinstance(layer, Streamed)
        }

    def put_beside(self, name: str, changes: list[Change]) -> bool:
        """Whether all changes of a weight could be put beside it."""
        place, _, leaf = name.rpartition(".")
        layer = self.layers[place]
        low = [(place, delta, s) for place, delta, s in changes if isinstance(delta, LowRank)]
        if leaf != "weight" or len(low) < len(changes) or not isinstance(layer, nn.Linear | nn.Conv2d):
            return False
        parts = [(*_factors(place, delta), s * delta.scale, place.rows) for place, delta, s in low]
        out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        put_beside(layer, Factors.of(parts, out), self._streamed(name) or layer, place.replace(".", "_"))
        return True

    def merge(self, name: str, changes: list[Change]) -> None:
        """Compute a weight anew. ValueError where its values are not at hand."""
        place, _, leaf = name.rpartition(".")
        layer, kind = self.layers[place], type(changes[0][1]).__name__
        if self._streamed(name):
            raise ValueError(f"{name} comes from its file with every call: {_remedy(kind)}")
        if isinstance(layer, PackedLinear) and leaf == "weight":
            raise ValueError(f"{name} is packed: {_remedy(kind)}, or unpack the model (Model.unpacked)")
        weight = getattr(layer, leaf)
        setattr(layer, leaf, nn.Parameter(_merged(weight, changes), weight.requires_grad))

    def _streamed(self, name: str) -> Streamed | None:
        """What brings a tensor its values, None where it has them."""
        return next((held for place, held in self.held.items() if name.startswith(place)), None)


def _remedy(kind: str) -> str:
    return "apart=True adapts it" if kind == "LowRank" else f"{kind} needs its values, which are not at hand"


def _factors(place: Place, delta: LowRank) -> tuple[Tensor, Tensor]:
    """down and up of a change as our layer has its weight: a matrix, or a convolution and a matrix."""
    down, up = delta.down, delta.up.flatten(1)
    if delta.mid is not None:
        down = torch.einsum("mnkl,nj->mjkl", delta.mid, down.flatten(1))
    return down.flatten(1) if place.form == "conv" else down, place.ours(up)


@torch.no_grad()
def _merged(weight: Tensor, changes: list[Change]) -> Tensor:
    """A copy of a weight with all changes of its rows; the other rows stay as they are, bit for bit."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    first, end = min(place.rows[0] for place, *_ in changes), max(place.rows[1] for place, *_ in changes)
    total = torch.zeros_like(weight[first:end], dtype=wide)
    for place, delta, strength in changes:
        change = place.ours(delta.difference(place.published(weight).to(wide)))
        rows = total[place.rows[0] - first : place.rows[1] - first]
        rows.add_(change.mul(strength).view(rows.shape))  # not in one: two adapters add up in any order
    out = weight.clone()
    out[first:end] = total.add_(weight[first:end]).to(weight.dtype)
    return out


def _chain_up(part: nn.Module, copy: nn.Module) -> None:
    """The streamed blocks of a copy follow each other in the order of the original."""
    both = zip(part.modules(), copy.modules(), strict=True)
    copies = {old: new for old, new in both if isinstance(old, Streamed) and isinstance(new, Streamed)}
    for old, new in copies.items():
        new.chain = [copies[each] for each in old.chain]


M = TypeVar("M", bound=nn.Module)


def _shared(module: M) -> M:
    """A copy of a module, and of all within it, that shares every tensor."""
    copy = object.__new__(type(module))
    copy.__dict__ = {
        name: dict(value) if name in ("_parameters", "_buffers") else value
        for name, value in module.__dict__.items()
    }
    copy._modules = {
        name: None if child is None else _shared(child) for name, child in module._modules.items()
    }
    if isinstance(copy, Streamed):
        copy.streamed = [_shared(block) for block in copy.streamed]
    return copy
