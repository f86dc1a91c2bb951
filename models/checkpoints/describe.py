"""Describes the model that the parts found in files make: its family, what it predicts, its schedule, and the scale of its latents."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from diffusion.betas import MAX_TRAINING_STEPS
from diffusion.messages import brief
from diffusion.spec import check_mapping, check_names, lookup, make_params
from models.checkpoints import native
from models.checkpoints.diffusers_configs import (
    FAMILY_KEY,
    FLOW_SETTINGS,
    FLOW_TIMES,
    LCM_SETTINGS,
    PREDICTIONS,
    SCHEDULER_SETTINGS,
    SETTINGS,
    SETTINGS_KEY,
    check_settings,
    flow_grid,
    usual_grid,
)
from models.checkpoints.findings import Findings
from models.checkpoints.parts import LATENT_STATISTICS
from models.checkpoints.stored import TensorFile
from models.checkpoints.table import Part
from models.checkpoints.towers import find_towers, text_params
from models.checkpoints.written_schedule import changed_schedule
from models.checkpoints.yaml_beside import read_yaml_beside, schedule_of_yaml
from models.clip import CLIP_G, CLIPTextParams
from models.download import PUBLISHED
from models.families import FAMILIES, TOWERS, Family, Network, base_of, description, plain
from models.flux import FluxParams
from models.recipes import TextParams
from models.unet import UNetParams
from models.vae import VAEParams

PREDICTION_NAMES = {name: ours for ours, name in PREDICTIONS.items()}  # in configurations of diffusers
PREDICTION_SPELLINGS = {  # in metadata and YAML files, in lower case, letters and digits only
    **dict.fromkeys(("eps", "epsilon", "epsilonprediction", "epsprediction", "epspred", "noise"), "eps"),
    **dict.fromkeys(("v", "velocity", "vprediction", "vpred", "vparam", "vparameterization", "velocityprediction"), "v"),
    **dict.fromkeys(("x0", "sample", "xstart", "x0prediction", "sampleprediction"), "x0"),
}
MAX_SIDE = 256  # latents along a side, in a configuration's sample_size; published ones have up to 128
MAX_LATENT_CHANNELS = 64  # published autoencoders have up to 16
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # in metadata
V_MARK, COSXL_MARK = "v_pred", "edm_vpred.sigma_max"
SCHEDULERS_OF_FEW_STEPS = {  # with which distilled networks are published; ordinary ones may be saved with them too
    ("sd2", "EulerDiscreteScheduler"): "sd-turbo",
    ("sd2", "EulerAncestralDiscreteScheduler"): "sd-turbo",
    ("sdxl", "EulerAncestralDiscreteScheduler"): "sdxl-turbo",
    ("sd1", "LCMScheduler"): "lcm",
    ("sdxl", "LCMScheduler"): "lcm-sdxl",
}
TURBO_SIZE = 64  # sample_size of SDXL-Turbo's UNet; SDXL's is 128
V_THRESHOLD = 0.09  # see `_guess_prediction`
FLOW_CHANNELS, SD_CHANNELS = 16, 4  # of latents
SCALE = "scale_factor"  # the key of latent diffusion's buffer, for a scale that is measured at the start of training
MASK_CHANNELS = 64  # FLUX.1 Fill takes the 8x8 mask pixels of a latent as channels


def describe(
    found: Findings, family: str | None, prediction: str | None, zero_snr: bool | None = None
) -> tuple[dict[str, Any], dict[str, Part]]:
    """The model's description, and its text encoders by name. ValueError where the parts fit neither each other nor the family."""
    if found.backbone and isinstance(found.backbone.params, UNetParams):
        found.ldm_file, found.ldm = read_yaml_beside(found.backbone.file.path, found.notes)
    _note_other_pipelines(found)
    asked = lookup("family", family, FAMILIES) if family else None
    base = asked.base if asked and not found.backbone else _find_base(found)  # parts alone may be of any family that they fit
    if prediction:
        found.notes.append(f"predicts {prediction}, as asked for")
    predicted = prediction or _written_prediction(found) or (None if family else _guess_prediction(found, base))
    name = _choose_family(found, base, family, predicted)
    of = lookup("family", name, FAMILIES)
    _check_family(found, base, name)
    if of.prediction == "flow" and predicted not in (None, "flow"):
        raise ValueError(f"{found.files[0].path} is of {of.title}, which predicts flow, and not {predicted!r}: leave prediction out")
    if of.prediction != "flow":
        _check_scheduler(found, of)
    if asked and not found.backbone:
        _check_latents(found, name)
    towers = find_towers(found, base)
    network, preview = (part.params if part else None for part in (found.backbone, found.of_kind("preview")))
    text = text_params(of, towers, found)
    _check_fit(found, text)
    if not (found.single or text):
        needed = " and ".join(TOWERS[base])
        raise ValueError(f"{found.files[0].path} holds a {found.towers[0].words} alone, of use only beside others: load {needed} together")
    _note_preview(found, of)
    spec = description(name, network, _vae_params(found, of, family), text, preview)
    if network:
        spec["shape"][1:] = _read_sample_size(found) or spec["shape"][1:]
    if predicted and (prediction or spec["prediction"] != "edm"):
        spec["prediction"] = predicted
    if of.prediction == "flow":
        spec["grid"] = _read_flow_grid(found, base) or spec["grid"]
    else:
        spec["schedule"] |= _read_schedule(found, spec["schedule"])
    for name, (part, ours, usual) in LCM_SETTINGS.items() if of.consistency else ():
        if (value := found.scheduler.get(name, usual)) != usual:
            found.notes.append(f"distilled with {name}={brief(value)}, as its scheduler's configuration says")
            spec[part][ours] = value
    _set_terminal_snr(found, spec, zero_snr)
    spec["grid"] = usual_grid(spec["grid"], spec["schedule"])
    if not (family or prediction or zero_snr is not None):
        spec |= _read_own_settings(found, spec)
    return spec, towers if text else {}


def _note_other_pipelines(found: Findings) -> None:
    """Notes configurations that are not used, because they lie in the folder of another network than the one that is loaded."""
    for pipeline in found.pipelines:
        if found.backbone and not pipeline.holds(found.backbone):
            files = {"its scheduler's configuration": pipeline.scheduler, "model_index.json": pipeline.index}
            unused = " and ".join(name for name, content in files.items() if content)
            found.notes.append(f"{pipeline.folder}: not used for the backbone, which {found.backbone.file.path.name} holds: {unused}")


def _find_base(found: Findings) -> str:
    """The base in FAMILIES whose architecture the parts have."""
    if found.backbone:
        params = found.backbone.params
        if (base := base_of(params)).startswith("sdxl") and params.attention[0]:
            raise ValueError(f"{found.backbone.file.path} holds a UNet like SD 2.1 unCLIP's, which this library does not know")
        return base
    widths = [part.params.width for part in found.towers if isinstance(part.params, CLIPTextParams)]
    if len(widths) < len(found.towers) or any(part.params.latent_channels == FLOW_CHANNELS for part in found.single):  # a T5, or 16
        vae = found.of_kind("vae")
        scaled = vae is not None and _same_scale(vae.hints.get("scaling_factor"), FAMILIES["sd3"].scale)
        return "sd3" if scaled or len(set(widths)) > 1 or CLIP_G.width in widths else "flux-dev"
    if len(set(widths)) > 1:
        return "sdxl"
    if not widths and (vae := found.of_kind("vae")) and (scale := _read_scale(found, vae)[1].get("scale")):
        return next((of.base for of in FAMILIES.values() if _same_scale(scale, of.scale)), "sd1")
    return {1024: "sd2", 1280: "sdxl-refiner"}.get(widths[0], "sd1") if widths else "sd1"


def _choose_family(found: Findings, base: str, asked: str | None, predicted: str | None) -> str:
    """The family: the one asked for, else the one that keys and configurations show, else the plain one of this architecture."""
    if asked:
        found.notes.append(f"of the family {asked}, as asked for")
        return asked
    files = [found.backbone.file] if found.backbone else found.files
    if base == "sdxl" and (all(_has_key(files, key) for key in LATENT_STATISTICS) or _is_edm(found)):
        return "playground-v2.5"
    if found.backbone is not None and found.backbone.params.guidance_dim is not None and base in ("sd1", "sdxl"):
        return "lcm" if base == "sd1" else "lcm-sdxl"
    if named := _family_by_name(found, base, predicted):
        return named
    if base == "flux-canny":
        found.notes.append("its control image shows edges: family='flux-depth' is for control by depth")
    if base == "flux-schnell" and found.backbone:
        found.notes.append(
            "taken for FLUX.1 [schnell], as it has no guidance embedding: family='flux-dedistilled' is for de-distilled [dev]"
        )
    return f"{base}-v" if predicted == "v" and f"{base}-v" in FAMILIES else base


def _family_by_name(found: Findings, base: str, predicted: str | None) -> str | None:
    """A family that keys and shapes do not show, where files name it, or where its scheduler and sample_size are as published.

    A scheduler alone is no proof, since people exchange them: then the family is only noted.
    """
    index, ours = found.pipeline.index, found.backbone.file.metadata.get(FAMILY_KEY) if found.backbone else None
    for name in (index.get(FAMILY_KEY), ours, _family_of_repository(index), _family_of_repository(found.backbone_hints)):
        if isinstance(name, str) and name in FAMILIES and FAMILIES[name].base == base and predicted in (None, FAMILIES[name].prediction):
            if name != base:
                found.notes.append(f"of the family {name}, as its files name it; family=... overrides that")
            return name
    config = found.scheduler
    maybe = SCHEDULERS_OF_FEW_STEPS.get((base, str(config.get("_class_name"))))
    if maybe is None or predicted == "v" or ("turbo" in maybe and config.get("timestep_spacing") != "trailing"):
        return None
    if maybe == "sdxl-turbo" and found.backbone_hints.get("sample_size") == TURBO_SIZE:
        found.notes.append("of the family sdxl-turbo, as the size it was trained on and its scheduler are; family='sdxl' overrides that")
        return maybe
    found.notes.append(f"taken for {FAMILIES[base].title}, though saved with a scheduler as {maybe} has it: family={maybe!r} is for one")
    return None


def _family_of_repository(config: Mapping[str, Any]) -> str:
    """The family of the repository named by a configuration's _name_or_path, "" if unknown. It may lie in the hub's cache."""
    path = str(config.get("_name_or_path", "")).replace("models--", "").replace("--", "/")
    return next((of.family for of in PUBLISHED.values() if of.family and f"/{of.repo}/" in f"/{path}/"), "")


def _is_edm(found: Findings) -> bool:
    """Whether the scheduler is EDM's. It preconditions the network, so its prediction_type is not the network's own prediction."""
    return str(found.scheduler.get("_class_name")).startswith("EDM")


def _check_family(found: Findings, base: str, name: str) -> None:
    if (other := FAMILIES[name].base) != base:
        raise ValueError(f"{found.files[0].path} is built like {base}, so it cannot be of the family {name}, which is built like {other}")


def _check_latents(found: Findings, name: str) -> None:
    """ValueError for an autoencoder whose latents have another number of channels than the family's."""
    channels = FLOW_CHANNELS if FAMILIES[name].prediction == "flow" else SD_CHANNELS
    for part in found.single:
        if (has := part.params.latent_channels) != channels:
            raise ValueError(f"{part.file.path} cannot be of the family {name}: its latents have {has} channels, and not {channels}")


# What the network predicts ---------------------------------------------------------------------------------------------


def _written_prediction(found: Findings) -> str | None:
    """The prediction that the files name: marker keys and metadata of the weights first, then the scheduler's configuration."""
    if not found.backbone:
        return None
    file = found.backbone.file
    if not isinstance(found.backbone.params, UNetParams):
        return None  # all flow models; other families' markers mean nothing in their files
    if _has_key([file], COSXL_MARK):
        raise ValueError(f"{file.path} holds {COSXL_MARK}: it is CosXL's kind, EDM with v-prediction, which this library does not know")
    if _has_key([file], V_MARK):
        found.notes.append("predicts v, as a mark beside the weights says")
        return "v"
    texts = {found.ldm_file: found.ldm.get("parameterization")}
    texts |= {f"the file's metadata ({key})": file.metadata.get(key) for key in PREDICTION_KEYS}
    for source, text in texts.items():
        if text and (ours := PREDICTION_SPELLINGS.get(re.sub("[^a-z0-9]", "", text.lower()))):
            found.notes.append(f"predicts {ours}, as {source} says")
            return ours
        if text and text.strip():
            found.notes.append(f"{source} says {brief(text[:40])}, which names no prediction known here: prediction=... chooses one")
    if not _is_edm(found) and (name := found.scheduler.get("prediction_type")):
        ours = lookup(f"prediction of {file.path}, as its scheduler's configuration has it,", name, PREDICTION_NAMES)
        found.notes.append(f"predicts {ours}, as its scheduler's configuration says")
        return ours
    return None


def _guess_prediction(found: Findings, base: str) -> str | None:
    """SD 2's prediction where no file names it, guessed as other tools do, with a note.

    The base model predicts eps, and is known by the step at which its training stopped. Otherwise the standard deviation of a bias in
    the last attention block decides: it is larger in models that predict v.
    """
    if base != "sd2" or not found.backbone or found.backbone.params.in_channels != found.backbone.params.out_channels:
        return None  # published models for inpainting and depth predict eps
    if found.backbone.file.numbers.get("global_step") == 875_000:
        found.notes.append("predicts eps, since its training stopped where SD 2's base model's did; prediction='v' overrides that")
        return "eps"
    params: UNetParams = found.backbone.params
    names = [f"up.{i}.attention.blocks.0.norm1.bias" for i in range(len(params.channel_mult) * (params.blocks + 2))]
    keys = [source.keys[0] for source in found.backbone.layout.table(names).values()]
    biases = [key for key in keys if key in found.backbone.stored]
    if not biases:
        return None
    bias = torch.empty(found.backbone.stored[biases[-1]].shape)
    found.backbone.stored[biases[-1]].read_into(bias)
    guess = "v" if float(bias.std()) > V_THRESHOLD else "eps"
    found.notes.append(
        f"predicts {guess}: guessed, {biases[-1]} has the standard deviation {float(bias.std()):.3f}; prediction=... overrides that"
    )
    return guess


def _has_key(files: list[TensorFile], *keys: str) -> bool:
    return any(key in file.tensors for file in files for key in keys)


# The schedule ----------------------------------------------------------------------------------------------------------


def _check_scheduler(found: Findings, of: Family) -> None:
    """ValueError for a scheduler whose parametrisation of the network no family here has."""
    config, where = found.scheduler, found.scheduler_file
    name = str(config.get("_class_name", ""))
    known = of.base == "sdxl" and config.get("sigma_data", 0.5) == 0.5 and config.get("prediction_type", "epsilon") == "epsilon"
    foreign_edm = _is_edm(found) and not known  # only Playground's is known
    if name.startswith(("FlowMatch", "Cosine")) or foreign_edm:
        raise ValueError(f"{where}: its scheduler's configuration names {name} with settings that no family here was trained with")


def _read_schedule(found: Findings, own: Mapping[str, Any]) -> dict[str, Any]:
    """What the files change in a family's schedule. Later sources win: scheduler, YAML file, marker key, table of tensors."""
    config, where = found.scheduler, found.scheduler_file
    try:
        check_settings(config, SCHEDULER_SETTINGS)
    except ValueError as error:
        raise ValueError(f"{where}: of its scheduler's, {error}") from None
    names, changes = {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}, dict[str, Any]()
    if own["name"] != "ve":
        names = {"beta_schedule": "name", "beta_start": "start", "beta_end": "end", "num_train_timesteps": "steps"}
        betas = "a list of its own" if config.get("trained_betas") else brief(config.get("beta_schedule", "linear"))
        if betas not in ("'linear'", "'scaled_linear'"):
            raise ValueError(f"{where}: its scheduler's configuration has the betas {betas}, which no family here is of")
        if (steps := config.get("num_train_timesteps", 1000)) not in range(2, MAX_TRAINING_STEPS + 1):
            raise ValueError(f"{where}: its scheduler has num_train_timesteps={brief(steps)}, and not 2 ... {MAX_TRAINING_STEPS}")
    sources = {"its scheduler's configuration": {ours: config[name] for name, ours in names.items() if name in config}}
    if config.get("rescale_betas_zero_snr") and own["name"] != "ve":
        sources["its scheduler's configuration"]["zero_terminal_snr"] = True
    if found.backbone:
        configured = {**own, **sources["its scheduler's configuration"]}
        sources[found.ldm_file] = schedule_of_yaml(found, configured) if own["name"] != "ve" else {}
        sources["a mark beside the weights"] = {"zero_terminal_snr": True} if _has_key([found.backbone.file], "ztsnr") else {}
        key, table = changed_schedule(
            found.backbone.file, {**own, **{k: v for settings in sources.values() for k, v in settings.items()}}, found.notes
        )
        sources[f"its table {key}"] = table
    for source, settings in sources.items():
        if new := {name: value for name, value in settings.items() if {**own, **changes}.get(name, False) != value}:
            found.notes.append(f"the schedule has {', '.join(f'{name}={value}' for name, value in new.items())}, as {source} says"[:300])
            changes |= new
    return changes


def _set_terminal_snr(found: Findings, spec: dict[str, Any], asked: bool | None) -> None:
    """Set zero terminal SNR as asked for, and leave it out for a network that predicts eps, which cannot sample from pure noise."""
    if asked is not None and spec["schedule"]["name"] not in ("linear", "scaled_linear"):
        raise ValueError(f"zero_snr rescales a table of betas, and the schedule {spec['schedule']['name']!r} has none: leave it out")
    if asked is not None:
        found.notes.append(f"the schedule {'ends' if asked else 'does not end'} in pure noise (zero terminal SNR), as asked for")
        spec["schedule"] |= {"zero_terminal_snr": True} if asked else {}
    if asked is False:
        spec["schedule"].pop("zero_terminal_snr", None)
    if spec["schedule"].get("zero_terminal_snr") and spec["prediction"] == "eps":  # at zero SNR eps is the input, and shows nothing of x0
        if asked:
            raise ValueError("zero_snr needs a network that predicts v: one that predicts eps cannot begin in pure noise; prediction='v'?")
        found.notes.append("zero terminal SNR is left out: a network that predicts eps cannot begin in pure noise")
        del spec["schedule"]["zero_terminal_snr"]


def _read_flow_grid(found: Findings, base: str) -> dict[str, Any]:
    """The grid that a flow pipeline's scheduler configures, {} for the family's own. Only the shift is read: people exchange schedulers."""
    config, where = found.scheduler, found.scheduler_file
    if not config:
        return {}
    try:
        check_settings(config, FLOW_SETTINGS)
        grid = flow_grid(config, base)
    except ValueError as error:
        raise ValueError(f"{where}: of its scheduler's, {error}") from None
    if other := [f"{name}={brief(config[name])}" for name, value in FLOW_TIMES.items() if config.get(name, value) != value]:
        found.notes.append(f"its scheduler's {', '.join(other).removeprefix('_')} is not used: times are the family's, and their shift")
    return grid


def _read_own_settings(found: Findings, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that this library wrote into the file's metadata or into model_index.json, without those for another family."""
    written: dict[str, Any] = {}
    file, index = found.backbone.file if found.backbone else None, found.pipeline.index
    places = (
        [] if file is None else [(f"{file.path}: its metadata", file.metadata), (f"{found.pipeline.folder}: model_index.json's", index)]
    )
    for where, content in places:
        if SETTINGS_KEY not in content or content.get(FAMILY_KEY, spec["family"]) != spec["family"]:
            continue
        text = content[SETTINGS_KEY]
        try:
            settings = check_mapping(SETTINGS_KEY, native.parsed("model", text if isinstance(text, str) else json.dumps(text)))
            check_names("setting", settings, SETTINGS)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} {SETTINGS_KEY} are damaged: {error}") from None
        written |= settings
    return written


def _read_sample_size(found: Findings) -> list[int] | None:
    """Height and width of the latents that the backbone was trained on: its sample_size, None without one."""
    if not (size := found.backbone_hints.get("sample_size")):
        return None
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(type(side) in (int, float) and 0 < side <= MAX_SIDE and side == int(side) for side in sides):
        return [int(side) for side in sides]
    found.notes.append(f"its configuration says sample_size={brief(size)}, and not 1 to {MAX_SIDE} latents a side: it is not used")
    return None


# Parts -----------------------------------------------------------------------------------------------------------------


def _vae_params(found: Findings, of: Family, asked: str | None) -> VAEParams | None:
    """The autoencoder's parameters with the scale of its latents, as a configuration or a tensor gives it, else the family's.

    ValueError for the autoencoder of another family, whose pictures would be wrong without any other sign.
    """
    if not (part := found.of_kind("vae")):
        return None
    source, scaling = _read_scale(found, part)
    if other := _other_family(found, part, scaling, of) if found.backbone or asked else None:
        source = source or "the network beside it"
        raise ValueError(f"{part.file.path} is the autoencoder of {other.title}, as {source} says: {of.title} has another")
    if not source and not found.backbone and not asked:
        found.notes.append(f"latents are scaled by {of.scale:g}, as in {of.title}: family=... chooses another one's")
    elif not source and found.backbone and found.backbone.file is not part.file:
        found.notes.append(f"{part.file.path.name} does not say whose latents it makes: they are taken for those of {of.title}")
    default = {"scale": of.scale, "shift": of.shift, "mean": of.mean, "std": of.std}
    if source and not _same_scale(scaling["scale"], of.scale):
        found.notes.append(f"latents are scaled by {brief(scaling['scale'])}, as {source} says, and not by {of.scale:g}, as in {of.title}")
    if source and scaling["shift"] != of.shift and not _same_scale(scaling["shift"], of.shift):
        found.notes.append(f"latents are shifted by {brief(scaling['shift'])}, as {source} says, and not by {of.shift:g}, as in {of.title}")
    try:
        return make_params("", VAEParams, plain(part.params) | (scaling or default))
    except ValueError as error:
        raise ValueError(f"{part.file.path}: its latents cannot be scaled as its configuration says: {error}") from None


def _note_preview(found: Findings, of: Family) -> None:
    """Notes that a tiny autoencoder from elsewhere than the network's folder does not show whose latents it decodes."""
    part = found.of_kind("preview")
    if part and found.backbone and not (found.pipeline.index and found.pipeline.holds(part)):
        found.notes.append(f"{part.file.path.name} does not say whose latents it shows: they are taken for those of {of.title}")


def _read_scale(found: Findings, part: Part) -> tuple[str, dict[str, Any]]:
    """Where the scale of an autoencoder's latents is written, and the scaling parameters; "" and {} if nowhere."""
    hints, file = part.hints, part.file
    # A configuration of diffusers without a scale means SD 1's: those of SD 1 are older than the setting.
    default = FAMILIES["sd1"].scale if "_class_name" in hints and part.params.latent_channels == SD_CHANNELS else None
    if scale := hints.get("scaling_factor", default):
        statistics = {key: hints.get(f"latents_{key}") or None for key in ("mean", "std")}
        return "its config.json", {"scale": scale, "shift": hints.get("shift_factor") or 0.0, **statistics}
    if present := [key for key in LATENT_STATISTICS if key in file.tensors]:
        if absent := [key for key in LATENT_STATISTICS if key not in present]:
            raise ValueError(f"{file.path} holds {present[0]} without {absent[0]}")
        mean, std = (_read_numbers(file, key) for key in LATENT_STATISTICS)
        return present[0], {"scale": FAMILIES["playground-v2.5"].scale, "shift": 0.0, "mean": mean, "std": std}
    if SCALE in file.tensors:
        return SCALE, {"scale": next(iter(_read_numbers(file, SCALE)), 0.0), "shift": 0.0}
    if found.backbone and file is found.backbone.file and "scale_factor" in found.ldm:
        return found.ldm_file, {"scale": found.ldm["scale_factor"], "shift": 0.0}
    return "", {}


def _other_family(found: Findings, part: Part, scaling: Mapping[str, Any], of: Family) -> Family | None:
    """The other family with as many latent channels that an autoencoder belongs to, by its scale or by the network in the same file.

    Playground's scale is a round number: it counts only with the statistics of its latents, or for the same architecture.
    """
    scale = scaling.get("scale")
    known = [each for each in FAMILIES.values() if not scaling or each.mean is None or scaling.get("mean") or each.base == of.base]
    alike = [each for each in known if (each.prediction == "flow") == (of.prediction == "flow")]
    neighbour = found.networks.get(part.file.path)
    if scale is None and neighbour is not None and (found.backbone is None or found.backbone.file is not part.file):
        scale = FAMILIES[base_of(neighbour)].scale
    return None if _same_scale(scale, of.scale) else next((each for each in alike if _same_scale(scale, each.scale)), None)


def _same_scale(scale: Any, other: float) -> bool:
    """Whether two scales agree to the rounding of half precision."""
    return isinstance(scale, int | float) and math.isclose(scale, other, rel_tol=1e-3)


def _read_numbers(file: TensorFile, key: str) -> tuple[float, ...]:
    if math.prod(file.tensors[key].shape) > MAX_LATENT_CHANNELS:
        raise ValueError(f"{file.path} holds {key} of shape {file.tensors[key].shape}: it must have one number per latent channel")
    values = torch.empty(file.tensors[key].shape)
    file.tensors[key].read_into(values)
    return tuple(round(value, 6) for value in values.flatten().tolist())


def _check_fit(found: Findings, text: TextParams | None) -> None:
    """ValueError for parts of different families, which cannot work together."""
    if not found.backbone:
        return
    params: Network = found.backbone.params
    latents, network = params.out_channels, found.backbone.words
    mask = MASK_CHANNELS if isinstance(params, FluxParams) else 1
    if (beside := params.in_channels - latents) not in (0, latents, latents + mask) and beside > 0:
        raise ValueError(
            f"{found.backbone.file.path} holds a {network} that sees {beside} channels beside its sample: known are {latents}, an "
            f"image to go by, and {latents + mask}, a mask and an image to complete"
        )
    if text:
        for what, has, takes in (
            ("a context", text.context_dim, params.context_dim),
            ("a vector", text.vector_dim, params.vector_dim),
        ):
            if has != takes:
                raise ValueError(
                    f"{found.towers[-1].file.path} does not go with {found.backbone.file.path}: the {network} takes {what} of {takes} "
                    f"numbers, and the text encoders make {has}"
                )
    for part in found.single:
        if part.kind != "backbone" and (has := part.params.latent_channels) not in (params.out_channels, params.out_channels / 2):
            raise ValueError(
                f"{part.file.path} does not go with {found.backbone.file.path}: the {network}'s samples have {latents} channels, "
                f"and its latents {has}"
            )
