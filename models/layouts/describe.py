"""From the parts in files to a model's description: architecture, family, prediction, schedule and grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.messages import brief
from diffusion.spec import lookup
from models.families import ARCHITECTURES, FAMILIES, PUBLISHED, TOWERS, Architecture, Family, architecture_of
from models.files.stored import TensorFile
from models.files.table import Part
from models.layouts.findings import Findings
from models.layouts.latents import has_statistics, note_preview, read_scale, same_scale, vae_params
from models.layouts.ldm_yaml import read_ldm_yaml
from models.layouts.own_settings import FAMILY_KEY, read_settings
from models.layouts.scheduler import (
    PREDICTIONS,
    V_MARK,
    check_scheduler,
    read_flow_grid,
    read_schedule,
    set_distilled,
    set_terminal_snr,
    usual_grid,
)
from models.layouts.towers import find_towers, text_params
from models.text.recipes import TextParams

PREDICTION_NAMES = {name: ours for ours, name in PREDICTIONS.items()}  # in configurations of diffusers
PREDICTION_SPELLINGS = {  # in metadata and YAML files, reduced to lower-case letters and digits
    spelling: prediction
    for prediction, spellings in {
        "eps": "eps epsilon epsilonprediction epsprediction epspred noise",
        "v": "v velocity vprediction vpred vparam vparameterization velocityprediction",
        "x0": "x0 sample xstart x0prediction sampleprediction",
    }.items()
    for spelling in spellings.split()
}
MAX_SIDE = 256  # latents along a side, in a configuration's sample_size; published ones have up to 128
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # in metadata


def describe(
    found: Findings, family: str | None, prediction: str | None, zero_snr: bool | None = None
) -> tuple[dict[str, Any], dict[str, Part]]:
    """The model's description, and its text encoders by name. ValueError if the parts do not fit together."""
    requested = lookup("family", family, FAMILIES) if family else None
    # Without a backbone, parts may be of any family that they fit.
    architecture = requested.architecture if requested and not found.backbone else _find_architecture(found)
    if found.backbone and not FAMILIES[architecture.name].is_flow:
        found.ldm_file, found.ldm = read_ldm_yaml(found.backbone.file.path, found.notes)
    _note_other_pipelines(found)
    predicted = _find_prediction(found, architecture, requested, prediction)
    chosen = _choose_family(found, architecture, requested, predicted)
    path = found.files[0].path
    if chosen.is_flow and predicted not in (None, "flow"):
        wrong = f"{chosen.title} predicts flow, not {predicted!r}"
        raise ValueError(f"{path}: {wrong}: leave prediction out")
    if not chosen.is_flow:
        check_scheduler(found, chosen)
    if requested and not found.backbone:
        _check_latents(found, chosen)
    towers = find_towers(found, architecture)
    network, preview = (part.params if part else None for part in (found.backbone, found.part("preview")))
    text = text_params(chosen, towers, found)
    if text and not (found.backbone or requested):
        found.notes.append(f"prompts are read as in {chosen.title}: family=... chooses another one")
    _check_fit(found, architecture, text)
    if not (found.single or text):
        names = " and ".join(tower.name for tower in architecture.towers)
        raise ValueError(f"{path} holds only a {found.towers[0].title}: load {names} together")
    note_preview(found, chosen)
    spec = chosen.description(network, vae_params(found, chosen, family), text, preview)
    if network:
        spec["shape"][1:] = _read_sample_size(found) or spec["shape"][1:]
    if predicted and (prediction or spec["prediction"] != "edm"):
        spec["prediction"] = predicted
    _set_times(found, spec, chosen, zero_snr)
    if not (family or prediction or zero_snr is not None):
        spec |= read_settings(found, spec)
    return spec, towers if text else {}


def _set_times(found: Findings, spec: dict[str, Any], family: Family, zero_snr: bool | None) -> None:
    """Set what the files change in the family's schedule and grid."""
    if family.is_flow:
        spec["grid"] = read_flow_grid(found, family) or spec["grid"]
    else:
        spec["schedule"] = read_schedule(found, spec["schedule"])
    if family.consistency:
        unusual = set_distilled(spec, found.scheduler)
        found.notes += [f"distilled with {what}, as its scheduler's configuration says" for what in unusual]
    set_terminal_snr(found, spec, zero_snr)
    spec["grid"] = usual_grid(spec["grid"], spec["schedule"])


def _note_other_pipelines(found: Findings) -> None:
    """Notes configurations that are not used, because their folder holds another network."""
    for pipeline in found.pipelines:
        if found.backbone and not pipeline.holds(found.backbone):
            files = {"its scheduler's configuration": pipeline.scheduler, "model_index.json": pipeline.index}
            unused = " and ".join(name for name, content in files.items() if content)
            file = found.backbone.file.path.name
            found.notes.append(f"{pipeline.folder}: not used for the backbone, which is in {file}: {unused}")


# The family -------------------------------------------------------------------------------------------------


def _find_architecture(found: Findings) -> Architecture:
    """The architecture of the network; without one, the first that best fits the other parts."""
    if found.backbone:
        if known := architecture_of(found.backbone.params):
            return known
        path = found.backbone.file.path
        raise ValueError(f"{path} holds a {found.backbone.title} of no known family's architecture")
    channels = {part.params.latent_channels for part in found.single}
    same_channels = [each for each in ARCHITECTURES.values() if channels <= {each.vae.latent_channels}]
    vae = found.part("vae")
    scale = read_scale(found, vae)[1].get("scale") if vae else None

    def distance(each: Architecture) -> tuple[bool, int, bool]:
        scales = [getattr(family.vae, "scale", None) for family in _families(each)]
        other_scale = scale is not None and not any(same_scale(scale, value) for value in scales)
        unequal = abs(len(each.towers) - len(found.towers)) if found.towers else 0
        return not _has_towers(each, found.towers), unequal, other_scale

    return min(same_channels or ARCHITECTURES.values(), key=distance)


def _families(architecture: Architecture) -> list[Family]:
    return [family for family in FAMILIES.values() if family.architecture is architecture]


def _has_towers(architecture: Architecture, towers: Sequence[Part]) -> bool:
    """Whether an architecture has these text encoders; one of unpublished width matches any of its kind."""
    own = [tower.reader.network for tower in architecture.towers]
    published = {(type(tower.reader.network), tower.reader.network.width) for tower in TOWERS}
    for part in towers:
        kind, width = type(part.params), part.params.width
        any_width = (kind, width) not in published
        matches = [each for each in own if type(each) is kind and (any_width or each.width == width)]
        if not matches:
            return False
        own.remove(matches[0])
    return True


def _choose_family(
    found: Findings, architecture: Architecture, requested: Family | None, predicted: str | None
) -> Family:
    """The requested family, else the one that the files show, else the plain one of the architecture."""
    if requested:
        if requested.architecture is not architecture:
            built, other = architecture.name, requested.architecture.name
            raise ValueError(
                f"{found.files[0].path} has the architecture of {built}, so it cannot be of the family "
                f"{requested.name}, which has that of {other}"
            )
        found.notes.append(f"of the family {requested.name}, as requested")
        return requested
    name = (
        _proven_family(found, architecture)
        or _named_family(found, architecture, predicted)
        or _likely_family(found, architecture, predicted)
    )
    if name is None and found.backbone:
        found.notes += [architecture.note] * bool(architecture.note)
    alike = [family.name for family in _families(architecture) if family.prediction == predicted]
    return FAMILIES[name or next(iter(alike), architecture.name)]


def _proven_family(found: Findings, architecture: Architecture) -> str | None:
    """The family that keys and configurations prove.

    A network with the guidance scale as an input is a latent consistency model. One with statistics of its
    latents, or with EDM's scheduler, is preconditioned as in EDM.
    """
    guided = found.backbone is not None and getattr(found.backbone.params, "guidance_dim", None) is not None
    edm = found.is_edm or has_statistics(found)
    for family in _families(architecture):
        if (edm and family.prediction == "edm") or (guided and family.consistency):
            return family.name
    return None


def _named_family(found: Findings, architecture: Architecture, predicted: str | None) -> str | None:
    """The family that the files name."""
    index, hints = found.pipeline.index, found.backbone_hints
    metadata = found.backbone.file.metadata if found.backbone else {}
    own = (index.get(FAMILY_KEY), metadata.get(FAMILY_KEY))
    for name in (*own, _family_of_repository(index), _family_of_repository(hints)):
        family = FAMILIES.get(name) if isinstance(name, str) else None
        if family and family.architecture is architecture and predicted in (None, family.prediction):
            if family.name != architecture.name:
                found.notes.append(
                    f"of the family {family.name}, as its files say; family=... overrides that"
                )
            return family.name
    return None


def _likely_family(found: Findings, architecture: Architecture, predicted: str | None) -> str | None:
    """A family of few steps, if the files have its scheduler and its sample_size.

    Its scheduler alone proves nothing, since people exchange schedulers: then there is only a note.
    """
    config = found.scheduler
    for family in _families(architecture):
        trails = family.consistency is not None or config.get("timestep_spacing") == "trailing"
        if config.get("_class_name") not in family.schedulers or not trails or predicted == "v":
            continue
        if family.sample_size is not None and found.backbone_hints.get("sample_size") == family.sample_size:
            found.notes.append(
                f"of the family {family.name}, as its sample_size and its scheduler show; "
                f"family={architecture.name!r} overrides that"
            )
            return family.name
        plain = FAMILIES[architecture.name].title
        found.notes.append(
            f"taken for {plain}, although its scheduler is one of {family.name}: family={family.name!r} "
            "overrides that"
        )
    return None


def _family_of_repository(config: Mapping[str, Any]) -> str:
    """The family of the repository, or its path in the hub's cache, in _name_or_path; "" if unknown."""
    path = str(config.get("_name_or_path", "")).replace("models--", "").replace("--", "/")
    models = (each for each in PUBLISHED.values() if each.family and f"/{each.repo}/" in f"/{path}/")
    return next((each.family for each in models), "")


# What the network predicts, and its size --------------------------------------------------------------------


def _find_prediction(
    found: Findings, architecture: Architecture, requested: Family | None, prediction: str | None
) -> str | None:
    """The requested prediction, else the one that files name, or a guess; None for the family's own."""
    if prediction:
        found.notes.append(f"predicts {prediction}, as requested")
        return prediction
    # Marks of other families mean nothing in the files of flows.
    if not found.backbone or FAMILIES[architecture.name].is_flow:
        return None
    written = _written_prediction(found, found.backbone.file)
    return written or (None if requested else architecture.guess_prediction(found.backbone, found.notes))


def _written_prediction(found: Findings, file: TensorFile) -> str | None:
    """The prediction in the file's marks or metadata, else in its YAML file or scheduler's configuration."""
    if V_MARK in file.tensors:
        found.notes.append("predicts v, as a mark beside the weights says")
        return "v"
    texts = {found.ldm_file: found.ldm.get("prediction")}
    texts |= {f"the file's metadata ({key})": file.metadata.get(key) for key in PREDICTION_KEYS}
    for source, text in texts.items():
        if text and (ours := PREDICTION_SPELLINGS.get(re.sub("[^a-z0-9]", "", text.lower()))):
            found.notes.append(f"predicts {ours}, as {source} says")
            return ours
        if text and text.strip():
            unknown = f"{source} says {brief(text[:40])}, which is not a known prediction"
            found.notes.append(f"{unknown}: prediction=... chooses one")
    if not found.is_edm and (name := found.scheduler.get("prediction_type")):
        what = f"prediction of {file.path}, as its scheduler's configuration has it,"
        ours = lookup(what, name, PREDICTION_NAMES)
        found.notes.append(f"predicts {ours}, as its scheduler's configuration says")
        return ours
    return None


def _read_sample_size(found: Findings) -> list[int] | None:
    """Height and width of the backbone's latents in training: its sample_size, None without one."""
    if not (size := found.backbone_hints.get("sample_size")):
        return None
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(type(n) in (int, float) and 0 < n <= MAX_SIDE and n == int(n) for n in sides):
        return [int(n) for n in sides]
    stated = f"its configuration says sample_size={brief(size)}"
    found.notes.append(f"{stated}, which is not used: it must be 1 to {MAX_SIDE} latents a side")
    return None


# Whether the parts fit together -----------------------------------------------------------------------------


def _check_latents(found: Findings, family: Family) -> None:
    """ValueError for an autoencoder whose latents have another number of channels than the family's."""
    channels = family.architecture.vae.latent_channels
    for part in found.single:
        if (has := part.params.latent_channels) != channels:
            latents = f"its latents have {has} channels, not {channels}"
            raise ValueError(f"{part.file.path} cannot be of the family {family.name}: {latents}")


def _check_fit(found: Findings, architecture: Architecture, text: TextParams | None) -> None:
    """ValueError for parts of different families, which cannot work together."""
    if not found.backbone:
        return
    params: Any = found.backbone.params
    path, network, latents = found.backbone.file.path, found.backbone.title, params.out_channels
    if (more := params.in_channels - latents) not in (roles := architecture.channels) and more > 0:
        known = " or ".join(f"{channels} ({role})" for channels, role in roles.items()) or "none"
        sees = f"{path} holds a {network} that sees {more} channels besides x"
        raise ValueError(f"{sees}: known for {architecture.name} are {known}")
    dims = {"a context": "context_dim", "a vector": "vector_dim"} if text else {}
    for what, name in dims.items():
        if (has := getattr(text, name)) != (takes := getattr(params, name)):
            raise ValueError(
                f"{found.towers[-1].file.path} does not fit {path}: the {network} takes {what} of {takes} "
                f"numbers, and the text encoders make {has}"
            )
    for part in found.single:
        if part.kind != "backbone" and (has := part.params.latent_channels) not in (latents, latents / 2):
            raise ValueError(
                f"{part.file.path} does not fit {path}: the {network}'s samples have {latents} channels, and "
                f"its latents {has}"
            )
