"""The units of an autoencoder's latents, read from files, and the family that they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from diffusion.messages import brief
from diffusion.spec import make_params
from models.families import FAMILIES, Family, architecture_of
from models.families.family import to_plain
from models.families.vae_keys import LATENT_STATISTICS
from models.files.stored import TensorFile
from models.files.table import Part
from models.layouts.findings import Findings
from models.networks.vae import VAEParams

UNITS = ("scale", "shift", "mean", "std")  # parameters of an autoencoder that no shape shows
SCALE = "scale_factor"  # latent diffusion's buffer, for a scale that is measured at the start of training
MAX_LATENT_CHANNELS = 64  # published autoencoders have up to 16


def vae_params(found: Findings, family: Family, requested: str | None) -> Any | None:
    """The autoencoder's parameters, with the units of its latents from the files, else the family's.

    ValueError for the autoencoder of another family, whose images would be wrong without any other sign.
    """
    part, usual = found.part("vae"), family.vae
    if not part or not (isinstance(part.params, VAEParams) and isinstance(usual, VAEParams)):
        return part.params if part else None
    title, file = family.title, part.file
    source, scaling = read_scale(found, part)
    if other := _other_family(found, part, scaling, family) if found.backbone or requested else None:
        source = source or "the network in the same file"
        raise ValueError(f"{file.path} is the autoencoder of {other.title}, as {source} says, not of {title}")
    if not source and not found.backbone and not requested:
        found.notes.append(
            f"latents are scaled by {usual.scale:g}, as in {title}: family=... chooses another one"
        )
    elif not source and found.backbone and found.backbone.file is not file:
        found.notes.append(
            f"{file.path.name} does not say whose latents it makes: those of {title} are assumed"
        )
    for name, verb in (("scale", "scaled"), ("shift", "shifted")):
        value, own = scaling.get(name), getattr(usual, name)
        if source and value != own and not same_scale(value, own):
            by = f"{brief(value)}, as {source} says, and not by {own:g}, as in {title}"
            found.notes.append(f"latents are {verb} by {by}")
    units = scaling or {name: getattr(usual, name) for name in UNITS}
    try:
        return make_params("", VAEParams, to_plain(part.params) | units)
    except ValueError as error:
        refused = "its latents cannot be scaled as its configuration says"
        raise ValueError(f"{file.path}: {refused}: {error}") from None


def has_statistics(found: Findings) -> bool:
    """Whether the network's file holds statistics of latents, or without a network, any file does."""
    files = [found.backbone.file] if found.backbone else found.files
    return all(any(key in file.tensors for file in files) for key in LATENT_STATISTICS)


def note_preview(found: Findings, family: Family) -> None:
    """Notes that nothing shows whose latents a tiny autoencoder from elsewhere decodes."""
    part = found.part("preview")
    if part and found.backbone and not (found.pipeline.index and found.pipeline.holds(part)):
        name = part.file.path.name
        found.notes.append(
            f"{name} does not say whose latents it decodes: those of {family.title} are assumed"
        )


def read_scale(found: Findings, part: Part) -> tuple[str, dict[str, Any]]:
    """Where files state the scale of an autoencoder's latents, and its parameters; "" and {} if nowhere."""
    hints, file = part.hints, part.file
    # A configuration of diffusers without a scale means SD 1's, because the setting is newer than SD 1.
    like_sd1 = "_class_name" in hints and part.params.latent_channels == VAEParams.latent_channels
    if scale := hints.get("scaling_factor", VAEParams.scale if like_sd1 else None):
        statistics = {key: hints.get(f"latents_{key}") or None for key in ("mean", "std")}
        return "its config.json", {"scale": scale, "shift": hints.get("shift_factor") or 0.0, **statistics}
    if present := [key for key in LATENT_STATISTICS if key in file.tensors]:
        if absent := [key for key in LATENT_STATISTICS if key not in present]:
            raise ValueError(f"{file.path} holds {present[0]} without {absent[0]}")
        vaes = (family.vae for family in FAMILIES.values())
        scale = next(vae.scale for vae in vaes if getattr(vae, "mean", None) is not None)
        mean, std = (_read_numbers(file, key) for key in LATENT_STATISTICS)
        return present[0], {"scale": scale, "shift": 0.0, "mean": mean, "std": std}
    if SCALE in file.tensors:
        return SCALE, {"scale": next(iter(_read_numbers(file, SCALE)), 0.0), "shift": 0.0}
    if found.backbone and file is found.backbone.file and "scale" in found.ldm:
        return found.ldm_file, {"scale": found.ldm["scale"], "shift": 0.0}
    return "", {}


def _other_family(found: Findings, part: Part, scaling: Mapping[str, Any], family: Family) -> Family | None:
    """The other family that the scale of an autoencoder's latents shows, if any."""
    scale = _known_scale(found, part, scaling)
    if same_scale(scale, family.vae.scale):
        return None
    for other in FAMILIES.values():
        vae = other.vae
        if (
            not isinstance(vae, VAEParams)
            or other.is_flow != family.is_flow
            or not same_scale(scale, vae.scale)
        ):
            continue
        # Others may have Playground's scale, a round number, by chance: its statistics or architecture prove
        # it.
        without_statistics = vae.mean is not None and scaling and scaling.get("mean") is None
        if not (without_statistics and other.architecture is not family.architecture):
            return other
    return None


def _known_scale(found: Findings, part: Part, scaling: Mapping[str, Any]) -> Any:
    """The scale that files state, else that of a replaced network in the autoencoder's file, or None."""
    if (stated := scaling.get("scale")) is not None:
        return stated
    for other, _ in found.left_out:
        if other.kind == "backbone" and other.file is part.file:
            architecture = architecture_of(other.params)
            return getattr(architecture.vae, "scale", None) if architecture else None
    return None


def same_scale(scale: Any, other: Any) -> bool:
    """Whether two scales are numbers that agree up to the rounding of half precision."""
    numbers = isinstance(scale, int | float) and isinstance(other, int | float)
    return numbers and math.isclose(scale, other, rel_tol=1e-3)


def _read_numbers(file: TensorFile, key: str) -> tuple[float, ...]:
    if math.prod(shape := file.tensors[key].shape) > MAX_LATENT_CHANNELS:
        raise ValueError(
            f"{file.path} holds {key} of shape {shape}: it must have one number per latent channel"
        )
    values = torch.empty(shape)
    file.tensors[key].read_into(values)
    return tuple(round(value, 6) for value in values.flatten().tolist())
