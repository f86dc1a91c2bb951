"""Reads adapters, whoever wrote them: a file is groups of tensors `stem.leaf`, where the stem names a
published weight (`place`), and the leaves say how it changes (`delta`)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.messages import brief
from diffusion.spec import check_type
from models.adapters.delta import Added, Delta, Hadamard, Kronecker, LowRank, Magnitude, Replaced, Scaled
from models.adapters.place import Module, Place, places
from models.families import ARCHITECTURES, FAMILIES
from models.files.blank import Blank
from models.files.stored import Stored, TensorFile
from models.files.tensors import open_tensors
from models.files.text import read_json, sha256_of_file
from models.layers.finite import is_finite
from models.model import Model, build
from models.presets import TINY_TOWERS, tiny_description

# What writers call the tensors of a module, by the names used below; other leaves have one name, their own.
ENDINGS = {
    "down": "lora_down.weight lora_A.weight lora_A.default.weight "
    "lora.down.weight lora_linear_layer.down.weight",
    "up": "lora_up.weight lora_B.weight lora_B.default.weight lora.up.weight lora_linear_layer.up.weight",
    "mid": "lora_mid.weight",
    "up_bias": "lora_B.bias lora_up.bias",
    "magnitude": "lora_magnitude_vector lora_magnitude_vector.weight lora_magnitude_vector.default.weight",
    "diff": "diff w_norm",
    "diff_b": "diff_b b_norm",
    "factor": "weight",  # of (IA)^3, where on_input lies beside it
}
OWN_NAMES = """alpha dora_scale set_weight on_input hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2
lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"""
LEAVES = {f".{end}": leaf for leaf, ends in ENDINGS.items() for end in ends.split()}
LEAVES |= {f".{leaf}": leaf for leaf in OWN_NAMES.split()}
_BY_LENGTH = sorted(LEAVES, key=len, reverse=True)
# Attention processors, of diffusers in 2023 and of x-flux, are named as the layers that they change.
SPELLINGS = (
    (r"\.self_attn\.to_(q|k|v)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.self_attn\.to_out_lora\.", ".self_attn.out_proj.lora."),
    (r"\.processor\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.processor\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.processor\.(qkv|proj)_lora(\d?)\.", r".processor.\1\2.lora."),
)
# Kinds that are not here, by what shows them.
REFUSED = {
    r"\.oft_(blocks|R)|\.boft_": "an OFT or BOFT, which turns weights",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"^lllite_": "a ControlNet-LLLite",
    r"\bip_adapter\.|\bimage_proj\.": "an IP-Adapter",
    r"^lora_prior_unet_": "a LoRA of Stable Cascade",
    r"\.reshape_weight$": "a LoRA that makes a weight larger",
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of a PEFT folder


@dataclass(frozen=True, repr=False)
class Adapter:
    """What a file changes of a model.

    path    where it was read
    deltas  the change of each place
    notes   what was assumed, and with strict=False what was left out
    """

    path: Path
    deltas: Mapping[Place, Delta]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(type(delta).__name__ for delta in self.deltas.values()))
        return "\n".join(
            [f"Adapter {self.path.name}: {len(self.deltas)} weights change ({kinds})", *self.notes]
        )


Group = dict[str, Stored]
"""The tensors of one module, by leaf."""


def load_adapter(path: str | Path, model: Model, *, strict: bool = True) -> Adapter:
    """An adapter for this model: a file, or a folder that PEFT wrote. The model is not changed.

    strict  False leaves out what does not fit the model, and says so in `notes`

    FileNotFoundError, or ValueError in one line that names file and key: for another model's adapter, halves
    of pairs, sizes that do not fit, values that are not finite, and kinds that are not known here.
    """
    path = Path(path)
    file, config = _open(path)
    groups, foreign = _groups(file)
    if not any(group.keys() - {"factor"} for group in groups.values()):
        raise ValueError(f"{path} is not an adapter, as it holds whole weights: models.load takes those")
    known = places(model)
    deltas: dict[Place, Delta] = {}
    unknown = [stored.key for stored in foreign]
    for stem, group in groups.items():
        if (module := known.get(stem)) is None:
            unknown.append(next(iter(group.values())).key)
            continue
        try:
            changes = _deltas(file, stem, group, module, config)
        except MisfitError as error:
            if strict:
                raise ValueError(f"{error}{_made_for(file, groups, model)}") from None
            unknown.append(next(iter(group.values())).key)
            continue
        for place, delta in changes:
            if place in deltas:
                raise ValueError(f"{path} changes {place.key} twice, under different names ({stem})")
            deltas[place] = delta
    if unknown and (strict or not deltas):
        raise ValueError(_misfit(file, groups, unknown, len(groups) + len(foreign), model))
    notes = (f"left out: {len(unknown)} that the model does not have ({unknown[0]}, ...)",) if unknown else ()
    return Adapter(path, deltas, notes, file.metadata)


def sha256_of_adapters(paths: Iterable[str | Path]) -> str:
    """One hash of what files, or PEFT's folders, hold, in this order."""
    files = [
        file
        for path in map(Path, paths)
        for file in ([path / CONFIG, path / WEIGHTS] if path.is_dir() else [path])
    ]
    return hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()


def _open(path: Path) -> tuple[TensorFile, Mapping[str, Any]]:
    """A file of an adapter, and what its configuration says."""
    if path.is_dir():
        if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
            raise ValueError(f"{path} is not an adapter's folder: PEFT's holds {CONFIG} and {WEIGHTS}")
        config = read_json(path / CONFIG)
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise ValueError(
                f"{path / CONFIG} says peft_type {brief(kind)}, of which only LORA is known here"
            )
        return open_tensors(path / WEIGHTS), {"": _checked(path / CONFIG, config)}
    file = open_tensors(path)
    text = file.metadata.get("lora_adapter_metadata")  # diffusers writes PEFT's configuration there
    try:
        flat = json.loads(text) if text else {}
    except ValueError:
        raise ValueError(f"{path} is damaged: its lora_adapter_metadata is not JSON") from None
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        part, _, name = str(key).partition(".")
        configs.setdefault(f"{part}.", {})[name] = value
    return file, {part: _checked(path, config) for part, config in configs.items()}


def _checked(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """PEFT's settings that say how strong a LoRA is. ValueError where they cannot be."""
    kinds = {"lora_alpha": float, "use_rslora": bool, "alpha_pattern": dict[str, float]}
    found = {name: config[name] for name in kinds if config.get(name) is not None}
    try:
        for name, value in found.items():
            check_type(name, value, kinds[name])
        for pattern in found.get("alpha_pattern", ()):
            re.compile(pattern)
    except (ValueError, re.error) as error:
        raise ValueError(f"{path} is damaged: its configuration cannot be read ({error})") from None
    return found


def _groups(file: TensorFile) -> tuple[dict[str, Group], list[Stored]]:
    """The file's tensors by module and leaf, and those that are named like no part of an adapter."""
    groups: dict[str, Group] = {}
    foreign = []
    for key, stored in file.tensors.items():
        for pattern, what in REFUSED.items():
            if re.search(pattern, key):
                raise ValueError(f"{file.path} holds {key}: it is {what}, which this library does not apply")
        name = key
        for pattern, usual in SPELLINGS:
            name = re.sub(pattern, usual, name)
        if (end := next((end for end in _BY_LENGTH if name.endswith(end)), None)) is None:
            foreign.append(stored)
            continue
        leaf, group = LEAVES[end], groups.setdefault(name.removesuffix(end), {})
        if leaf in group:
            raise ValueError(f"{file.path} holds {key} and {group[leaf].key}, which are two of the same")
        group[leaf] = stored
    return groups, foreign


class MisfitError(ValueError):
    """A change whose sizes are not those of the model."""


# Kinds ------------------------------------------------------------------------------------------------------


def _deltas(
    file: TensorFile, stem: str, group: Group, module: Module, configs: Mapping[str, Any]
) -> list[tuple[Place, Delta]]:
    """What one module's tensors change: its weight, its bias, or both."""
    t = {leaf: _read(stored) for leaf, stored in group.items()}
    used: set[str] = set()

    def take(*leaves: str) -> tuple[Tensor, ...]:
        used.update(leaves)
        return tuple(t[leaf] for leaf in leaves)

    weight = module.get("weight") or module.get("scale")
    found: list[tuple[Place, Delta]] = []
    try:
        scale = _scale(t, stem, configs)
        inner = _weight_delta(t, take, scale)
        if inner is not None and weight is not None:
            used.add("alpha")
            inner = _with_magnitude(t, take, inner, weight)
            inner.difference(torch.empty(weight.shape, device="meta"))  # that the sizes fit
            found.append((weight, inner))
        for leaf in ("diff_b", "up_bias"):
            if leaf in t and (bias := module.get("bias")):
                delta = Added(*take(leaf))
                delta.difference(torch.empty(bias.shape, device="meta"))
                found.append((bias, delta))
    except (RuntimeError, IndexError, KeyError):  # torch's, of shapes; a factor that lacks
        raise MisfitError(_odd(file, group, "its factors do not fit each other")) from None
    except ValueError as error:
        raise MisfitError(_odd(file, group, str(error))) from None
    if rest := sorted(t.keys() - used, key=lambda leaf: (leaf == "alpha", leaf)):
        raise ValueError(f"{file.path} holds {group[rest[0]].key} without the tensors that belong to it")
    return found


def _weight_delta(
    t: Mapping[str, Tensor], take: Callable[..., tuple[Tensor, ...]], scale: float
) -> Delta | None:
    """The kind that the leaves of a module show, None where they change no weight."""
    if {"down", "up"} <= t.keys():
        down, up = take("down", "up")
        return LowRank(down, up, scale, take("mid")[0] if "mid" in t else None)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= t.keys():
        sides = (_factors(t, take, "hada_w1", "hada_t1"), _factors(t, take, "hada_w2", "hada_t2"))
        return Hadamard(*sides, scale)
    if any(leaf.startswith("lokr_w1") for leaf in t) and any(leaf.startswith("lokr_w2") for leaf in t):
        first, second = _factors(t, take, "lokr_w1", ""), _factors(t, take, "lokr_w2", "lokr_t2")
        # LyCORIS scales once where either is factored, and whole ones not at all, whatever alpha says
        return Kronecker(first, second, 1.0 if len(first) == len(second) == 1 else scale)
    if "diff" in t:
        return Added(*take("diff"))
    if "set_weight" in t:
        return Replaced(*take("set_weight"))
    if {"factor", "on_input"} <= t.keys():
        factor, on_input = take("factor", "on_input")
        return Scaled(factor.flatten()[None] if on_input.item() else factor.flatten()[:, None])
    return None


def _factors(
    t: Mapping[str, Tensor], take: Callable[..., tuple[Tensor, ...]], name: str, core: str
) -> tuple[Tensor, ...]:
    """A factor that is whole, or in two parts, or in two parts and a core."""
    if name in t:
        return take(name)
    return take(f"{name}_a", f"{name}_b", *([core] if core in t else []))


def _with_magnitude(
    t: Mapping[str, Tensor], take: Callable[..., tuple[Tensor, ...]], inner: Delta, place: Place
) -> Delta:
    """DoRA, where magnitudes lie beside a change. PEFT's are of rows; LyCORIS' of what their shape says."""
    if "magnitude" in t:
        return Magnitude(inner, take("magnitude")[0])
    if "dora_scale" in t:
        (scale,) = take("dora_scale")
        columns = scale.ndim > 1 and scale.shape[0] == 1 and scale.shape[1] == place.shape[1]
        return Magnitude(inner, scale, int(columns and place.shape[0] != 1))
    return inner


def _scale(t: Mapping[str, Tensor], stem: str, configs: Mapping[str, Any]) -> float:
    """alpha / r of the module itself; 1 without alpha, and where it is 0, as kohya and LyCORIS have it."""
    ranks = [
        t[leaf].shape[0]
        for leaf in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        if leaf in t and t[leaf].ndim
    ]
    if not ranks:
        return 1.0
    rank = ranks[0]
    if "alpha" in t:
        if t["alpha"].numel() != 1:
            raise ValueError(f"its alpha has {t['alpha'].numel()} values")
        alpha = float(t["alpha"])
        return alpha / rank if alpha else 1.0
    for prefix, config in configs.items():
        if stem.startswith(prefix):
            name = stem.removeprefix(prefix).removeprefix("base_model.model.")
            alphas = config.get("alpha_pattern", {})
            alpha = next(
                (a for key, a in alphas.items() if re.match(rf"(.*\.)?({key})$", name)),
                config.get("lora_alpha", rank),
            )
            return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return 1.0


# What is wrong ----------------------------------------------------------------------------------------------


def _read(stored: Stored) -> Tensor:
    """A tensor of the file, all of it checked. ValueError unless it holds floats, or one number."""
    if not stored.dtype.is_floating_point:
        if math.prod(stored.shape) == 1:
            value = torch.empty(stored.shape, dtype=stored.dtype)
            stored.read_into(value)
            return value.float()
        raise ValueError(
            f"{stored.path} holds {stored.key} in {stored.dtype}, which are not an adapter's values"
        )
    value = stored.take(torch.float32 if stored.dtype.itemsize < 2 else stored.dtype)
    if not is_finite(value):
        raise ValueError(f"{stored.path} is damaged: {stored.key} holds values that are not finite")
    return value


def _odd(file: TensorFile, group: Group, reason: str) -> str:
    key = next((stored.key for leaf, stored in group.items() if leaf != "alpha"), "alpha")
    return f"{file.path} does not fit the model at {key}: {reason}"


def _misfit(
    file: TensorFile, groups: Mapping[str, Group], unknown: list[str], total: int, model: Model
) -> str:
    """For an adapter of another model, or of none."""
    of = model.family.title if model.family else "this model"
    many = (
        f"none of its {total} modules is"
        if len(unknown) == total
        else f"{len(unknown)} of its {total} modules are not"
    )
    return f"{file.path} does not fit {of}: {many} there ({unknown[0]}, ...){_made_for(file, groups, model)}"


def _made_for(file: TensorFile, groups: Mapping[str, Group], model: Model) -> str:
    """What an adapter looks made for, where that is another architecture than the model's."""
    says = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
    title = _guess(groups) or (says and brief(says))
    own = FAMILIES[model.family.architecture.name].title if model.family else None
    return f"; it looks made for {title}" if title and title != own else ""


CONTEXT = 61  # as wide as no layer of a miniature is


def _guess(groups: Mapping[str, Group]) -> str | None:
    """The family whose miniature has most of these modules; of several, one with as wide a context."""
    best, title = (0, False), None
    for architecture in ARCHITECTURES.values():
        with Blank():
            model = build(
                tiny_description(architecture.name, TINY_TOWERS, context_dim=CONTEXT), device="meta"
            )
        known = {_without_numbers(name): module for name, module in places(model).items()}
        found = [(group, known.get(_without_numbers(name))) for name, group in groups.items()]
        contexts = {
            group["down"].shape[1]
            for group, module in found
            if module and "down" in group and module["weight"].shape[1:2] == (CONTEXT,)
        }
        fits = sum(module is not None for _, module in found)
        if (fit := (fits, contexts == {architecture.network.context_dim})) > best:
            best, title = fit, FAMILIES[architecture.name].title
    return title


def _without_numbers(name: str) -> str:
    """A module's name for blocks of any number; those of text encoders stay: lora_te2_..._#_..."""
    return re.sub(r"(?<=[._])\d+(?=[._]|$)", "#", name)
