"""Reads a model's schedule and grid from its scheduler's configuration, and writes that configuration.

Only settings of the training are read. Steps, spacing and solver are not, because people exchange schedulers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusion.betas import MAX_TRAINING_STEPS
from diffusion.messages import brief
from diffusion.schedule import SCHEDULES
from diffusion.spacing import FEW_STEPS, FLUX_LINE, Line
from diffusion.spec import check_type
from models.families import FAMILIES, Family
from models.families.family import OLDEST_FLOW
from models.files.structure import Settings, check_settings
from models.layouts.findings import Findings
from models.layouts.ldm_yaml import schedule_of_yaml
from models.layouts.schedule_table import changed_schedule
from models.model import Model

V_MARK = "v_pred"  # an empty tensor in single files: the network predicts v
SNR_MARK = "ztsnr"  # likewise: the schedule ends in pure noise
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
MAX_SHIFT = 1000  # of a flow's times; published ones are up to 7
SETTINGS: Settings = {"timestep_type": ("discrete",)}  # the meaning of the network's times
FLOW_SETTINGS: Settings = {"invert_sigmas": (False,), "num_train_timesteps": (1000,)}  # likewise
# Settings of latent consistency distillation: their place in a description, and the default.
LCM_SETTINGS = {
    "original_inference_steps": ("grid", "taught", 50),
    "timestep_scaling": ("consistency", "scaling", 10.0),
}
# The line of the spacing "mu_shift".
FLOW_LINE = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift")
# Settings for the times of a flow's scheduler, apart from their shift.
FLOW_TIMES: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

# Reading ----------------------------------------------------------------------------------------------------


def check_scheduler(found: Findings, family: Family) -> None:
    """ValueError for a scheduler that parametrises the network as no known family does."""
    config = found.scheduler
    name = str(config.get("_class_name", ""))
    alike = (each for each in FAMILIES.values() if each.architecture is family.architecture)
    standard = config.get("sigma_data", 0.5) == 0.5 and config.get("prediction_type", "epsilon") == "epsilon"
    known = standard and any(each.prediction == "edm" for each in alike)
    if name.startswith(("FlowMatch", "Cosine")) or (found.is_edm and not known):
        stated = f"{found.scheduler_file}: its scheduler's configuration names {name}"
        raise ValueError(f"{stated} with settings that no known family was trained with")


def read_schedule(found: Findings, own: dict[str, Any]) -> dict[str, Any]:
    """A family's schedule, changed by scheduler, YAML file, mark and table, in this order."""
    schedule = dict(own)

    def change(source: str, settings: Mapping[str, Any]) -> None:
        if new := {name: value for name, value in settings.items() if schedule.get(name, False) != value}:
            values = ", ".join(f"{name}={value}" for name, value in new.items())
            found.notes.append(f"the schedule has {values}, as {source} says"[:300])
            schedule.update(new)

    change("its scheduler's configuration", _configured_schedule(found, own["name"] == "ve"))
    if found.backbone:
        file = found.backbone.file
        if own["name"] != "ve":
            change(found.ldm_file, schedule_of_yaml(found, schedule))
        if SNR_MARK in file.tensors:
            change("a mark beside the weights", {"zero_terminal_snr": True})
        key, table = changed_schedule(file, schedule, found.notes)
        change(f"its table {key}", table)
    return schedule


def _configured_schedule(found: Findings, sigmas: bool) -> dict[str, Any]:
    """The scheduler's settings of the schedule: those of a table of betas, or the range of sigmas."""
    config, path = found.scheduler, found.scheduler_file
    check_settings(config, SETTINGS, str(path))
    if sigmas:
        return {name: config[name] for name in ("sigma_min", "sigma_max") if name in config}
    betas = brief(config.get("beta_schedule", "linear"))
    if config.get("trained_betas"):
        betas = "a list of its own"
    if betas not in ("'linear'", "'scaled_linear'"):
        stated = f"its scheduler's configuration has the betas {betas}"
        raise ValueError(f"{path}: {stated}, which no known family uses")
    if (steps := config.get("num_train_timesteps", 1000)) not in range(2, MAX_TRAINING_STEPS + 1):
        stated = f"its scheduler has num_train_timesteps={brief(steps)}"
        raise ValueError(f"{path}: {stated}, and not 2 ... {MAX_TRAINING_STEPS}")
    names = {
        "beta_schedule": "name",
        "beta_start": "start",
        "beta_end": "end",
        "num_train_timesteps": "steps",
    }
    settings = {ours: config[name] for name, ours in names.items() if name in config}
    return settings | ({"zero_terminal_snr": True} if config.get("rescale_betas_zero_snr") else {})


def set_distilled(spec: dict[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Set a scheduler's settings of consistency distillation in a description; returns unusual ones."""
    unusual = []
    for name, (part, ours, usual) in LCM_SETTINGS.items():
        if (value := config.get(name, usual)) != usual:
            spec[part][ours] = value
            unusual.append(f"{name}={brief(value)}")
    return unusual


def set_terminal_snr(found: Findings, spec: dict[str, Any], requested: bool | None) -> None:
    """Set zero terminal SNR as requested, except for a network that predicts eps.

    At zero SNR such a network's prediction is its input, and shows nothing of x0.
    """
    schedule = spec["schedule"]
    if requested is not None:
        if (name := schedule["name"]) not in ("linear", "scaled_linear"):
            raise ValueError(
                f"leave zero_snr out: it rescales a table of betas, which {name!r} does not have"
            )
        ends = "ends" if requested else "does not end"
        found.notes.append(f"the schedule {ends} in pure noise (zero terminal SNR), as requested")
        schedule.pop("zero_terminal_snr", None)
        schedule |= {"zero_terminal_snr": True} if requested else {}
    if schedule.get("zero_terminal_snr") and spec["prediction"] == "eps":
        reason = "a network that predicts eps cannot begin in pure noise"
        if requested:
            raise ValueError(f"zero_snr needs a network that predicts v: {reason}; prediction='v'?")
        found.notes.append(f"zero terminal SNR is left out: {reason}")
        del schedule["zero_terminal_snr"]


def read_flow_grid(found: Findings, family: Family) -> dict[str, Any]:
    """The grid that shifts times as a flow's scheduler does, {} for the family's own."""
    config, path = found.scheduler, found.scheduler_file
    if not config:
        return {}
    check_settings(config, FLOW_SETTINGS, str(path))
    try:
        grid = flow_grid(config, family)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    other = [name for name, value in FLOW_TIMES.items() if config.get(name, value) != value]
    if other:
        settings = ", ".join(f"{name}={brief(config[name])}" for name in other).removeprefix("_")
        found.notes.append(f"its scheduler's {settings} is not used: times and their shift are the family's")
    return grid


def flow_grid(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The grid of a flow's scheduler, {} if it says nothing. ValueError for an impossible shift."""
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    flow_sigmas = config.get("use_flow_sigmas")
    if not (flow or flow_sigmas):
        return {}
    if config.get("use_dynamic_shifting"):
        line = [config.get(name, usual) for name, usual in zip(FLOW_LINE, FLUX_LINE, strict=True)]
        check_type(", ".join(FLOW_LINE), line, Line)
        return {"spacing": "mu_shift"} | ({"line": line} if line != list(FLUX_LINE) else {})
    shift = config.get("shift" if flow else "flow_shift", 1.0)
    if shift is None or (shift == 1 and not flow):  # 1 is also the default of schedulers for other models
        return {}
    if not isinstance(shift, int | float) or not 0 < shift < MAX_SHIFT:
        raise ValueError(f"shift={brief(shift)} is not a number in (0, {MAX_SHIFT})")
    grid: dict[str, Any] = {"spacing": "linspace"}
    if "t_end" in family.grid:
        grid["t_end"] = shift / (1000 + shift - 1)  # the shifted time of the first of a thousand rows
    return grid | ({"shift": shift} if shift != 1 else {})


def usual_grid(grid: Mapping[str, Any], schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A family's grid; "trailing" if the schedule ends in pure noise, where most other spacings do not begin.

    Lin et al. 2024, section 3.3.
    """
    keep = not schedule.get("zero_terminal_snr") or grid.get("spacing") in FEW_STEPS
    return dict(grid) if keep else {"spacing": "trailing"}


# Writing ----------------------------------------------------------------------------------------------------


def scheduler(model: Model) -> dict[str, Any]:
    """The configuration of a scheduler for a model's schedule and prediction. ValueError if there is none."""
    described, prediction = model.spec["schedule"], model.prediction.name
    parameters = inspect.signature(SCHEDULES[described["name"]]).parameters.values()
    schedule = {"shift": 1.0, **{p.name: p.default for p in parameters}, **described}
    kind, unshifted = schedule["name"], schedule["shift"] == 1
    if kind == "ve" and prediction == "edm":
        return {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "sigma_min": schedule["sigma_min"],
            "sigma_max": schedule["sigma_max"],
            "sigma_data": 0.5,
            "prediction_type": "epsilon",
            "sigma_schedule": "karras",
        }
    if (kind, prediction) == ("flow", "flow") and unshifted:
        return _flow_scheduler(model)
    if kind not in ("linear", "scaled_linear") or prediction not in PREDICTIONS or not unshifted:
        lack = f"diffusers has no scheduler for {described} with prediction {prediction!r}"
        raise ValueError(f"{lack}: use layout='native'")
    spacing = model.spec.get("grid", {}).get("spacing")
    name = "EulerAncestralDiscreteScheduler" if spacing == "turbo" else "EulerDiscreteScheduler"
    if model.distilled:
        name = "LCMScheduler"
    distilled = {
        theirs: model.spec[part][ours]
        for theirs, (part, ours, _) in LCM_SETTINGS.items()
        if ours in model.spec.get(part, {})
    }
    trailing = spacing in ("trailing", "turbo")  # both begin at the noisiest row, which leading never visits
    return {
        "_class_name": name,
        "num_train_timesteps": schedule["steps"],
        "beta_start": schedule["start"],
        "beta_end": schedule["end"],
        "beta_schedule": schedule["name"],
        "prediction_type": PREDICTIONS[prediction],
        "rescale_betas_zero_snr": schedule["zero_terminal_snr"],
        "timestep_spacing": "trailing" if trailing else "leading",
        "steps_offset": 0 if trailing else 1,
        **distilled,
    }


def _flow_scheduler(model: Model) -> dict[str, Any]:
    """FlowMatchEulerDiscreteScheduler, which shifts times by a factor, or by the image's size as mu_shift."""
    grid = model.spec.get("grid", {})
    if grid.get("spacing", "linspace") not in ("linspace", "mu_shift"):
        raise ValueError(f"diffusers has no flow scheduler for the grid {grid}: use layout='native'")
    return {
        "_class_name": FLOW_TIMES["_class_name"],
        **dict(zip(FLOW_LINE, grid.get("line", FLUX_LINE), strict=True)),
        "_diffusers_version": OLDEST_FLOW,
        "num_train_timesteps": 1000,
        "shift": grid.get("shift", 1.0),
        "use_dynamic_shifting": grid.get("spacing") == "mu_shift",
    }
