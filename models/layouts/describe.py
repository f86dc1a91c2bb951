"""Describes the model that the parts found in files make: its architecture and family, what it predicts, and
what the files change."""

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
from models.layouts.yaml_beside import read_yaml_beside
from models.text.recipes import TextParams

PREDICTION_NAMES = {name: ours for ours, name in PREDICTIONS.items()}  # in configurations of diffusers
PREDICTION_SPELLINGS = {  # in metadata and YAML files, in lower case, letters and digits only
    **dict.fromkeys(("eps", "epsilon", "epsilonprediction", "epsprediction", "epspred", "noise"), "eps"),
    **dict.fromkeys(
        ("v", "velocity", "vprediction", "vpred", "vparam", "vparameterization", "velocityprediction"), "v"
    ),
    **dict.fromkeys(("x0", "sample", "xstart", "x0prediction", "sampleprediction"), "x0"),
}
MAX_SIDE = 256  # latents along a side, in a configuration's sample_size; published ones have up to 128
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # in metadata


def describe(
    found: Findings, family: str | None, prediction: str | None, zero_snr: bool | None = None
) -> tuple[dict[str, Any], dict[str, Part]]:
    """The model's description, and its text encoders by name. ValueError where the parts fit neither each
    other nor the family."""
    asked = lookup("family", family, FAMILIES) if family else None
    # Parts alone may be of any family that they fit.
    architecture = asked.architecture if asked and not found.backbone else _find_architecture(found)
    if found.backbone and not FAMILIES[architecture.name].is_flow:
        found.ldm_file, found.ldm = read_yaml_beside(found.backbone.file.path, found.notes)
    _note_other_pipelines(found)
    predicted = _find_prediction(found, architecture, asked, prediction)
    of = _choose_family(found, architecture, asked, predicted)
    if of.is_flow and predicted not in (None, "flow"):
        raise ValueError(
            f"{found.files[0].path} is of {of.title}, which predicts flow, and not {predicted!r}: leave "
            "prediction out"
        )
    if not of.is_flow:
        check_scheduler(found, of)
    if asked and not found.backbone:
        _check_latents(found, of)
    towers = find_towers(found, architecture)
    network, preview = (part.params if part else None for part in (found.backbone, found.of_kind("preview")))
    text = text_params(of, towers, found)
    if text and not (found.backbone or asked):
        found.notes.append(f"prompts are read as in {of.title}: family=... chooses another one's")
    _check_fit(found, architecture, text)
    if not (found.single or text):
        needed = " and ".join(tower.name for tower in architecture.towers)
        raise ValueError(
            f"{found.files[0].path} holds a {found.towers[0].words} alone, of use only beside others: load "
            f"{needed} together"
        )
    note_preview(found, of)
    spec = of.description(network, vae_params(found, of, family), text, preview)
    if network:
        spec["shape"][1:] = _read_sample_size(found) or spec["shape"][1:]
    if predicted and (prediction or spec["prediction"] != "edm"):
        spec["prediction"] = predicted
    _set_times(found, spec, of, zero_snr)
    if not (family or prediction or zero_snr is not None):
        spec |= read_settings(found, spec)
    return spec, towers if text else {}


def _set_times(found: Findings, spec: dict[str, Any], of: Family, zero_snr: bool | None) -> None:
    """Set what the files change of the family's schedule and of the times that are visited."""
    if of.is_flow:
        spec["grid"] = read_flow_grid(found, of) or spec["grid"]
    else:
        spec["schedule"] = read_schedule(found, spec["schedule"])
    if of.consistency:
        found.notes += [
            f"distilled with {what}, as its scheduler's configuration says"
            for what in set_distilled(spec, found.scheduler)
        ]
    set_terminal_snr(found, spec, zero_snr)
    spec["grid"] = usual_grid(spec["grid"], spec["schedule"])


def _note_other_pipelines(found: Findings) -> None:
    """Notes configurations that are not used, because they lie in the folder of another network than the one
    that is loaded."""
    for pipeline in found.pipelines:
        if found.backbone and not pipeline.holds(found.backbone):
            files = {"its scheduler's configuration": pipeline.scheduler, "model_index.json": pipeline.index}
            unused = " and ".join(name for name, content in files.items() if content)
            found.notes.append(
                f"{pipeline.folder}: not used for the backbone, which {found.backbone.file.path.name} "
                f"holds: {unused}"
            )


# The family -------------------------------------------------------------------------------------------------


def _find_architecture(found: Findings) -> Architecture:
    """The architecture of the network; without one, the first that text encoders and latents fit best."""
    if found.backbone:
        if built := architecture_of(found.backbone.params):
            return built
        raise ValueError(
            f"{found.backbone.file.path} holds a {found.backbone.words} that is built like no family known "
            "here"
        )
    channels = {part.params.latent_channels for part in found.single}
    same_channels = [each for each in ARCHITECTURES.values() if channels <= {each.vae.latent_channels}]
    vae = found.of_kind("vae")
    scale = read_scale(found, vae)[1].get("scale") if vae else None

    def distance(each: Architecture) -> tuple[bool, int, bool]:
        own = [getattr(of.vae, "scale", None) for of in FAMILIES.values() if of.architecture is each]
        other_scale = scale is not None and not any(same_scale(scale, value) for value in own)
        return (
            not _has_towers(each, found.towers),
            abs(len(each.towers) - len(found.towers)) if found.towers else 0,
            other_scale,
        )

    return min(same_channels or ARCHITECTURES.values(), key=distance)


def _has_towers(architecture: Architecture, towers: Sequence[Part]) -> bool:
    """Whether an architecture has text encoders like these; one of unpublished width may be any of its
    kind."""
    own = [tower.reader.network for tower in architecture.towers]
    known = {(type(tower.reader.network), tower.reader.network.width) for tower in TOWERS}
    for part in towers:
        alike = [each for each in own if type(each) is type(part.params)]
        if (type(part.params), part.params.width) not in known:
            match = next(iter(alike), None)
        else:
            match = next((each for each in alike if each.width == part.params.width), None)
        if match is None:
            return False
        own.remove(match)
    return True


def _choose_family(
    found: Findings, architecture: Architecture, asked: Family | None, predicted: str | None
) -> Family:
    """The family: the one asked for, else the one that keys and configurations show, else the plain one of
    this architecture."""
    if asked:
        if asked.architecture is not architecture:
            built, other = architecture.name, asked.architecture.name
            raise ValueError(
                f"{found.files[0].path} is built like {built}, so it cannot be of the family {asked.name}, "
                f"which is built like {other}"
            )
        found.notes.append(f"of the family {asked.name}, as asked for")
        return asked
    name = (
        _shown_family(found, architecture)
        or _named_family(found, architecture, predicted)
        or _likely_family(found, architecture, predicted)
    )
    if name is None and found.backbone:
        found.notes += [architecture.note] * bool(architecture.note)
    alike = [
        each.name
        for each in FAMILIES.values()
        if each.architecture is architecture and each.prediction == predicted
    ]
    return FAMILIES[name or next(iter(alike), architecture.name)]


def _shown_family(found: Findings, architecture: Architecture) -> str | None:
    """The family that keys and configurations prove: a network that is told the scale of guidance is a latent
    consistency model, and one beside statistics of its latents, or with EDM's scheduler, is preconditioned as
    EDM's."""
    told = getattr(found.backbone.params, "guidance_dim", None) is not None if found.backbone else False
    edm = found.is_edm or has_statistics(found)
    own = [each for each in FAMILIES.values() if each.architecture is architecture]
    return next(
        (each.name for each in own if (edm and each.prediction == "edm") or (told and each.consistency)), None
    )


def _named_family(found: Findings, architecture: Architecture, predicted: str | None) -> str | None:
    """The family that the files name."""
    index, ours = (
        found.pipeline.index,
        found.backbone.file.metadata.get(FAMILY_KEY) if found.backbone else None,
    )
    for name in (
        index.get(FAMILY_KEY),
        ours,
        _family_of_repository(index),
        _family_of_repository(found.backbone_hints),
    ):
        of = FAMILIES.get(name) if isinstance(name, str) else None
        if of and of.architecture is architecture and predicted in (None, of.prediction):
            if of.name != architecture.name:
                found.notes.append(
                    f"of the family {of.name}, as its files name it; family=... overrides that"
                )
            return of.name
    return None


def _likely_family(found: Findings, architecture: Architecture, predicted: str | None) -> str | None:
    """A family of few steps, if the files have its scheduler and its sample_size.

    Its scheduler alone proves nothing, since people exchange schedulers: then there is only a note.
    """
    config = found.scheduler
    for of in FAMILIES.values():
        alike = of.architecture is architecture and config.get("_class_name") in of.schedulers
        trails = of.consistency is not None or config.get("timestep_spacing") == "trailing"
        if not alike or not trails or predicted == "v":
            continue
        if of.sample_size is not None and found.backbone_hints.get("sample_size") == of.sample_size:
            found.notes.append(
                f"of the family {of.name}, as the size it was trained on and its scheduler are; "
                f"family={architecture.name!r} overrides that"
            )
            return of.name
        plain = FAMILIES[architecture.name].title
        found.notes.append(
            f"taken for {plain}, though saved with a scheduler as {of.name} has it: family={of.name!r} is "
            "for one"
        )
    return None


def _family_of_repository(config: Mapping[str, Any]) -> str:
    """The family of the repository named by a configuration's _name_or_path, "" if unknown. It may lie in the
    hub's cache."""
    path = str(config.get("_name_or_path", "")).replace("models--", "").replace("--", "/")
    return next((of.family for of in PUBLISHED.values() if of.family and f"/{of.repo}/" in f"/{path}/"), "")


# What the network predicts, and its size --------------------------------------------------------------------


def _find_prediction(
    found: Findings, architecture: Architecture, asked: Family | None, prediction: str | None
) -> str | None:
    """The prediction asked for, else the one that the files name or that is guessed from them; None for the
    family's own."""
    if prediction:
        found.notes.append(f"predicts {prediction}, as asked for")
        return prediction
    if (
        not found.backbone or FAMILIES[architecture.name].is_flow
    ):  # marks of other families mean nothing in the files of flows
        return None
    return _written_prediction(found, found.backbone.file) or (
        None if asked else architecture.guess_prediction(found.backbone, found.notes)
    )


def _written_prediction(found: Findings, file: TensorFile) -> str | None:
    """The prediction that the files name: a mark or the metadata beside the weights first, then the
    scheduler's configuration."""
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
            found.notes.append(
                f"{source} says {brief(text[:40])}, which names no prediction known here: prediction=... "
                "chooses one"
            )
    if not found.is_edm and (name := found.scheduler.get("prediction_type")):
        ours = lookup(
            f"prediction of {file.path}, as its scheduler's configuration has it,", name, PREDICTION_NAMES
        )
        found.notes.append(f"predicts {ours}, as its scheduler's configuration says")
        return ours
    return None


def _read_sample_size(found: Findings) -> list[int] | None:
    """Height and width of the latents that the backbone was trained on: its sample_size, None without one."""
    if not (size := found.backbone_hints.get("sample_size")):
        return None
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(
        type(side) in (int, float) and 0 < side <= MAX_SIDE and side == int(side) for side in sides
    ):
        return [int(side) for side in sides]
    found.notes.append(
        f"its configuration says sample_size={brief(size)}, and not 1 to {MAX_SIDE} latents a side: it is "
        "not used"
    )
    return None


# Whether parts belong together ------------------------------------------------------------------------------


def _check_latents(found: Findings, of: Family) -> None:
    """ValueError for an autoencoder whose latents have another number of channels than the family's."""
    channels = of.architecture.vae.latent_channels
    for part in found.single:
        if (has := part.params.latent_channels) != channels:
            raise ValueError(
                f"{part.file.path} cannot be of the family {of.name}: its latents have {has} channels, and "
                f"not {channels}"
            )


def _check_fit(found: Findings, architecture: Architecture, text: TextParams | None) -> None:
    """ValueError for parts of different families, which cannot work together."""
    if not found.backbone:
        return
    params: Any = found.backbone.params
    latents, network = params.out_channels, found.backbone.words
    if (beside := params.in_channels - latents) not in (roles := architecture.channels) and beside > 0:
        known = " or ".join(f"{channels} ({role})" for channels, role in roles.items()) or "none"
        raise ValueError(
            f"{found.backbone.file.path} holds a {network} that sees {beside} channels beside its sample: "
            f"known for {architecture.name} "
            f"are {known}"
        )
    if text:
        for what, has, takes in (
            ("a context", text.context_dim, params.context_dim),
            ("a vector", text.vector_dim, params.vector_dim),
        ):
            if has != takes:
                raise ValueError(
                    f"{found.towers[-1].file.path} does not go with {found.backbone.file.path}: the "
                    f"{network} takes {what} of {takes} "
                    f"numbers, and the text encoders make {has}"
                )
    for part in found.single:
        if part.kind != "backbone" and (has := part.params.latent_channels) not in (
            params.out_channels,
            params.out_channels / 2,
        ):
            raise ValueError(
                f"{part.file.path} does not go with {found.backbone.file.path}: the {network}'s samples "
                f"have {latents} channels, "
                f"and its latents {has}"
            )
