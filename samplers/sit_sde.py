"""The SDE form of a flow model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffusion import BrownianPath, DenoiserLike, Grid, NoisePath
from samplers.solver import Step


def sit_sde(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, diffusion: float = 1.0, path: NoisePath | None = None
) -> Iterator[Step]:
    """SiT's SDE (Ma et al. 2024, eq. 9, w_r = diffusion * sigma) in flow time. Strong order 1.

    With x0 constant over a step, p = (r_s / r_t)^(diffusion / 2) and r = sigma / (alpha + sigma), x_s =
    alpha_s x0 + sigma_s (p eps + sqrt(1 - p^2) z): exact at both ends, where Euler-Maruyama needs a special
    last step. diffusion 0 is the ODE; their w = 2 r / (1 - r) ("SBDM") is `ddpm`.

    path  the Brownian path of each sample, in the clock r^-diffusion - 1; default: seeds 0 ... B-1
    """
    if not 0 <= diffusion < math.inf:
        raise ValueError(f"diffusion must be 0 or more, not {diffusion:g}")
    path = path or BrownianPath(range(len(x)))
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        r_t, r_s = t.flow_time, s.flow_time
        kept = (r_s / r_t) ** diffusion
        x = estimate.combine(s.alpha, s.sigma * math.sqrt(kept))
        if s.sigma * (1 - kept) > 0:
            new = path(x, r_t**-diffusion - 1, r_s**-diffusion - 1)
            x = torch.add(x, new, alpha=s.sigma * math.sqrt(1 - kept))
        yield Step(i, s, x, estimate)
