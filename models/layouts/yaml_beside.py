"""Reads latent diffusion's configuration of a model, model.yaml beside model.ckpt.

The weights load without it, so what cannot be used of it is noted and is no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.betas import MAX_TRAINING_STEPS
from diffusion.messages import brief, one_line
from diffusion.schedule import build_schedule
from diffusion.spec import check_type
from models.files.text import read_text
from models.layouts.findings import Findings

BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "scaled_linear": "scaled_linear"}
"""Latent diffusion calls "linear" what is linear in the square root of beta."""
NAMES = {"linear_start": "start", "linear_end": "end", "timesteps": "steps", "beta_schedule": "name"}
KINDS = {"linear_start": float, "linear_end": float, "timesteps": int, "scale_factor": float, "beta_schedule": str, "parameterization": str}
SCALING = ("denoiser_config", "params", "scaling_config", "target")
SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}


def read_yaml_beside(file: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    """What messages call the configuration beside a file, and its usable settings among KINDS; "" and {} without one.

    SDXL's configurations name the scaling of the denoiser instead of the parameterization.
    """
    path = next((path for ending in (".yaml", ".yml") if (path := file.with_suffix(ending)).is_file()), None)
    if path is None:
        return "", {}
    what = f"{path.name}, beside {file.name},"
    try:
        params = _settings(path)
    except ImportError:
        notes.append(f"{what} is not used: reading it needs PyYAML")
        return what, {}
    except (ValueError, OSError) as error:
        notes.append(f"{what} is not used: {one_line(error)}")
        return what, {}
    for name, value in list(params.items()):
        try:
            _check(name, value)
        except ValueError as error:
            notes.append(f"{what} has {name}={brief(value)}, which is not used: {error}")
            del params[name]
    return what, params


def schedule_of_yaml(found: Findings, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the schedule in the YAML file; {} and a note if they make no valid schedule with `own`, the family's."""
    settings = {ours: found.ldm[name] for name, ours in NAMES.items() if name in found.ldm}
    if "name" in settings:
        settings["name"] = BETA_SCHEDULES[settings["name"]]
    try:
        build_schedule({**own, **settings})
    except ValueError as error:
        if settings:
            found.notes.append(f"{found.ldm_file} has a schedule that is not used: {error}"[:300])
        return {}
    return settings


def _settings(path: Path) -> dict[str, Any]:
    """The unchecked settings in the file."""
    from models.files import plain_yaml  # imported here, as loading needs no PyYAML otherwise

    content = plain_yaml.read(read_text(path, plain_yaml.MAX_TEXT))
    if not isinstance(params := _get_nested(content, "model", "params"), Mapping):
        raise ValueError("it has no model.params, as latent diffusion's configurations have")
    settings = {name: params[name] for name in KINDS if name in params}
    if isinstance(scaling := _get_nested(params, *SCALING), str):
        name = scaling.rpartition(".")[2]
        settings["parameterization"] = SCALINGS.get(name, name)
    return settings


def _get_nested(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _check(name: str, value: Any) -> None:
    """ValueError for a setting of a wrong type or out of range."""
    check_type("it", value, KINDS[name])
    if name == "timesteps" and not 2 <= value <= MAX_TRAINING_STEPS:
        raise ValueError(f"it must be 2 to {MAX_TRAINING_STEPS}, not {brief(value)}")
    if name.startswith("linear_") and not 0 < value < 1:
        raise ValueError(f"it must be above 0 and below 1, not {brief(value)}")
    if name == "scale_factor" and not 0 < value < float("inf"):
        raise ValueError(f"it must be a number above 0, not {brief(value)}")
    if name == "beta_schedule" and value not in BETA_SCHEDULES:
        raise ValueError(f"known are {', '.join(BETA_SCHEDULES)}, and not {brief(value)}")
