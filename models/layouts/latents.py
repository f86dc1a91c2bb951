"""The units of an autoencoder's latents: where files say them, and whose they are."""

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
# the key of latent diffusion's buffer, for a scale that is measured at the start of training
SCALE = "scale_factor"
MAX_LATENT_CHANNELS = 64  # published autoencoders have up to 16


def vae_params(found: Findings, of: Family, asked: str | None) -> Any | None:
    """The autoencoder's parameters, with the units of its latents where it has parameters for them: as files
    give them, else the family's.

    ValueError for the autoencoder of another family, whose pictures would be wrong without any other sign.
    """
    part, usual = found.of_kind("vae"), of.vae
    if not part or not (isinstance(part.params, VAEParams) and isinstance(usual, VAEParams)):
        return part.params if part else None
    source, scaling = read_scale(found, part)
    if other := _other_family(found, part, scaling, of) if found.backbone or asked else None:
        source = source or "the network beside it"
        raise ValueError(
            f"{part.file.path} is the autoencoder of {other.title}, as {source} says: {of.title} has another"
        )
    if not source and not found.backbone and not asked:
        found.notes.append(
            f"latents are scaled by {usual.scale:g}, as in {of.title}: family=... chooses another one's"
        )
    elif not source and found.backbone and found.backbone.file is not part.file:
        found.notes.append(
            f"{part.file.path.name} does not say whose latents it makes: they are taken for those of "
            f"{of.title}"
        )
    for verb, value, own in (
        ("scaled", scaling.get("scale"), usual.scale),
        ("shifted", scaling.get("shift"), usual.shift),
    ):
        if source and value != own and not same_scale(value, own):
            found.notes.append(
                f"latents are {verb} by {brief(value)}, as {source} says, and not by {own:g}, as in "
                f"{of.title}"
            )
    try:
        return make_params(
            "", VAEParams, to_plain(part.params) | (scaling or {name: getattr(usual, name) for name in UNITS})
        )
    except ValueError as error:
        raise ValueError(
            f"{part.file.path}: its latents cannot be scaled as its configuration says: {error}"
        ) from None


def has_statistics(found: Findings) -> bool:
    """Whether statistics of latents are beside the network, or where there is none, in the files."""
    files = [found.backbone.file] if found.backbone else found.files
    return all(any(key in file.tensors for file in files) for key in LATENT_STATISTICS)


def note_preview(found: Findings, of: Family) -> None:
    """Notes that a tiny autoencoder from elsewhere than the network's folder does not show whose latents it
    decodes."""
    part = found.of_kind("preview")
    if part and found.backbone and not (found.pipeline.index and found.pipeline.holds(part)):
        found.notes.append(
            f"{part.file.path.name} does not say whose latents it shows: they are taken for those of "
            f"{of.title}"
        )


def read_scale(found: Findings, part: Part) -> tuple[str, dict[str, Any]]:
    """Where the scale of an autoencoder's latents is written, and the scaling parameters; "" and {} if
    nowhere."""
    hints, file = part.hints, part.file
    # A configuration of diffusers without a scale means SD 1's: those of SD 1 are older than the setting.
    default = (
        VAEParams.scale
        if "_class_name" in hints and part.params.latent_channels == VAEParams.latent_channels
        else None
    )
    if scale := hints.get("scaling_factor", default):
        statistics = {key: hints.get(f"latents_{key}") or None for key in ("mean", "std")}
        return "its config.json", {"scale": scale, "shift": hints.get("shift_factor") or 0.0, **statistics}
    if present := [key for key in LATENT_STATISTICS if key in file.tensors]:
        if absent := [key for key in LATENT_STATISTICS if key not in present]:
            raise ValueError(f"{file.path} holds {present[0]} without {absent[0]}")
        scale = next(of.vae.scale for of in FAMILIES.values() if getattr(of.vae, "mean", None) is not None)
        mean, std = (_read_numbers(file, key) for key in LATENT_STATISTICS)
        return present[0], {"scale": scale, "shift": 0.0, "mean": mean, "std": std}
    if SCALE in file.tensors:
        return SCALE, {"scale": next(iter(_read_numbers(file, SCALE)), 0.0), "shift": 0.0}
    if found.backbone and file is found.backbone.file and "scale" in found.ldm:
        return found.ldm_file, {"scale": found.ldm["scale"], "shift": 0.0}
    return "", {}


def _other_family(found: Findings, part: Part, scaling: Mapping[str, Any], of: Family) -> Family | None:
    """The family that an autoencoder belongs to by the scale of its latents, where that is not `of`; None
    where nothing shows another."""
    scale = _shown_scale(found, part, scaling)
    if same_scale(scale, of.vae.scale):
        return None
    for other in FAMILIES.values():
        if (
            not isinstance(other.vae, VAEParams)
            or other.is_flow != of.is_flow
            or not same_scale(scale, other.vae.scale)
        ):
            continue
        # Playground's scale is a round number, which others may have by chance: only its statistics, or its
        # architecture, prove it.
        by_chance = (
            other.vae.mean is not None
            and scaling
            and scaling.get("mean") is None
            and other.architecture is not of.architecture
        )
        if not by_chance:
            return other
    return None


def _shown_scale(found: Findings, part: Part, scaling: Mapping[str, Any]) -> Any:
    """The scale that is written for an autoencoder's latents, else that of the network which came in its file
    and which another file's replaced; None where there is neither."""
    if (written := scaling.get("scale")) is not None:
        return written
    came_along = next(
        (each for each, _ in found.left_out if each.kind == "backbone" and each.file is part.file), None
    )
    built = architecture_of(came_along.params) if came_along else None
    return getattr(built.vae, "scale", None) if built else None


def same_scale(scale: Any, other: Any) -> bool:
    """Whether two scales are numbers that agree to the rounding of half precision."""
    return (
        isinstance(scale, int | float)
        and isinstance(other, int | float)
        and math.isclose(scale, other, rel_tol=1e-3)
    )


def _read_numbers(file: TensorFile, key: str) -> tuple[float, ...]:
    if math.prod(file.tensors[key].shape) > MAX_LATENT_CHANNELS:
        raise ValueError(
            f"{file.path} holds {key} of shape {file.tensors[key].shape}: it must have one number per "
            "latent channel"
        )
    values = torch.empty(file.tensors[key].shape)
    file.tensors[key].read_into(values)
    return tuple(round(value, 6) for value in values.flatten().tolist())
