"""Reads latent diffusion's configuration of a model, model.yaml beside model.ckpt.

The weights load without it, so settings that cannot be used are noted, and are not errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion.messages import brief, one_line
from diffusion.schedule import build_schedule
from models.files.text import read_text
from models.layouts.findings import Findings

# Latent diffusion calls "linear" what is linear in the square root of beta.
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "scaled_linear": "scaled_linear"}
Reader = Callable[[str], Any]
SCHEDULE: dict[str, tuple[str, Reader]] = {
    "linear_start": ("start", float),
    "linear_end": ("end", float),
    "timesteps": ("steps", int),
    "beta_schedule": ("name", lambda text: BETA_SCHEDULES.get(text, text)),
}
# Our name of each setting, and the function that reads its text.
SETTINGS: dict[str, tuple[str, Reader]] = {
    **SCHEDULE,
    "scale_factor": ("scale", float),
    "parameterization": ("prediction", str),
}
SCALING = ("denoiser_config", "params", "scaling_config", "target")
SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}
MAX_TEXT = 2**13  # characters; published configurations have 2 kB
MAX_BRACKETS = 100  # [ and {, of which PyYAML takes thousands for seconds; published configurations have 20


def read_ldm_yaml(file: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    """The configuration beside a file: its name in messages, and its settings by our names; or "" and {}."""
    path = next((path for ending in (".yaml", ".yml") if (path := file.with_suffix(ending)).is_file()), None)
    if path is None:
        return "", {}
    what, settings = f"{path.name}, beside {file.name},", dict[str, Any]()
    try:
        params = _model_params(path)
    except (ImportError, ValueError, OSError) as error:
        notes.append(f"{what} is not used: {one_line(error)}")
        return what, {}
    for name, text in params.items():
        ours, kind = SETTINGS[name]
        try:
            if not isinstance(text, str):
                raise ValueError("it must be one value")
            settings[ours] = value = kind(text)
            if isinstance(value, float) and not 0 < value < math.inf:
                raise ValueError("it must be a number above 0")
        except ValueError as error:
            settings.pop(ours, None)
            notes.append(f"{what} has {name}={brief(text)}, which is not used: {one_line(error)}")
    return what, settings


def schedule_of_yaml(found: Findings, own: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule's settings in the YAML file; {} and a note if they do not fit the family's, `own`."""
    settings = {ours: found.ldm[ours] for ours, _ in SCHEDULE.values() if ours in found.ldm}
    try:
        build_schedule({**own, **settings})
    except ValueError as error:
        if settings:
            found.notes.append(f"{found.ldm_file} has a schedule that is not used: {error}"[:300])
        return {}
    return settings


def _model_params(path: Path) -> dict[str, Any]:
    """The entries of SETTINGS in the file, unchecked. For SDXL, the prediction is in the denoiser's scaling.

    PyYAML's BaseLoader makes only texts, lists and mappings: it has no tags, and does not copy aliases.
    """
    import yaml  # here: nothing else needs it

    text = read_text(path, MAX_TEXT)
    if sum(map(text.count, "[{")) > MAX_BRACKETS:
        raise ValueError(f"more than {MAX_BRACKETS} brackets")
    try:
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, OverflowError, RecursionError) as error:  # OverflowError for "\\UFFFFFFFF"
        raise ValueError(one_line(error)) from None
    if not isinstance(params := _get_nested(content, "model", "params"), Mapping):
        raise ValueError("it has no model.params, as latent diffusion's configurations have")
    settings = {name: params[name] for name in SETTINGS if name in params}
    if isinstance(scaling := _get_nested(params, *SCALING), str):
        name = scaling.rpartition(".")[2]
        settings["parameterization"] = SCALINGS.get(name, name)
    return settings


def _get_nested(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content
