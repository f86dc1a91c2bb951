"""The noise schedule among a file's tensors, and what a latent-diffusion configuration beside the file says of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import betas as beta_tables
from diffusion.schedule import DiscreteVP, Schedule, build_schedule
from models.checkpoints.stored import TensorFile

# Buffers that hold a noise schedule, and the squared factors of the data that follow from each.
ALPHA_BARS: dict[str, Callable[[Tensor], Tensor]] = {
    "alphas_cumprod": lambda values: values,
    "betas": beta_tables.alpha_bar,
    "sqrt_alphas_cumprod": torch.square,
    "denoiser.sigmas": lambda sigmas: 1 / (1 + sigmas.sort().values.square()),
    "model.sigmas": lambda sigmas: 1 / (1 + sigmas.sort().values.square()),
}
MOST_ROWS = 100_000  # of a table; published ones have 1000
SAME = 1e-4  # relative: tables are written in float32, and trained in it
LARGEST_YAML = 2**16  # bytes; published ones have 2 kB


def changed_schedule(file: TensorFile, own: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The key of a file's table of noise levels, and how its schedule differs from `own`, a description: {} where it is that one.

    ValueError for a table that no schedule here makes: the network was trained with other noise than it would be sampled with.
    """
    key = next((key for key in ALPHA_BARS if key in file.tensors), None)
    if key is None or own["name"] not in ("linear", "scaled_linear"):
        return "", {}
    stored = file.tensors[key]
    if len(stored.shape) != 1 or not 2 <= stored.shape[0] <= MOST_ROWS:
        raise ValueError(f"{file.path} holds {key} of shape {stored.shape}: a table of 2 ... {MOST_ROWS} noise levels is meant")
    values = torch.empty(stored.shape, dtype=torch.float64)
    stored.read_into(values)
    alpha_bar = ALPHA_BARS[key](values)
    rounding = torch.finfo(stored.dtype).eps if stored.dtype.is_floating_point else 0.0
    if (schedule := _recognised(alpha_bar, own, max(SAME, 4 * rounding))) is None:
        raise ValueError(
            f"{file.path} holds {key}, a noise schedule (alpha_bar {float(alpha_bar[0]):.4g} ... {float(alpha_bar[-1]):.4g} in "
            f"{len(alpha_bar)} rows) that is neither linear nor scaled_linear: this library has no such schedule"
        )
    return key, {name: value for name, value in schedule.items() if own.get(name, False) != value}


def write_table(schedule: Schedule, own: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table as latent diffusion's files hold it, {} for a schedule that is none or that `changed_schedule` would not know again."""
    if not isinstance(schedule, DiscreteVP) or _recognised(schedule.alpha_bar, own, SAME) is None:
        return {}
    return {"alphas_cumprod": schedule.alpha_bar.float()}


def _recognised(alpha_bar: Tensor, own: Mapping[str, Any], near: float) -> dict[str, Any] | None:
    """The description of the schedule with these squared factors of the data, to a relative error of `near`."""
    for schedule in _candidates(alpha_bar, own):
        try:
            built = build_schedule(schedule)
        except ValueError:  # betas that no table has
            continue
        if isinstance(built, DiscreteVP) and torch.allclose(built.alpha_bar, alpha_bar, rtol=near, atol=1e-6):
            return schedule
    return None


def _candidates(alpha_bar: Tensor, own: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Schedules that a table may be: the family's, DDPM's, and the two kinds through its ends, with and without zero terminal SNR."""
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    exact = {"start": float(betas[0]), "end": float(betas[-1])}
    rounded = {name: float(f"{beta:.4g}") for name, beta in exact.items()}  # as people choose them
    fitted = [{"name": name, **ends} for ends in (rounded, exact) for name in ("scaled_linear", "linear")]
    for schedule in ({**own}, {"name": "linear", "start": 1e-4, "end": 0.02}, *fitted):
        for zero in (False, True):
            yield {**schedule, "steps": len(alpha_bar), "zero_terminal_snr": zero}


# Configurations --------------------------------------------------------------------------------------------------------


def read_yaml_beside(file: Path, notes: list[str]) -> dict[str, Any]:
    """The "params" of the model in latent diffusion's configuration beside a file, model.yaml beside model.ckpt; {} without one.

    One that cannot be read is noted: it is about weights that are intact.
    """
    path = next((path for ending in (".yaml", ".yml") if (path := file.with_suffix(ending)).is_file()), None)
    if path is None:
        return {}
    try:
        import yaml  # comes with hydra, without which models are loaded too
    except ImportError:
        notes.append(f"{path.name}, beside {file.name}, is not used: to read it takes PyYAML")
        return {}
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise ValueError(f"more than {LARGEST_YAML} bytes")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name}, beside {file.name}, is not used: it cannot be read ({' '.join(str(error).split())[:80]})")
        return {}
    for name in ("model", "params"):
        content = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping):
        notes.append(f"{path.name}, beside {file.name}, is not used: it describes no model of latent diffusion's")
        return {}
    return {str(key): value for key, value in content.items()}


def schedule_of_yaml(params: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule there, as far as it is said: latent diffusion calls "linear" what is linear in the square root of beta."""
    kinds = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    names = {"linear_start": "start", "linear_end": "end", "timesteps": "steps"}
    said = {ours: params[name] for name, ours in names.items() if name in params}
    if said.get("steps", 1000) not in range(2, MOST_ROWS + 1):
        raise ValueError(f"the configuration beside the weights has timesteps={said['steps']!r:.40}, and not 2 ... {MOST_ROWS}")
    return said | ({"name": kinds.get(kind, kind)} if (kind := params.get("beta_schedule")) else {})


def prediction_of_yaml(params: Mapping[str, Any]) -> str | None:
    """What the network predicts, in the words there: latent diffusion's, or the scaling of its successor's denoiser (SDXL)."""
    scaling: Any = params
    for name in ("denoiser_config", "params", "scaling_config", "target"):
        scaling = scaling.get(name) if isinstance(scaling, Mapping) else None
    if isinstance(scaling, str):
        return {"EpsScaling": "eps", "VScaling": "v"}.get(name := scaling.rpartition(".")[2], name)
    said = params.get("parameterization")
    return said if isinstance(said, str) else None
