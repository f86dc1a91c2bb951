"""The likelihood of data under a model, by its probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion import NONE, Condition, DenoiserLike, Grid, NoiseLevel, initial_noise
from diffusion.noise import mix, require_seeds
from diffusion.spec import lookup
from samplers.coordinate import FLOW_TIME as C
from samplers.coordinate import runge_kutta_4
from samplers.sample import require_finite

_PROBE = 0x9B0BE  # makes a seed's probes independent of its noise
Divergence = Callable[[Tensor, Tensor], Tensor]
"""(u (B, D), du/dr (B, D) as a function of u) -> the trace of its Jacobian (B,)."""


def log_likelihood(
    denoiser: DenoiserLike,
    x0: Tensor,
    grid: Grid,
    *,
    trace: Literal["hutchinson", "exact"] = "hutchinson",
    seeds: Sequence[int] | None = None,
    probes: int = 1,
    condition: Condition = NONE,
) -> Tensor:
    """log p(x0) in nats, (B,), of images x0 (B, ...) (Chen et al. 2018; Song et al. 2021, section 4.3).

    In flow time u = x / n moves by du/dr = eps - x0, and its log density falls by the divergence of that:

        log p(x) = log N(u_1; 0, s^2) - D log n + integral of div(eps - x0) dr,  s the std at the first level

    Integrated by Runge-Kutta 4 on the grid. x0 stands for alpha x0 at the cleanest level with noise, so keep
    that level low. For images of 256 shades in [-1, 1], bits per dimension are 7 - log p / (D log 2), after
    dequantisation.

    trace   "exact": D backward passes a call; "hutchinson": one per probe, an unbiased estimate (Hutchinson
            1990; Grathwohl et al. 2019)
    seeds   of the probes, one per sample, constant along the path; default 0 ... B-1
    probes  the number of probes to average, >= 1

    FloatingPointError names the first level at which a sample is not finite.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("a likelihood needs derivatives: call it outside torch.inference_mode()")
    seeds = list(range(len(x0)) if seeds is None else seeds)
    require_seeds(seeds, x0)
    upwards = grid.reversed()
    x, b = upwards[0].alpha * x0, len(x0)
    lookup("trace", trace, {"exact": None, "hutchinson": None})
    divergence = _exact if trace == "exact" else _hutchinson(x, seeds, probes)

    def f(y: Tensor, level: NoiseLevel) -> Tensor:
        """d/dr of (u, the loss of log density)."""
        with torch.enable_grad():
            u = y[:, :-1].detach().requires_grad_()
            slope = C.slope(denoiser(C.norm(level) * u.view_as(x), level, condition)).flatten(1)
            lost = divergence(u, slope)
        return torch.cat([slope.detach(), lost[:, None]], 1)

    y = torch.cat([x.flatten(1) / C.norm(upwards[0]), x.new_zeros(b, 1)], 1)
    sums = []
    for t, s in pairwise(upwards):
        y = runge_kutta_4(f, y, f(y, t), t, s, grid)
        sums.append(y.sum(1, dtype=torch.float64))
    require_finite(torch.stack(sums), upwards, seeds)
    u, lost = y[:, :-1], y[:, -1]
    last, d = upwards[-1], u.shape[1]
    std = grid.initial_scale / C.norm(last)
    prior = -0.5 * (u / std).square().sum(1) - d * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return prior + lost + d * math.log(upwards[0].alpha / C.norm(upwards[0]))


def _exact(u: Tensor, slope: Tensor) -> Tensor:
    """The trace itself, one dimension at a time."""
    rows = (torch.autograd.grad(slope[:, i].sum(), u, retain_graph=True)[0][:, i] for i in range(u.shape[1]))
    return torch.stack(list(rows)).sum(0)


def _hutchinson(x: Tensor, seeds: Sequence[int], probes: int) -> Divergence:
    """E[v . J v] over random signs v, (probes, B, D)."""
    if probes < 1:
        raise ValueError(f"probes must be at least 1, not {probes}")
    own = [mix(seed, _PROBE) for seed in seeds]  # x may have been sampled from the seeds' own noise
    v = initial_noise(own, (probes, x[0].numel()), x.dtype, x.device).sign().transpose(0, 1)

    def divergence(u: Tensor, slope: Tensor) -> Tensor:
        gradients = (torch.autograd.grad(slope, u, probe, retain_graph=True)[0] for probe in v)
        products = [(gradient * probe).sum(1) for gradient, probe in zip(gradients, v, strict=True)]
        return torch.stack(products).mean(0)

    return divergence
