"""Which networks a file holds: told by the prefixes, keys and shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from models.checkpoints import clip_keys, flux_keys, foreign, harmless, sd3_keys, t5_keys, taesd_keys, unet_keys, vae_keys
from models.checkpoints.prefixes import shared_prefix, unwrapped
from models.checkpoints.scaled import join_scales
from models.checkpoints.stored import Stored, TensorFile
from models.checkpoints.table import Layout
from models.checkpoints.unet_keys import Shapes

# Where latent diffusion's and its successors' single files keep their parts, ComfyUI's files, and those of trainers with diffusers' names.
PREFIXES = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.0.model.",
    "conditioner.embedders.1.model.",
    "vae.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoders.t5xxl.transformer.",
    "diffusion_model.",
    "unet.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
)
AVERAGED, RAW = "raw weights, and averaged ones are there", "averaged weights, and raw ones were asked for"  # why others are left out
AVERAGES = "model_ema."
LATENT_STATISTICS = ("edm_mean", "edm_std")  # Playground's
EMA_NOTES = 100  # more keys than this under model_ema. are weights, fewer are numbers about them


class Kind(NamedTuple):
    """One kind of network: the part of a model that it is, what people call it, and what knows it by keys and shapes."""

    part: str
    words: str
    recognise: Callable[[Shapes, Mapping[str, Any]], tuple[Any, Layout] | None]


KINDS = (
    Kind("backbone", "UNet", unet_keys.recognise),
    Kind("backbone", "FLUX transformer", flux_keys.recognise),
    Kind("backbone", "Stable Diffusion 3 transformer", sd3_keys.recognise),
    Kind("vae", "autoencoder", vae_keys.recognise),
    Kind("text", "text encoder", clip_keys.recognise),
    Kind("text", "T5 text encoder", t5_keys.recognise),
    Kind("preview", "tiny autoencoder", taesd_keys.recognise),
)


@dataclass(frozen=True, eq=False)
class Part:
    """One network in a file, or the half of one that `layout.inside` names.

    kind    "backbone", "vae", "text" (one tower) or "preview"
    words   what people call it
    stored  its tensors by the layout's keys
    keys    the key in the file of each of these
    prefix  what stands before the layout's keys in the file
    hints   what a configuration beside the file says
    """

    kind: str
    words: str
    params: Any
    layout: Layout
    file: TensorFile
    stored: Mapping[str, Stored]
    keys: Mapping[str, str]
    prefix: str = ""
    hints: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """A file, its parts, and the reason why each other key is left out. Scales: of 8-bit weights, by whose keys each is read."""

    file: TensorFile
    parts: list[Part]
    ignored: dict[str, str]
    scales: Mapping[str, str] = field(default_factory=dict)


def find_parts(file: TensorFile, hints: Mapping[str, Any] | None = None, ema: bool = True) -> Found:
    """Everything in a file. ValueError where it holds none of our networks, or a key that is neither of one nor known to be harmless.

    ema  take averaged weights where the file has them
    """
    hints = hints or {}
    foreign.check_packing(file, hints)
    file = unwrapped(join_scales(file))
    if not (groups := _groups(file.tensors)):
        whole = shared_prefix(file.tensors)  # before the names of all parts, as of a module that holds the pipeline
        inner = {key.removeprefix(whole): stored for key, stored in file.tensors.items()}
        if groups := _groups(inner):
            file = replace(file, tensors=inner)
    groups = groups or {"": [key for key in file.tensors if not key.startswith(AVERAGES)]}
    parts: list[Part] = []
    taken: set[str] = set()
    ignored: dict[str, str] = {}
    for prefix, keys in groups.items():
        names = {key.removeprefix(prefix): key for key in keys}
        if (part := _recognised(file, prefix, names, hints)) is None:  # whatever else may stand before all of it
            more = shared_prefix(name for name in names if harmless.reason(name) is None)
            names = {name.removeprefix(more): key for name, key in names.items() if name.startswith(more)}
            part = _recognised(file, prefix + more, names, hints) if more else None
        if part is None:
            continue
        parts.append(part)
        taken.update(names.values())
        for name, key in names.items():  # of a part's own keys, those that it has no use for
            if name not in part.keys and (why := harmless.reason(name) or harmless.reason(key)):
                ignored[key] = why
    averages = [key for key in file.tensors if key.startswith(AVERAGES)]
    if len(averages) > EMA_NOTES:
        parts, ignored = _with_averages(file, parts, ignored, averages, ema)
    rest = [key for key in file.tensors if key not in taken and key not in ignored and key not in LATENT_STATISTICS]
    ignored |= {key: why for key in rest if (why := harmless.reason(key))}
    if not parts:
        raise ValueError(f"{file.path} holds no model that is known here: {foreign.guess(file.tensors)}")
    used = {key for part in parts for key in part.keys.values()}
    if unknown := [key for key in file.tensors if key not in used and key not in ignored and key not in LATENT_STATISTICS]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"{file.path} holds {unknown[0]}{more}, which belongs to no part of a known model ({foreign.guess(unknown)})")
    parts = [replace(part, keys={name: file.tensors[key].key for name, key in part.keys.items()}) for part in parts]
    ignored = {file.tensors[key].key: why for key, why in ignored.items()}
    scales = {scale: stored.key for stored in file.tensors.values() for scale in stored.keys[1:]}
    return Found(file, parts, {**ignored, **file.ignored}, scales)


def _groups(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys behind each of PREFIXES that some have."""
    groups = {prefix: [key for key in keys if key.startswith(prefix)] for prefix in PREFIXES}
    return {prefix: found for prefix, found in groups.items() if found}


def _recognised(file: TensorFile, prefix: str, names: Mapping[str, str], hints: Mapping[str, Any]) -> Part | None:
    """The network whose keys, without their prefix, are these."""
    keys = {name: key for name, key in names.items() if harmless.reason(name) is None}
    shapes = {name: file.tensors[key].shape for name, key in keys.items()}
    for kind in KINDS:
        try:
            found = kind.recognise(shapes, hints)
        except (KeyError, IndexError, ZeroDivisionError, TypeError, ValueError) as error:
            raise ValueError(_not_recognised(file, prefix, kind.words, error)) from None
        if found:
            params, layout = found
            if empty := [keys[name] for name, shape in shapes.items() if 0 in shape]:
                raise ValueError(f"{file.path} is damaged: {empty[0]} has no values")
            stored = {name: file.tensors[key] for name, key in keys.items()}
            return Part(kind.part, kind.words, params, layout, file, stored, keys, prefix, hints)
    return None


def _not_recognised(file: TensorFile, prefix: str, kind: str, error: Exception) -> str:
    """What is wrong with a file that looks like a network of this kind and cannot be one."""
    if what := foreign.known(file.tensors):
        return f"{file.path} holds no model that is known here: {what}"
    if isinstance(error, KeyError):  # which shapes are looked up by
        return f"{file.path} holds an incomplete {kind}: it lacks {prefix}{error.args[0]}"
    if isinstance(error, ValueError):
        return f"{file.path}: {error}"
    return f"{file.path} holds a {kind} with a tensor of an odd shape, or its config.json a setting of an odd kind ({error})"


def _with_averages(
    file: TensorFile, parts: list[Part], ignored: dict[str, str], averages: list[str], ema: bool
) -> tuple[list[Part], dict[str, str]]:
    """Parts with their averaged weights, those of the backbone mostly, in place of the raw ones: their names are those without dots."""
    if not ema:
        return parts, ignored | dict.fromkeys(averages, RAW)
    result = []
    for part in parts:
        keys = {name: f"model_ema.{key.removeprefix('model.').replace('.', '')}" for name, key in part.keys.items()}
        if part.kind == "backbone" or any(key in file.tensors for key in keys.values()):
            if lost := [key for key in keys.values() if key not in file.tensors]:
                raise ValueError(f"{file.path} averages only some of its weights: it lacks {lost[0]}; ema=False takes the raw ones")
            ignored = ignored | dict.fromkeys(part.keys.values(), AVERAGED)
            part = replace(part, keys=keys, stored={name: file.tensors[key] for name, key in keys.items()})
        result.append(part)
    return result, ignored
