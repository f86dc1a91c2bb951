"""Reads and writes the noise schedule that a file holds as a table among its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from diffusion import betas as beta_tables
from diffusion.betas import MAX_TRAINING_STEPS
from diffusion.schedule import DiscreteVP, Schedule, build_schedule
from models.files.stored import TensorFile


def _of_sigmas(sigmas: Tensor) -> Tensor:
    return 1 / (1 + sigmas.sort().values.square())


# Buffers that hold a noise schedule, and the function that gives alpha_bar.
ALPHA_BARS: dict[str, Callable[[Tensor], Tensor]] = {
    "alphas_cumprod": lambda values: values,
    "betas": beta_tables.alpha_bar,
    "sqrt_alphas_cumprod": torch.square,
    "denoiser.sigmas": _of_sigmas,
    "model.sigmas": _of_sigmas,
}
TOLERANCE = 1e-4  # relative: tables are computed in float32, where products of 1000 factors drift
BETAS = {"scaled_linear": beta_tables.scaled_linear, "linear": beta_tables.linear}
DIGITS = (2, 3, 4, 5)  # significant digits of betas that people choose


def changed_schedule(
    file: TensorFile, own: Mapping[str, Any], notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The key of a file's table of noise levels, and its settings that differ from the family's, `own`.

    Other tables in the file that contradict it are noted. ValueError for a table of no known schedule:
    sampling would use other noise levels than training did.
    """
    keys = [key for key in ALPHA_BARS if key in file.tensors]
    if not keys or own["name"] not in BETAS:
        return "", {}
    used = keys[0]
    alpha_bar, rounding = _read_alpha_bar(file, used)
    if (schedule := _recognise(alpha_bar, own, rounding)) is None:
        first, last = float(alpha_bar[0]), float(alpha_bar[-1])
        raise ValueError(
            f"{file.path} holds {used}, an unknown noise schedule (alpha_bar {first:.4g} ... {last:.4g} in "
            f"{len(alpha_bar)} rows): it is neither linear nor scaled_linear"
        )
    for key in keys[1:]:
        other, other_rounding = _read_alpha_bar(file, key)
        near = TOLERANCE + 8 * (rounding + other_rounding)
        if other.shape != alpha_bar.shape or not torch.allclose(other, alpha_bar, rtol=near, atol=near):
            notes.append(f"{file.path.name} holds {key} of another noise schedule than {used}, which is used")
    return used, {name: value for name, value in schedule.items() if own.get(name, False) != value}


def write_table(schedule: Schedule, own: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table for latent diffusion's files, {} without one that `changed_schedule` would recognise."""
    if not isinstance(schedule, DiscreteVP):
        return {}
    exact = schedule.alpha_bar
    table = exact.float()
    if (known := _recognise(table.double(), own, torch.finfo(table.dtype).eps)) is None:
        return {}
    read = build_schedule(known)
    same = isinstance(read, DiscreteVP) and torch.allclose(read.alpha_bar, exact, rtol=1e-6, atol=1e-9)
    return {"alphas_cumprod": table} if same else {}


def _read_alpha_bar(file: TensorFile, key: str) -> tuple[Tensor, float]:
    """alpha_bar from a table, and the relative rounding error of its numbers."""
    stored = file.tensors[key]
    if len(stored.shape) != 1 or not 2 <= stored.shape[0] <= MAX_TRAINING_STEPS:
        levels = f"a table has 2 ... {MAX_TRAINING_STEPS} noise levels"
        raise ValueError(f"{file.path} holds {key} of shape {stored.shape}: {levels}")
    values = torch.empty(stored.shape, dtype=torch.float64)
    stored.read_into(values)
    half = stored.dtype.is_floating_point and stored.dtype.itemsize <= 2
    return ALPHA_BARS[key](values), torch.finfo(stored.dtype if half else torch.float32).eps


def _recognise(alpha_bar: Tensor, own: Mapping[str, Any], rounding: float) -> dict[str, Any] | None:
    """The schedule with this alpha_bar up to rounding, else up to float32's drift, else None."""
    if not (alpha_bar.isfinite().all() and 0 <= alpha_bar.min() < alpha_bar[0] < 1 + rounding):
        return None
    near: dict[str, Any] | None = None
    for schedule in _candidates(alpha_bar, own):
        try:
            built = build_schedule(schedule)
        except ValueError:  # impossible betas
            continue
        if isinstance(built, DiscreteVP):
            if torch.allclose(built.alpha_bar, alpha_bar, rtol=rounding, atol=rounding * 1e-4):
                return schedule
            if near is None and torch.allclose(
                built.alpha_bar, alpha_bar, rtol=TOLERANCE + rounding, atol=1e-6
            ):
                near = schedule
    return near


def _candidates(alpha_bar: Tensor, own: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Possible schedules, with and without zero terminal SNR: the family's, DDPM's, two fitted kinds."""
    zeros = (False,) if (last := float(alpha_bar[-1])) > 1e-6 else (False, True) if last else (True, False)
    for schedule in ({**own}, {"name": "linear", "start": 1e-4, "end": 0.02}):
        for zero in zeros:
            yield {**schedule, "steps": len(alpha_bar), "zero_terminal_snr": zero}
    fitted = {(name, zero): _fit_betas(alpha_bar, name, zero) for zero in zeros for name in BETAS}
    for digits in (*sorted(product(DIGITS, DIGITS), key=sum), (17, 17)):  # fewer digits first
        for (name, zero), ends in fitted.items():
            start, end = (float(f"{beta:.{places}g}") for beta, places in zip(ends, digits, strict=True))
            schedule = {"name": name, "start": start, "end": end, "steps": len(alpha_bar)}
            yield {**schedule, "zero_terminal_snr": zero}


def _fit_betas(alpha_bar: Tensor, name: str, zero: bool) -> tuple[float, float]:
    """The first and last beta of the table with the least squared difference in sqrt(alpha_bar).

    By Gauss-Newton in their logarithms over all rows, because single betas in low precision are mostly
    rounding.
    """
    ends = torch.tensor([1e-3, 1e-2], dtype=torch.float64).log()
    steps = 1e-5 * torch.eye(2, dtype=torch.float64)

    def root(logs: Tensor) -> Tensor:
        start, end = logs.exp().tolist()
        made = beta_tables.alpha_bar(BETAS[name](start, end, len(alpha_bar)))
        return (beta_tables.zero_terminal_snr(made) if zero else made).sqrt()

    for _ in range(30):
        slopes = torch.stack([(root(ends + step) - root(ends - step)) / 2e-5 for step in steps], dim=1)
        fit = torch.linalg.lstsq(slopes, (alpha_bar.sqrt() - root(ends))[:, None])
        move = fit.solution[:, 0].nan_to_num().clamp(-1, 1)
        ends = (ends + move).clamp(math.log(1e-9), math.log(0.99))
        if float(move.abs().max()) < 1e-10:
            break
    start, end = ends.exp().tolist()
    return start, end
