"""Spacings: where the levels of a grid lie. (schedule, steps, t_start, t_end) -> times, noisiest first;
`time_grid` appends data itself.

A spacing is even in something: in t (linspace, trailing, leading, sgm_uniform, simple), in a function of the
noise (karras, log_snr), in a distribution (beta); or it is a curve or a table of its own (linear_quadratic,
align_your_steps). ComfyUI's "normal" is linspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffusion.betas import MAX_TRAINING_STEPS
from diffusion.quantile import beta_quantile
from diffusion.schedule import Schedule
from diffusion.spec import lookup

MIN_STRIDE = 1e-6  # of turbo spacing, as a share of the schedule's time
RHO = (
    0.01,
    1000.0,
    # of karras spacing: (sigma/alpha)^(1/rho) is a float at one end, and not yet the same for all noise at
    # the other
)
MIN_SHAPE = 0.001  # of a Beta distribution: below, quantiles are 0 and 1 alone
MAX_MU = 10.0  # of mu_shift: a shift by e^10; published ones have up to 1.15


# Even in t --------------------------------------------------------------------------------------------------


def linspace(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Equal steps in t with both ends on the grid. Where t_end is data, it is the terminal row (as every flow
    sampler has it)."""
    if float(schedule.sigma(t_end)) == 0:
        return _line(t_start, t_end, steps + 1)[:-1]
    return _line(t_start, t_end, steps)


def trailing(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Equal steps in t from t_start down to data, which is the terminal row (Lin et al. 2024, table 2)."""
    if t_end != schedule.t_min:
        raise ValueError(
            "trailing spacing always ends one stride above data: leave t_end out, or use 'linspace'"
        )
    return _line(t_start, schedule.t_data, steps + 1)[:-1]


def leading(schedule: Schedule, steps: int, t_start: float, t_end: float, offset: float = 0.0) -> Tensor:
    """Equal steps in t up from t_end + offset; the noisiest time is never visited (DDIM; SD 1 and 2 with
    offset 1).

    The stride is the whole number N // steps on a table of N rows, (t_start - t_end) / steps elsewhere.
    """
    stride = (t_start - t_end) / steps if schedule.rows is None else (t_start - t_end + 1) // steps
    t = t_end + offset + stride * torch.arange(steps - 1, -1, -1, dtype=torch.float64, device="cpu")
    if t[0] > t_start:
        raise ValueError(
            f"leading spacing with offset={offset:g} would start at t={t[0]:g}, above {t_start:g}: use "
            "fewer steps or offset=0"
        )
    if float(schedule.sigma(t[-1])) == 0:
        raise ValueError(
            "leading spacing would call the network on clean data here: use 'trailing', or give t_end or "
            "offset > 0"
        )
    return t


def sgm_uniform(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Equal steps in t from t_start to t_end, in place of which data is the terminal row (generative-models;
    ComfyUI).

    On a flow that is linspace. generative-models cuts the times off to whole rows, ComfyUI and we keep them;
    ComfyUI's flows end at t_end=0.001.
    """
    return _line(t_start, t_end, steps + 1)[:-1]


def simple(schedule: Schedule, steps: int, t_start: float, t_end: float) -> Tensor:
    """Every (N / steps)-th row of a table of N noise levels, from the noisiest, rounded towards it (ComfyUI).

    A continuous schedule is first cut into N = 1000 rows, as there: evenly in t where t begins at data
    (flows), in log sigma where training stops short of data (EDM).
    """
    _require_whole_range(schedule, t_start, t_end, "simple")
    rows = 1000 if schedule.rows is None else schedule.rows
    row = torch.tensor(
        [rows - 1 - i * rows // steps for i in range(steps)], dtype=torch.float64, device="cpu"
    )
    if schedule.rows is not None:
        return row
    if schedule.t_min == schedule.t_data:
        return t_start * (row + 1) / rows
    low, high = _ratio_ends(schedule, t_start, t_end, "simple")
    return schedule.t_from_ratio(low * (high / low) ** (row / (rows - 1)))


def lcm(schedule: Schedule, steps: int, t_start: float, t_end: float, taught: int = 50) -> Tensor:
    """Of the `taught` times a latent consistency model was distilled on, even steps up from data, `steps`
    ones evenly from the noisiest.

    On a table of 1000 rows these are 19, 39, ... 999 (Luo et al. 2023, and diffusers). The noisiest is the
    last one up to t_start.
    """
    if t_end != schedule.t_min:
        raise ValueError("lcm spacing always ends one step above data: leave t_end out")
    if not 1 <= taught <= MAX_TRAINING_STEPS:
        raise ValueError(f"taught of lcm spacing must be 1 to {MAX_TRAINING_STEPS}, not {taught}")
    span, most = schedule.t_max - schedule.t_data, _lcm_room(schedule, t_start, t_end, taught)
    if steps > most:
        raise ValueError(
            f"lcm spacing has {most} times to choose from: take at most so many steps, or a greater "
            f"taught=..., not {steps}"
        )
    k = torch.tensor([most - i * most // steps for i in range(steps)], dtype=torch.float64, device="cpu")
    return schedule.t_data + span * k / taught


def _lcm_room(schedule: Schedule, t_start: float, t_end: float, taught: int = 50) -> int:
    return max(
        1, math.floor(taught * (t_start - schedule.t_data) / (schedule.t_max - schedule.t_data) + 1e-9)
    )


def turbo(schedule: Schedule, steps: int, t_start: float, t_end: float, stride: float = 0.1) -> Tensor:
    """From t_start in steps of the share `stride` of the schedule's time: few steps stay in much noise, and
    the last goes all the way.

    For networks distilled adversarially (Sauer et al. 2023: SD-Turbo and SDXL-Turbo at 999, 899, 799, 699 of
    1000 rows).
    """
    if not MIN_STRIDE <= stride <= 1:
        raise ValueError(
            f"stride of turbo spacing must lie in [{MIN_STRIDE:g}, 1], a share of the schedule's time, not "
            f"{stride:g}"
        )
    t = t_start - stride * (schedule.t_max - schedule.t_data) * torch.arange(
        steps, dtype=torch.float64, device="cpu"
    )
    if t[-1] < t_end or float(schedule.sigma(max(float(t[-1]), t_end))) == 0:
        raise ValueError(
            f"turbo spacing of {steps} steps with stride={stride:g} ends at t={t[-1]:g}: it must stay above "
            f"data, {t_end:g}"
        )
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
    """Equal steps in log-SNR (Lu et al. 2022), which are equal steps in log sigma: k-diffusion's
    "exponential" too."""
    low, high = _ratio_ends(schedule, t_start, t_end, "log_snr")
    return schedule.t_from_ratio(_line(math.log(high), math.log(low), steps).exp())


# Even in a distribution, or a curve of its own --------------------------------------------------------------


def beta(
    schedule: Schedule, steps: int, t_start: float, t_end: float, alpha: float = 0.6, beta: float = 0.6
) -> Tensor:
    """Quantiles 1, 1 - 1/steps, ..., 1/steps of a Beta(alpha, beta) distribution of t between t_end and
    t_start (Lee et al. 2024).

    Shapes below 1 crowd the steps at both ends, alpha < 1 near data and beta < 1 near noise; alpha = beta = 1
    is sgm_uniform. Both lie in [0.001, 100]. On a table, whole=True gives ComfyUI's rows; a row that would
    come twice, which it drops, is an error here.
    """
    if not (MIN_SHAPE <= alpha <= 100 and MIN_SHAPE <= beta <= 100):
        raise ValueError(
            f"alpha and beta of beta spacing must lie in [{MIN_SHAPE:g}, 100], not {alpha:g} and {beta:g}"
        )
    return t_end + (t_start - t_end) * beta_quantile(_line(1, 0, steps + 1)[:-1], alpha, beta)


def linear_quadratic(
    schedule: Schedule,
    steps: int,
    t_start: float,
    t_end: float,
    threshold: float = 0.025,
    linear_steps: int | None = None,
) -> Tensor:
    """Mochi's: small equal steps while most is noise, then steps that grow evenly (Genmo 2024). By default
    half are small.

    With L = linear_steps and n = steps, level i keeps the share 1 - x_i of the flow time sigma/(alpha+sigma)
    at t_start,

        x_i = threshold i/L + (1 - threshold n/L) (max(i - L, 0) / (n - L))^2,

    one line to x_L = threshold and from there, smoothly, a parabola to x_n = 1, which is data.
    """
    if t_end != schedule.t_min:
        raise ValueError("linear_quadratic spacing always ends one step above data: leave t_end out")
    if linear_steps is not None and not 1 <= linear_steps < steps:
        raise ValueError(
            "linear_steps must leave a step for the parabola, so lie between 1 and steps - 1 = "
            f"{steps - 1}, not {linear_steps}"
        )
    linear = linear_steps or max(1, steps // 2)
    if (
        not 0 < threshold < 2 * linear / (steps + linear)
    ):  # beyond, the parabola would overshoot data and come back
        raise ValueError(
            f"threshold must lie between 0 and 2 L / (steps + L) = {2 * linear / (steps + linear):.3g} for "
            f"L = {linear} linear steps "
            f"of {steps}, not {threshold:g}"
        )
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    bend = (i - linear).clamp(min=0) / max(steps - linear, 1)
    x = threshold * i / linear + (1 - threshold * steps / linear) * bend**2
    return schedule.t_from_ratio(
        (1 - x) / (x + 1 / schedule.ratio(t_start))
    )  # r / (1 - r) at r = (1 - x) r_start, finite or not


# Noise levels sigma/alpha of 10 steps as published at
# research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html. The last is each model's own least noise.
ALIGN_YOUR_STEPS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(
    schedule: Schedule, steps: int, t_start: float, t_end: float, table: str | None = None
) -> Tensor:
    """Levels optimised for one model in 10 steps, as a table of sigma/alpha (Sabour et al. 2024); tables:
    sd1, sdxl, svd.

    Which table a published model has, `Model.grid` knows. Other numbers of steps interpolate log sigma
    linearly between its 11 entries, as the authors do. Any schedule has these levels that has the first one:
    SD's own to the table's three decimals, VarianceExploding(0.002, 700) the one of svd, every flow.
    """
    _require_whole_range(schedule, t_start, t_end, "align_your_steps")
    if table is None:
        raise ValueError(
            "align_your_steps has a table for each model it was fitted to: give "
            f"table={' | '.join(ALIGN_YOUR_STEPS)}"
        )
    log_sigma = np.log(lookup("table of align_your_steps", table, ALIGN_YOUR_STEPS))
    sigma = torch.from_numpy(np.interp(np.linspace(0, 10, steps + 1)[:-1], range(11), log_sigma)).exp()
    noisiest = float(schedule.ratio(t_start))
    if sigma[0] > 1.001 * noisiest:
        raise ValueError(
            f"the table {table!r} of align_your_steps starts at sigma/alpha {sigma[0]:g}, but this schedule "
            "has no more noise than "
            f"{noisiest:g}: use another table or spacing"
        )
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
    """A shift that depends on the resolution (FLUX.1): linspace with sigma/alpha multiplied by e^mu, by
    default `flux_mu` of the image.

    tokens  of the image; line: two numbers of tokens, each with its mu, which are a family's own

    Any spacing takes a constant factor as `time_grid(..., shift=factor)`: SD3's 3.0, diffusers'
    time_shift_type="linear".
    """
    if tokens < 1:
        raise ValueError(f"tokens of mu_shift spacing, those of an image, must be at least 1, not {tokens}")
    mu = flux_mu(tokens, line) if mu is None else mu
    if not -MAX_MU <= mu <= MAX_MU:
        raise ValueError(
            f"mu_shift multiplies sigma/alpha by e^mu, and mu must lie in [-{MAX_MU:g}, {MAX_MU:g}], not "
            f"{mu:g}"
        )
    return schedule.shift_t(linspace(schedule, steps, t_start, t_end), math.exp(mu))


def flux_mu(tokens: int, line: Line = FLUX_LINE) -> float:
    """mu for an image of that many tokens: on the line through two, FLUX.1's 256 -> 0.5 and 4096 (1024^2
    pixels) -> 1.15."""
    few, least, many, most = line
    if not few < many:
        raise ValueError(
            f"line of mu_shift spacing goes from few tokens to many, not from {few:g} to {many:g}"
        )
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

# Spacings of networks distilled to few steps, and how many steps there is room for between two times.
# Published image to image takes all its steps from where it begins, not a share of them: the times do not
# fall evenly to data (turbo), or no others were taught (lcm).
FEW_STEPS: dict[str, Callable[..., int]] = {"turbo": _turbo_room, "lcm": _lcm_room}


def _line(high: float, low: float, steps: int) -> Tensor:
    return torch.linspace(high, low, steps, dtype=torch.float64, device="cpu")


def _ratio_ends(schedule: Schedule, t_start: float, t_end: float, name: str) -> tuple[float, float]:
    low, high = float(schedule.ratio(t_end)), float(schedule.ratio(t_start))
    if low == 0 or math.isinf(high):
        raise ValueError(
            f"{name} spacing needs a finite sigma/alpha at both ends, but it is {high:g} at t={t_start:g} "
            f"and {low:g} at "
            f"t={t_end:g}: give t_start and t_end inside the schedule, e.g. t_start=0.999, t_end=0.001 for "
            "a flow"
        )
    return low, high


def _require_whole_range(schedule: Schedule, t_start: float, t_end: float, name: str) -> None:
    if (t_start, t_end) != (schedule.t_max, schedule.t_min):
        raise ValueError(
            f"{name} spacing takes its levels from a table: leave t_start and t_end out, and cut the grid "
            "itself, as in grid[3:]"
        )
