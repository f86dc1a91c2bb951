"""A pipeline's scheduler: what its configuration says of a model's schedule and grid, and the configuration
from these.

Only what the network was trained with is read. Steps, spacing and solver are left alone, since people
exchange schedulers.
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
from models.layouts.written_schedule import changed_schedule
from models.layouts.yaml_beside import schedule_of_yaml
from models.model import Model

V_MARK, SNR_MARK = (
    "v_pred",
    "ztsnr",
)  # empty tensors in single files: the network predicts v, the schedule ends in pure noise
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
MAX_SHIFT = 1000  # of a flow's times; published ones are up to 7
SETTINGS: Settings = {"timestep_type": ("discrete",)}  # which time the network is told
# what a latent consistency model was distilled for: where it stands in a description, and what is usual
LCM_SETTINGS = {
    "original_inference_steps": ("grid", "taught", 50),
    "timestep_scaling": ("consistency", "scaling", 10.0),
}
FLOW_SETTINGS: Settings = {
    "invert_sigmas": (False,),
    "num_train_timesteps": (1000,),
}  # what the time means that the network is told
FLOW_LINE = (
    "base_image_seq_len",
    "base_shift",
    "max_image_seq_len",
    "max_shift",
)  # the line of spacing "mu_shift"
# How a flow's scheduler makes times, but for what shifts them.
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


def check_scheduler(found: Findings, of: Family) -> None:
    """ValueError for a scheduler whose parametrisation of the network no family here has."""
    config, where = found.scheduler, found.scheduler_file
    name = str(config.get("_class_name", ""))
    preconditioned = any(
        each.architecture is of.architecture and each.prediction == "edm" for each in FAMILIES.values()
    )
    known = (
        preconditioned
        and config.get("sigma_data", 0.5) == 0.5
        and config.get("prediction_type", "epsilon") == "epsilon"
    )
    if name.startswith(("FlowMatch", "Cosine")) or (found.is_edm and not known):
        raise ValueError(
            f"{where}: its scheduler's configuration names {name} with settings that no family here was "
            "trained with"
        )


def read_schedule(found: Findings, own: dict[str, Any]) -> dict[str, Any]:
    """A family's schedule with what the files change in it. Later sources win: scheduler, YAML file, mark,
    table of tensors."""
    schedule = dict(own)

    def change(source: str, settings: Mapping[str, Any]) -> None:
        if new := {name: value for name, value in settings.items() if schedule.get(name, False) != value}:
            found.notes.append(
                f"the schedule has {', '.join(f'{name}={value}' for name, value in new.items())}, as "
                f"{source} says"[:300]
            )
            schedule.update(new)

    change("its scheduler's configuration", _configured_schedule(found, own["name"] == "ve"))
    if found.backbone:
        if own["name"] != "ve":
            change(found.ldm_file, schedule_of_yaml(found, schedule))
        change(
            "a mark beside the weights",
            {"zero_terminal_snr": True} if SNR_MARK in found.backbone.file.tensors else {},
        )
        key, table = changed_schedule(found.backbone.file, schedule, found.notes)
        change(f"its table {key}", table)
    return schedule


def _configured_schedule(found: Findings, sigmas: bool) -> dict[str, Any]:
    """The settings of the schedule in the scheduler's configuration: of a table of betas, or the range of
    `sigmas`."""
    config, where = found.scheduler, found.scheduler_file
    check_settings(config, SETTINGS, str(where))
    if sigmas:
        return {name: config[name] for name in ("sigma_min", "sigma_max") if name in config}
    betas = (
        "a list of its own" if config.get("trained_betas") else brief(config.get("beta_schedule", "linear"))
    )
    if betas not in ("'linear'", "'scaled_linear'"):
        raise ValueError(
            f"{where}: its scheduler's configuration has the betas {betas}, which no family here is of"
        )
    if (steps := config.get("num_train_timesteps", 1000)) not in range(2, MAX_TRAINING_STEPS + 1):
        raise ValueError(
            f"{where}: its scheduler has num_train_timesteps={brief(steps)}, and not 2 ... "
            f"{MAX_TRAINING_STEPS}"
        )
    names = {
        "beta_schedule": "name",
        "beta_start": "start",
        "beta_end": "end",
        "num_train_timesteps": "steps",
    }
    settings = {ours: config[name] for name, ours in names.items() if name in config}
    return settings | ({"zero_terminal_snr": True} if config.get("rescale_betas_zero_snr") else {})


def set_distilled(spec: dict[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Set what a scheduler's configuration says that a latent consistency model was distilled for, and name
    what is unusual."""
    unusual = {
        name: config[name] for name, (_, _, usual) in LCM_SETTINGS.items() if config.get(name, usual) != usual
    }
    for name, value in unusual.items():
        part, ours, _ = LCM_SETTINGS[name]
        spec[part][ours] = value
    return [f"{name}={brief(value)}" for name, value in unusual.items()]


def set_terminal_snr(found: Findings, spec: dict[str, Any], asked: bool | None) -> None:
    """Set zero terminal SNR as asked for, and leave it out for a network that predicts eps, which cannot
    sample from pure noise."""
    schedule = spec["schedule"]
    if asked is not None:
        if schedule["name"] not in ("linear", "scaled_linear"):
            raise ValueError(
                f"zero_snr rescales a table of betas, and the schedule {schedule['name']!r} has none: leave "
                "it out"
            )
        found.notes.append(
            f"the schedule {'ends' if asked else 'does not end'} in pure noise (zero terminal SNR), as "
            "asked for"
        )
        schedule.pop("zero_terminal_snr", None)
        schedule |= {"zero_terminal_snr": True} if asked else {}
    if (
        schedule.get("zero_terminal_snr") and spec["prediction"] == "eps"
    ):  # at zero SNR eps is the input, and shows nothing of x0
        if asked:
            raise ValueError(
                "zero_snr needs a network that predicts v: one that predicts eps cannot begin in pure "
                "noise; prediction='v'?"
            )
        found.notes.append(
            "zero terminal SNR is left out: a network that predicts eps cannot begin in pure noise"
        )
        del schedule["zero_terminal_snr"]


def read_flow_grid(found: Findings, of: Family) -> dict[str, Any]:
    """The grid that a flow pipeline's scheduler configures, {} for the family's own: only what shifts times
    is read."""
    config, where = found.scheduler, found.scheduler_file
    if not config:
        return {}
    check_settings(config, FLOW_SETTINGS, str(where))
    try:
        grid = flow_grid(config, of)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if other := [
        f"{name}={brief(config[name])}"
        for name, value in FLOW_TIMES.items()
        if config.get(name, value) != value
    ]:
        found.notes.append(
            f"its scheduler's {', '.join(other).removeprefix('_')} is not used: times are the family's, and "
            "their shift"
        )
    return grid


def flow_grid(config: Mapping[str, Any], of: Family) -> dict[str, Any]:
    """The grid that a flow's scheduler means, {} where it says nothing: schedulers are exchanged. ValueError
    for a shift that is none."""
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    if config.get("use_dynamic_shifting") and (flow or config.get("use_flow_sigmas")):
        line = [config.get(name, usual) for name, usual in zip(FLOW_LINE, FLUX_LINE, strict=True)]
        check_type(", ".join(FLOW_LINE), line, Line)
        return {"spacing": "mu_shift"} | ({"line": line} if line != list(FLUX_LINE) else {})
    shift = (
        config.get("shift", 1.0)
        if flow
        else config.get("flow_shift", 1.0)
        if config.get("use_flow_sigmas")
        else None
    )
    if shift is None or (shift == 1 and not flow):  # by default, where the scheduler was made for others
        return {}
    if not isinstance(shift, int | float) or not 0 < shift < MAX_SHIFT:
        raise ValueError(f"shift={brief(shift)} is not a number in (0, {MAX_SHIFT})")
    least = shift / (1000 + shift - 1)  # the time that the scheduler's first of a thousand rows is shifted to
    return (
        {"spacing": "linspace"}
        | ({"t_end": least} if "t_end" in of.grid else {})
        | ({"shift": shift} if shift != 1 else {})
    )


def usual_grid(grid: Mapping[str, Any], schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A family's grid on a schedule: on one that ends in pure noise it begins there, which most spacings
    leave out (Lin et al. 2024, section 3.3)."""
    begins_there = not schedule.get("zero_terminal_snr") or grid.get("spacing") in FEW_STEPS
    return dict(grid) if begins_there else {"spacing": "trailing"}


# Writing ----------------------------------------------------------------------------------------------------


def scheduler(model: Model) -> dict[str, Any]:
    """For a scheduler that fits schedule and prediction."""
    described = model.spec["schedule"]
    defaults = {
        p.name: p.default for p in inspect.signature(SCHEDULES[described["name"]]).parameters.values()
    }
    schedule, prediction = {"shift": 1.0, **defaults, **described}, model.prediction.name
    if schedule["name"] == "ve" and prediction == "edm":
        sigmas = {"sigma_min": schedule["sigma_min"], "sigma_max": schedule["sigma_max"], "sigma_data": 0.5}
        return {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            **sigmas,
            "prediction_type": "epsilon",
            "sigma_schedule": "karras",
        }
    if (schedule["name"], prediction) == ("flow", "flow") and schedule["shift"] == 1:
        return _flow_scheduler(model)
    if (
        schedule["name"] not in ("linear", "scaled_linear")
        or prediction not in PREDICTIONS
        or schedule["shift"] != 1
    ):
        raise ValueError(
            f"diffusers' folders have no schedule {described} with prediction {prediction!r}: use "
            "layout='native'"
        )
    spacing = model.spec.get("grid", {}).get("spacing")
    name = (
        "LCMScheduler"
        if model.distilled
        else "EulerAncestralDiscreteScheduler"
        if spacing == "turbo"
        else "EulerDiscreteScheduler"
    )
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
    """For FlowMatchEulerDiscreteScheduler, which shifts times by a factor, or as mu_shift does by the size of
    the image."""
    grid = model.spec.get("grid", {})
    if grid.get("spacing", "linspace") not in ("linspace", "mu_shift"):
        raise ValueError(f"diffusers' folders have no times {grid} for a flow: use layout='native'")
    return {
        "_class_name": FLOW_TIMES["_class_name"],
        **dict(zip(FLOW_LINE, grid.get("line", FLUX_LINE), strict=True)),
        "_diffusers_version": OLDEST_FLOW,
        "num_train_timesteps": 1000,
        "shift": grid.get("shift", 1.0),
        "use_dynamic_shifting": grid.get("spacing") == "mu_shift",
    }
