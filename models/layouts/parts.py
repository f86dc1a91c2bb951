"""Recognises the networks in a file by the prefixes, keys and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from models.families import ARCHITECTURES, AUTOENCODERS, BACKBONES, READERS, TOWERS
from models.families.taesd_keys import PREVIEW
from models.files.prefixes import shared_prefix, without_wrappers
from models.files.scaled import join_scales
from models.files.stored import TensorFile
from models.files.structure import Kind
from models.files.table import Part
from models.layouts import harmless, unsupported

BACKBONE = "model.diffusion_model."  # the prefix of a backbone in a single file with several parts
# Prefixes of parts in single files: the families' own, ComfyUI's, and those of trainers with diffusers'
# names.
_VAE_PREFIXES = [architecture.vae_prefix for architecture in ARCHITECTURES.values()]
_OWN_PREFIXES = [BACKBONE, *_VAE_PREFIXES, *(tower.prefix for tower in TOWERS)]
_OTHER_PREFIXES = ["diffusion_model.", "unet.", *(f"{tower.folder}." for tower in TOWERS)]
PREFIXES = tuple(dict.fromkeys([*_OWN_PREFIXES, *_OTHER_PREFIXES]))
# Reasons why weights are left out.
AVERAGED, RAW = "raw weights, replaced by averaged ones", "averaged weights, as raw ones were requested"
AVERAGES = "model_ema."
MIN_AVERAGES = 101  # fewer keys under model_ema. are not weights but numbers about them
KINDS: tuple[Kind, ...] = (
    *BACKBONES.values(),
    *AUTOENCODERS.values(),
    *(reader.NETWORK for reader in READERS.values()),
    PREVIEW,
)


def find_parts(file: TensorFile, hints: Mapping[str, Any] | None = None, ema: bool = True) -> list[Part]:
    """The networks in a file, at least one; `part.file.ignored` has the reason for every other key.

    ema  load averaged weights if the file has them

    ValueError if it holds no known network, or a key that belongs to none and is not known to be harmless.
    """
    hints = hints or {}
    unsupported.check_packing(file, hints)
    file = without_wrappers(join_scales(file))
    if not (groups := _group(file.tensors)):
        outer = shared_prefix(file.tensors)  # added by a module that holds the pipeline
        inner = {key.removeprefix(outer): stored for key, stored in file.tensors.items()}
        if groups := _group(inner):
            file = replace(file, tensors=inner)
    averages = [key for key in file.tensors if key.startswith(AVERAGES)]
    groups = groups or {"": [key for key in file.tensors if not key.startswith(AVERAGES)]}
    parts = [part for prefix, keys in groups.items() if (part := _recognise(file, prefix, keys, hints))]
    if not parts:
        raise ValueError(f"{file.path} holds no known model: {unsupported.describe(file.tensors)}")
    reasons = dict[str, str | None]()
    if len(averages) >= MIN_AVERAGES and ema:
        reasons = {part.prefix + name: AVERAGED for part in parts for name in part.stored}
        parts = [_with_averages(part) for part in parts]
    elif len(averages) >= MIN_AVERAGES:
        reasons = dict.fromkeys(averages, RAW)
    used = {stored.key for part in parts for stored in part.stored.values()}
    rest = [key for key, stored in file.tensors.items() if stored.key not in used]
    reasons = {key: reasons.get(key) or _reason(key, parts) for key in rest}
    if unknown := [key for key, reason in reasons.items() if not reason]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        belongs = f"{unknown[0]}{more}, which belongs to no part of a known model"
        raise ValueError(f"{file.path} holds {belongs} ({unsupported.describe(unknown)})")
    ignored = {key: str(reason) for name, reason in reasons.items() for key in file.tensors[name].keys}
    file = replace(file, ignored={**file.ignored, **ignored})
    return [replace(part, file=file) for part in parts]


def _group(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys with each of PREFIXES."""
    groups = {prefix: [key for key in keys if key.startswith(prefix)] for prefix in PREFIXES}
    return {prefix: group for prefix, group in groups.items() if group}


def _reason(key: str, parts: Iterable[Part]) -> str | None:
    """Why a key may be ignored, by its name within a part or by its whole name; None if it may not."""
    prefixes = [part.prefix for part in parts if key.startswith(part.prefix)]
    reasons = (harmless.reason(key.removeprefix(prefix)) for prefix in (*prefixes, ""))
    return next(filter(None, reasons), None)


def _recognise(file: TensorFile, prefix: str, keys: Iterable[str], hints: Mapping[str, Any]) -> Part | None:
    """The network with these keys, without this prefix and any other shared one; None if it is unknown."""
    names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    stored = {name: file.tensors[prefix + name] for name in names if harmless.reason(name) is None}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    for kind in KINDS:
        try:
            network = kind.recognise(shapes, hints)
        except (KeyError, IndexError, ZeroDivisionError, TypeError, ValueError) as error:
            raise ValueError(_explain(file, prefix, kind.title, error)) from None
        if network:
            if empty := [name for name, shape in shapes.items() if 0 in shape]:
                raise ValueError(f"{file.path} is damaged: {prefix}{empty[0]} has no values")
            return Part(kind.part, kind.title, *network, file, stored, prefix, hints)
    more = shared_prefix(stored)
    return _recognise(file, prefix + more, keys, hints) if more else None


def _explain(file: TensorFile, prefix: str, kind: str, error: Exception) -> str:
    """The error message for a file that looks like a network of this kind, and is not one."""
    if what := unsupported.identify(file.tensors):
        return f"{file.path} holds no known model: {what}"
    if isinstance(error, KeyError):  # raised for a missing key
        return f"{file.path} holds an incomplete {kind}: it lacks {prefix}{error.args[0]}"
    if isinstance(error, ValueError):
        return f"{file.path}: {error}"
    return f"{file.path} holds a {kind} with an unexpected shape, or a wrong setting in config.json ({error})"


def _with_averages(part: Part) -> Part:
    """The part with averaged weights, named like raw ones without dots. Only a backbone must have them."""
    tensors = part.file.tensors
    averages = {
        name: AVERAGES + f"{part.prefix}{name}".removeprefix("model.").replace(".", "")
        for name in part.stored
    }
    if part.kind != "backbone" and not any(key in tensors for key in averages.values()):
        return part
    if missing := [key for key in averages.values() if key not in tensors]:
        some = f"{part.file.path} averages only some of its weights: it lacks {missing[0]}"
        raise ValueError(f"{some}; ema=False loads the raw ones")
    return replace(part, stored={name: tensors[key] for name, key in averages.items()})
