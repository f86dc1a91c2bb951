"""Which networks a file holds, recognised by the prefixes, keys and shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from models.families import ARCHITECTURES, AUTOENCODERS, BACKBONES, READERS, TOWERS
from models.families.taesd_keys import PREVIEW
from models.files.prefixes import shared_prefix, unwrapped
from models.files.scaled import join_scales
from models.files.stored import TensorFile
from models.files.structure import Kind
from models.files.table import Part
from models.layouts import foreign, harmless

BACKBONE = "model.diffusion_model."  # stands before a backbone's keys in a single file of several parts
# What single files put before the keys of a part: the families' own, those of ComfyUI, and of trainers with
# diffusers' names.
_FAMILIES = [
    BACKBONE,
    *(architecture.vae_prefix for architecture in ARCHITECTURES.values()),
    *(tower.prefix for tower in TOWERS),
]
PREFIXES = tuple(
    dict.fromkeys((*_FAMILIES, "diffusion_model.", "unet.", *(f"{tower.folder}." for tower in TOWERS)))
)
AVERAGED, RAW = (
    "raw weights, and averaged ones are there",
    "averaged weights, and raw ones were asked for",
)  # why others are left out
AVERAGES = "model_ema."
EMA_NOTES = 100  # more keys than this under model_ema. are weights, fewer are numbers about them
KINDS: tuple[Kind, ...] = (
    *BACKBONES.values(),
    *AUTOENCODERS.values(),
    *(reader.NETWORK for reader in READERS.values()),
    PREVIEW,
)


def find_parts(file: TensorFile, hints: Mapping[str, Any] | None = None, ema: bool = True) -> list[Part]:
    """The networks in a file, at least one; `part.file.ignored` gives the reason for every key that is in
    none of them.

    ema  take averaged weights if the file has them
    ValueError if it holds none of our networks, or a key that belongs to none and is not known to be
    harmless.
    """
    hints = hints or {}
    foreign.check_packing(file, hints)
    file = unwrapped(join_scales(file))
    if not (groups := _groups(file.tensors)):
        whole = shared_prefix(
            file.tensors
        )  # before the names of all parts, as of a module that holds the pipeline
        inner = {key.removeprefix(whole): stored for key, stored in file.tensors.items()}
        if groups := _groups(inner):
            file = replace(file, tensors=inner)
    averages = [key for key in file.tensors if key.startswith(AVERAGES)]
    groups = groups or {"": [key for key in file.tensors if not key.startswith(AVERAGES)]}
    parts = [part for prefix, keys in groups.items() if (part := _recognised(file, prefix, keys, hints))]
    if not parts:
        raise ValueError(f"{file.path} holds no model that is known here: {foreign.guess(file.tensors)}")
    reasons = dict[str, str | None]()
    if len(averages) > EMA_NOTES and ema:
        reasons = {part.prefix + name: AVERAGED for part in parts for name in part.stored}
        parts = [_averaged(part) for part in parts]
    elif len(averages) > EMA_NOTES:
        reasons = dict.fromkeys(averages, RAW)
    used = {stored.key for part in parts for stored in part.stored.values()}
    rest = [key for key, stored in file.tensors.items() if stored.key not in used]
    reasons = {key: reasons.get(key) or _harmless(key, parts) for key in rest}
    if unknown := [key for key, why in reasons.items() if not why]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"{file.path} holds {unknown[0]}{more}, which belongs to no part of a known model "
            f"({foreign.guess(unknown)})"
        )
    ignored = {key: str(why) for name, why in reasons.items() for key in file.tensors[name].keys}
    file = replace(file, ignored={**file.ignored, **ignored})
    return [replace(part, file=file) for part in parts]


def _groups(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys behind each of PREFIXES that some have."""
    groups = {prefix: [key for key in keys if key.startswith(prefix)] for prefix in PREFIXES}
    return {prefix: found for prefix, found in groups.items() if found}


def _harmless(key: str, parts: Iterable[Part]) -> str | None:
    """Why a key may be ignored, by its name within a part or by its whole name; None if it may not."""
    names = (
        key.removeprefix(prefix)
        for prefix in (*(part.prefix for part in parts), "")
        if key.startswith(prefix)
    )
    return next(filter(None, map(harmless.reason, names)), None)


def _recognised(file: TensorFile, prefix: str, keys: Iterable[str], hints: Mapping[str, Any]) -> Part | None:
    """The network with these keys, without the prefix and without any other prefix that they all share; None
    if it is unknown."""
    names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    stored = {name: file.tensors[prefix + name] for name in names if harmless.reason(name) is None}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for kind in KINDS:
        try:
            found = kind.recognise(shapes, hints)
        except (KeyError, IndexError, ZeroDivisionError, TypeError, ValueError) as error:
            raise ValueError(_not_recognised(file, prefix, kind.words, error)) from None
        if found:
            if empty := [name for name, shape in shapes.items() if 0 in shape]:
                raise ValueError(f"{file.path} is damaged: {prefix}{empty[0]} has no values")
            return Part(kind.part, kind.words, *found, file, stored, prefix, hints)
    more = shared_prefix(stored)
    return _recognised(file, prefix + more, keys, hints) if more else None


def _not_recognised(file: TensorFile, prefix: str, kind: str, error: Exception) -> str:
    """What is wrong with a file that looks like a network of this kind and is none."""
    if what := foreign.known(file.tensors):
        return f"{file.path} holds no model that is known here: {what}"
    if isinstance(error, KeyError):  # which shapes are looked up by
        return f"{file.path} holds an incomplete {kind}: it lacks {prefix}{error.args[0]}"
    if isinstance(error, ValueError):
        return f"{file.path}: {error}"
    return (
        f"{file.path} holds a {kind} with a tensor of an odd shape, or its config.json a setting of an odd "
        f"kind ({error})"
    )


def _averaged(part: Part) -> Part:
    """The part with averaged weights, whose names are the raw ones without dots: a backbone's are all there,
    another part may have none."""
    tensors = part.file.tensors
    averages = {
        name: AVERAGES + f"{part.prefix}{name}".removeprefix("model.").replace(".", "")
        for name in part.stored
    }
    if part.kind != "backbone" and not any(key in tensors for key in averages.values()):
        return part
    if lost := [key for key in averages.values() if key not in tensors]:
        raise ValueError(
            f"{part.file.path} averages only some of its weights: it lacks {lost[0]}; ema=False takes the "
            "raw ones"
        )
    return replace(part, stored={name: tensors[key] for name, key in averages.items()})
