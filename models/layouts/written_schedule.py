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

# Buffers that hold a noise schedule, and how alpha_bar follows from each.
ALPHA_BARS: dict[str, Callable[[Tensor], Tensor]] = {
    "alphas_cumprod": lambda values: values,
    "betas": beta_tables.alpha_bar,
    "sqrt_alphas_cumprod": torch.square,
    "denoiser.sigmas": lambda sigmas: 1 / (1 + sigmas.sort().values.square()),
    "model.sigmas": lambda sigmas: 1 / (1 + sigmas.sort().values.square()),
}
TOLERANCE = 1e-4  # relative: tables are computed in float32, where products of 1000 factors drift
BETAS = {"scaled_linear": beta_tables.scaled_linear, "linear": beta_tables.linear}
DIGITS = (2, 3, 4, 5)  # significant digits of betas that people choose


def changed_schedule(
    file: TensorFile, own: Mapping[str, Any], notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The key of a file's table of noise levels, and the settings in which its schedule differs from `own`,
    the family's.

    Other tables in the file that contradict it are noted. ValueError for a table that no schedule here makes:
    sampling would use other noise levels than training did.
    """
    keys = [key for key in ALPHA_BARS if key in file.tensors]
    if not keys or own["name"] not in BETAS:
        return "", {}
    alpha_bar, rounding = _read_alpha_bar(file, keys[0])
    if (schedule := _recognise(alpha_bar, own, rounding)) is None:
        raise ValueError(
            f"{file.path} holds {keys[0]}, a noise schedule (alpha_bar {float(alpha_bar[0]):.4g} ... "
            f"{float(alpha_bar[-1]):.4g} in "
            f"{len(alpha_bar)} rows) that is neither linear nor scaled_linear: this library has no such "
            "schedule"
        )
    for key in keys[1:]:
        other, rounding_too = _read_alpha_bar(file, key)
        near = TOLERANCE + 8 * (rounding + rounding_too)
        if other.shape != alpha_bar.shape or not torch.allclose(other, alpha_bar, rtol=near, atol=near):
            notes.append(
                f"{file.path.name} holds {key} of another noise schedule than {keys[0]}, which is the one "
                "that is used"
            )
    return keys[0], {name: value for name, value in schedule.items() if own.get(name, False) != value}


def write_table(schedule: Schedule, own: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table as latent diffusion's files hold it, {} for a schedule without one or one that
    `changed_schedule` would not recognise."""
    if not isinstance(schedule, DiscreteVP):
        return {}
    table = schedule.alpha_bar.float()
    if (known := _recognise(table.double(), own, torch.finfo(table.dtype).eps)) is None:
        return {}
    again = build_schedule(known)
    same = isinstance(again, DiscreteVP) and torch.allclose(
        again.alpha_bar, schedule.alpha_bar, rtol=1e-6, atol=1e-9
    )
    return {"alphas_cumprod": table} if same else {}


def _read_alpha_bar(file: TensorFile, key: str) -> tuple[Tensor, float]:
    """alpha_bar from a table, and the relative rounding error of its numbers."""
    stored = file.tensors[key]
    if len(stored.shape) != 1 or not 2 <= stored.shape[0] <= MAX_TRAINING_STEPS:
        raise ValueError(
            f"{file.path} holds {key} of shape {stored.shape}: a table has 2 ... {MAX_TRAINING_STEPS} noise "
            "levels"
        )
    values = torch.empty(stored.shape, dtype=torch.float64)
    stored.read_into(values)
    half = stored.dtype.is_floating_point and stored.dtype.itemsize <= 2
    return ALPHA_BARS[key](values), torch.finfo(stored.dtype if half else torch.float32).eps


def _recognise(alpha_bar: Tensor, own: Mapping[str, Any], rounding: float) -> dict[str, Any] | None:
    """The description of the schedule with this alpha_bar, None if there is none: equal up to rounding if
    possible, else up to float32's drift."""
    if not (alpha_bar.isfinite().all() and 0 <= alpha_bar.min() < alpha_bar[0] < 1 + rounding):
        return None
    tables: list[tuple[dict[str, Any], Tensor]] = []
    for schedule in _candidates(alpha_bar, own):
        try:
            built = build_schedule(schedule)
        except ValueError:  # betas that no table has
            continue
        if isinstance(built, DiscreteVP):
            if torch.allclose(built.alpha_bar, alpha_bar, rtol=rounding, atol=rounding * 1e-4):
                return schedule
            tables.append((schedule, built.alpha_bar))
    return next(
        (
            schedule
            for schedule, table in tables
            if torch.allclose(table, alpha_bar, rtol=TOLERANCE + rounding, atol=1e-6)
        ),
        None,
    )


def _candidates(alpha_bar: Tensor, own: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Schedules that a table may be: the family's, DDPM's, and the two kinds fitted to it, with and without
    zero terminal SNR."""
    zeros = (False,) if (last := float(alpha_bar[-1])) > 1e-6 else (False, True) if last else (True, False)
    for schedule in ({**own}, {"name": "linear", "start": 1e-4, "end": 0.02}):
        for zero in zeros:
            yield {**schedule, "steps": len(alpha_bar), "zero_terminal_snr": zero}
    fitted = {(name, zero): _fit_betas(alpha_bar, name, zero) for zero in zeros for name in BETAS}
    for digits in (*sorted(product(DIGITS, DIGITS), key=sum), (17, 17)):  # the fewest that will do
        for (name, zero), ends in fitted.items():
            start, end = (float(f"{beta:.{places}g}") for beta, places in zip(ends, digits, strict=True))
            yield {
                "name": name,
                "start": start,
                "end": end,
                "steps": len(alpha_bar),
                "zero_terminal_snr": zero,
            }


def _fit_betas(alpha_bar: Tensor, name: str, zero: bool) -> tuple[float, float]:
    """The first and the last beta whose table is nearest, in the sum of squares over sqrt(alpha_bar), by
    Gauss-Newton in their logarithms.

    Single betas in low precision are mostly rounding: all rows together say what the ends are.
    """
    ends = torch.tensor([1e-3, 1e-2], dtype=torch.float64).log()
    steps = 1e-5 * torch.eye(2, dtype=torch.float64)

    def root(logs: Tensor) -> Tensor:
        start, end = logs.exp().tolist()
        made = beta_tables.alpha_bar(BETAS[name](start, end, len(alpha_bar)))
        return (beta_tables.zero_terminal_snr(made) if zero else made).sqrt()

    for _ in range(30):
        slopes = torch.stack([(root(ends + step) - root(ends - step)) / 2e-5 for step in steps], dim=1)
        move = (
            torch.linalg.lstsq(slopes, (alpha_bar.sqrt() - root(ends))[:, None])
            .solution[:, 0]
            .nan_to_num()
            .clamp(-1, 1)
        )
        ends = (ends + move).clamp(math.log(1e-9), math.log(0.99))
        if float(move.abs().max()) < 1e-10:
            break
    start, end = ends.exp().tolist()
    return start, end
