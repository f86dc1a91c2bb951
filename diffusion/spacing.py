"""Spacings place the levels of a grid: (schedule, steps, t_start, t_end) -> times, noisiest first.

They are even in t (linspace, trailing, leading, sgm_uniform, simple), in a function of the noise (karras,
log_snr) or in a distribution (beta), or follow a curve or table (linear_quadratic, align_your_steps).
ComfyUI's "normal" is linspace. `time_grid` appends data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.betas import MAX_TRAINING_STEPS
from diffusion.quantile import beta_quantile
from diffusion.schedule import Schedule
from diffusion.spec import lookup

MIN_STRIDE = 1e-6  # of turbo, as a share of the schedule's time
RHO = 0.01, 1000.0  # of karras: within, (sigma/alpha)^(1/rho) neither overflows nor is the same for all noise
MIN_SHAPE = 0.001  # of beta: below, all quantiles are 0 or 1
MAX_MU = 10.0  # of mu_shift; published values go up to 1.15


# Even in t --------------------------------------------------------------------------------------------------


def linspace(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Equal steps in t, both ends included. If t_end is data, it is the terminal row (flow samplers)."""
    if float(schedule.sigma(t_end)) == 0:
        return _line(t_start, t_end, steps + 1)[:-1]
    return _line(t_start, t_end, steps)


def trailing(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Equal steps in t from t_start down to data, which is the terminal row (Lin et al. 2024, table 2)."""
    if t_end != schedule.t_min:
        raise ValueError("trailing spacing ends one stride above data: leave t_end out, or use 'linspace'")
    return _line(t_start, schedule.t_data, steps + 1)[:-1]


def leading(schedule: Schedule, steps: int, t_start: float, t_end: float, offset: float = 0.0) -> Tensor:
    """Equal steps in t up from t_end + offset, without t_start (DDIM; SD 1 and 2 with offset 1).

    The stride is N // steps on a table of N rows, (t_start - t_end) / steps elsewhere.
    """
    stride = (t_start - t_end) / steps if schedule.rows is None else (t_start - t_end + 1) // steps
    t = t_end + offset + stride * torch.arange(steps - 1, -1, -1, dtype=torch.float64, device="cpu")
    if t[0] > t_start:
        start = f"with offset={offset:g} would start at t={t[0]:g}, above {t_start:g}"
        raise ValueError(f"leading spacing {start}: use fewer steps or offset=0")
    if float(schedule.sigma(t[-1])) == 0:
        raise ValueError("leading spacing would end on clean data: use 'trailing', or t_end or offset > 0")
    return t


def sgm_uniform(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Equal steps in t from t_start to t_end, with data in place of t_end (generative-models; ComfyUI).

    On a flow this is linspace. generative-models truncates times to whole rows; ComfyUI and we do not.
    ComfyUI's flows end at t_end=0.001.
    """
    return _line(t_start, t_end, steps + 1)[:-1]


def simple(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Every (N / steps)-th row of a table of N noise levels, from the noisiest, rounded towards it (ComfyUI).

    A continuous schedule is first cut into N = 1000 rows, as in ComfyUI: evenly in t if t begins at data
    (flows), in log sigma if training stops short of data (EDM).
    """
    _require_whole_range(schedule, t_start, t_end, "simple")
    rows = 1000 if schedule.rows is None else schedule.rows
    row = _float64([rows - 1 - i * rows // steps for i in range(steps)])
    if schedule.rows is not None:
        return row
    if schedule.t_min == schedule.t_data:
        return t_start * (row + 1) / rows
    low, high = _ratio_ends(schedule, t_start, t_end, "simple")
    return schedule.t_from_ratio(low * (high / low) ** (row / (rows - 1)))


def lcm(schedule: Schedule, steps: int, t_start: float, t_end: float, taught: int = 50) -> Tensor:
    """`steps` of the `taught` times that a consistency model was distilled on, evenly from the noisiest.

    On a table of 1000 rows the taught times are 19, 39, ... 999 (Luo et al. 2023, and diffusers). The
    noisiest is the last one up to t_start.
    """
    if t_end != schedule.t_min:
        raise ValueError("lcm spacing ends one step above data: leave t_end out")
    if not 1 <= taught <= MAX_TRAINING_STEPS:
        raise ValueError(f"taught of lcm spacing must be 1 to {MAX_TRAINING_STEPS}, not {taught}")
    span, most = schedule.t_max - schedule.t_data, _lcm_room(schedule, t_start, t_end, taught)
    if steps > most:
        raise ValueError(f"lcm spacing has {most} times, not {steps}: use fewer steps, or a greater taught")
    return schedule.t_data + span * _float64([most - i * most // steps for i in range(steps)]) / taught


def _lcm_room(schedule: Schedule, t_start: float, t_end: float, taught: int = 50) -> int:
    share = (t_start - schedule.t_data) / (schedule.t_max - schedule.t_data)
    return max(1, math.floor(taught * share + 1e-9))


def turbo(schedule: Schedule, steps: int, t_start: float, t_end: float, stride: float = 0.1) -> Tensor:
    """Steps of the share `stride` of the schedule's time down from t_start; the last one goes to data.

    For networks distilled adversarially, which stay in much noise (Sauer et al. 2023: SD-Turbo and SDXL-Turbo
    use 999, 899, 799, 699 of 1000 rows).
    """
    if not MIN_STRIDE <= stride <= 1:
        limits = f"[{MIN_STRIDE:g}, 1], a share of the schedule's time"
        raise ValueError(f"stride of turbo spacing must lie in {limits}, not {stride:g}")
    t = t_start - stride * (schedule.t_max - schedule.t_data) * _float64(range(steps))
    if t[-1] < t_end or float(schedule.sigma(max(float(t[-1]), t_end))) == 0:
        end = f"{steps} steps with stride={stride:g} ends at t={t[-1]:g}"
        raise ValueError(f"turbo spacing of {end}: it must stay above data, {t_end:g}")
    return t


def _turbo_room(schedule: Schedule, t_start: float, t_end: float, stride: float = 0.1) -> int:
    return max(1, math.ceil((t_start - t_end) / (stride * (schedule.t_max - schedule.t_data)) - 1e-9))


# Even in the noise ------------------------------------------------------------------------------------------


def karras(schedule: Schedule, steps: int, t_start: float, t_end: float, rho: float = 7.0) -> Tensor:
    """Equal steps in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5)."""
    if not RHO[0] <= rho <= RHO[1]:
        raise ValueError(f"rho of karras spacing must lie in [{RHO[0]:g}, {RHO[1]:g}], not {rho:g}")
    low, high = _ratio_ends(schedule, t_start, t_end, "karras")
    return schedule.t_from_ratio(_line(high ** (1 / rho), low ** (1 / rho), steps) ** rho)


def log_snr(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Equal steps in log-SNR, and so in log sigma (Lu et al. 2022; k-diffusion's "exponential")."""
    low, high = _ratio_ends(schedule, t_start, t_end, "log_snr")
    return schedule.t_from_ratio(_line(math.log(high), math.log(low), steps).exp())


# Even in a distribution, or a curve of its own --------------------------------------------------------------


def beta(
    schedule: Schedule, steps: int, t_start: float, t_end: float, alpha: float = 0.6, beta: float = 0.6
) -> Tensor:
    """Quantiles 1, 1 - 1/steps, ..., 1/steps of Beta(alpha, beta) from t_end to t_start (Lee et al. 2024).

    Parameters below 1 crowd the steps at the ends, alpha < 1 near data and beta < 1 near noise; alpha = beta
    = 1 is sgm_uniform. Both are in [0.001, 100]. On a table, whole=True gives ComfyUI's rows; a repeated row,
    which ComfyUI drops, is an error here.
    """
    if not (MIN_SHAPE <= alpha <= 100 and MIN_SHAPE <= beta <= 100):
        limits = f"[{MIN_SHAPE:g}, 100], not {alpha:g} and {beta:g}"
        raise ValueError(f"alpha and beta of beta spacing must lie in {limits}")
    return t_end + (t_start - t_end) * beta_quantile(_line(1, 0, steps + 1)[:-1], alpha, beta)


def linear_quadratic(
    schedule: Schedule,
    steps: int,
    t_start: float,
    t_end: float,
    threshold: float = 0.025,
    linear_steps: int | None = None,
) -> Tensor:
    """Mochi's (Genmo 2024): small equal steps at high noise, by default half of all, then growing ones.

    With L = linear_steps and n = steps, level i has the share 1 - x_i of the flow time sigma/(alpha+sigma) at
    t_start,

        x_i = threshold i/L + (1 - threshold n/L) (max(i - L, 0) / (n - L))^2,

    a line to x_L = threshold, and from there a parabola with the same slope to x_n = 1, which is data.
    """
    if t_end != schedule.t_min:
        raise ValueError("linear_quadratic spacing ends one step above data: leave t_end out")
    if linear_steps is not None and not 1 <= linear_steps < steps:
        raise ValueError(f"linear_steps must lie between 1 and steps - 1 = {steps - 1}, not {linear_steps}")
    linear = linear_steps or max(1, steps // 2)
    most = 2 * linear / (steps + linear)  # beyond, the parabola would overshoot data and come back
    if not 0 < threshold < most:
        parts = f"L = {linear} linear steps of {steps}, not {threshold:g}"
        raise ValueError(f"threshold must lie between 0 and 2 L / (steps + L) = {most:.3g} for {parts}")
    i = _float64(range(steps))
    bend = (i - linear).clamp(min=0) / max(steps - linear, 1)
    x = threshold * i / linear + (1 - threshold * steps / linear) * bend**2
    # r / (1 - r) at r = (1 - x) r_start, finite or not
    return schedule.t_from_ratio((1 - x) / (x + 1 / schedule.ratio(t_start)))


# sigma/alpha of 10 steps, from research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html; the last is the
# model's least noise.
ALIGN_YOUR_STEPS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(
    schedule: Schedule, steps: int, t_start: float, t_end: float, table: str | None = None
) -> Tensor:
    """Levels optimised per model for 10 steps, a table (Sabour et al. 2024): sd1, sdxl, svd.

    `Model.grid` knows the table of a published model. For other numbers of steps, log sigma is interpolated
    linearly between the 11 entries, as the authors do. The schedule must reach the table's first level: SD's
    does to three decimals, VarianceExploding(0.002, 700) does for svd, every flow does.
    """
    _require_whole_range(schedule, t_start, t_end, "align_your_steps")
    if table is None:
        raise ValueError(f"align_your_steps has a table per model: give table={' | '.join(ALIGN_YOUR_STEPS)}")
    log_sigma = np.log(lookup("table of align_your_steps", table, ALIGN_YOUR_STEPS))
    sigma = torch.from_numpy(np.interp(np.linspace(0, 10, steps + 1)[:-1], range(11), log_sigma)).exp()
    noisiest = float(schedule.ratio(t_start))
    if sigma[0] > 1.001 * noisiest:
        starts = f"starts at sigma/alpha {sigma[0]:g}, but this schedule at {noisiest:g}"
        raise ValueError(f"the table {table!r} of align_your_steps {starts}: use another table or spacing")
    return schedule.t_from_ratio(sigma.clamp(max=noisiest))  # 14.615 is SD's 14.6146, rounded up


# Shifts -----------------------------------------------------------------------------------------------------


Line = tuple[float, float, float, float]
FLUX_LINE: Line = (256, 0.5, 4096, 1.15)


def mu_shift(
    schedule: Schedule,
    steps: int,
    t_start: float,
    t_end: float,
    mu: float | None = None,
    tokens: int = 4096,
    line: Line = FLUX_LINE,
) -> Tensor:
    """FLUX.1's shift for the resolution: linspace with sigma/alpha multiplied by e^mu, default `flux_mu`.

    tokens  of the image; line: two numbers of tokens, each with its mu, which belong to the family

    Any spacing takes a constant factor as `time_grid(..., shift=factor)`: SD3's 3.0, diffusers'
    time_shift_type="linear".
    """
    if tokens < 1:
        raise ValueError(f"tokens of mu_shift spacing must be at least 1, not {tokens}")
    mu = flux_mu(tokens, line) if mu is None else mu
    if not -MAX_MU <= mu <= MAX_MU:
        raise ValueError(f"mu of mu_shift spacing must lie in [-{MAX_MU:g}, {MAX_MU:g}], not {mu:g}")
    return schedule.shift_t(linspace(schedule, steps, t_start, t_end), math.exp(mu))


def flux_mu(tokens: int, line: Line = FLUX_LINE) -> float:
    """mu for an image of that many tokens, on a line; FLUX.1's: 256 -> 0.5, 4096 (1024^2 pixels) -> 1.15."""
    few, least, many, most = line
    if not few < many:
        raise ValueError(f"line of mu_shift spacing goes from few tokens to many, not {few:g} to {many:g}")
    return least + (tokens - few) * (most - least) / (many - few)


SPACINGS: dict[str, Callable[..., Tensor]] = {
    "linspace": linspace,
    "trailing": trailing,
    "leading": leading,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "lcm": lcm,
    "turbo": turbo,
    "karras": karras,
    "exponential": log_snr,
    "log_snr": log_snr,
    "beta": beta,
    "linear_quadratic": linear_quadratic,
    "align_your_steps": align_your_steps,
    "mu_shift": mu_shift,
}

# Spacings of networks distilled to few steps, and the number of steps that fit between two times. Published
# image to image takes all its steps from its start, not a share of them: the times do not fall evenly to data
# (turbo), or no others were taught (lcm).
FEW_STEPS: dict[str, Callable[..., int]] = {"turbo": _turbo_room, "lcm": _lcm_room}


def _float64(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64, device="cpu")


def _line(high: float, low: float, steps: int) -> Tensor:
    return torch.linspace(high, low, steps, dtype=torch.float64, device="cpu")


def _ratio_ends(schedule: Schedule, t_start: float, t_end: float, name: str) -> tuple[float, float]:
    low, high = float(schedule.ratio(t_end)), float(schedule.ratio(t_start))
    if low == 0 or math.isinf(high):
        raise ValueError(
            f"{name} spacing needs a finite sigma/alpha at both ends, not {high:g} at t={t_start:g} and "
            f"{low:g} at t={t_end:g}: give times within, e.g. t_start=0.999, t_end=0.001 for a flow"
        )
    return low, high


def _require_whole_range(schedule: Schedule, t_start: float, t_end: float, name: str) -> None:
    if (t_start, t_end) != (schedule.t_max, schedule.t_min):
        advice = "leave t_start and t_end out, and cut the grid itself, as in grid[3:]"
        raise ValueError(f"{name} spacing takes its levels from a table: {advice}")
