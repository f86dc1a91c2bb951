"""DPM-Solver++ for the reverse SDE, one look ahead per step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import BrownianPath, DenoiserLike, Grid, NoisePath
from samplers.exponential import check_eta, halfway, has_lambda, noisy_step
from samplers.solver import Step


def dpmpp_sde(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, eta: float = 1.0, path: NoisePath | None = None
) -> Iterator[Step]:
    """DPM++ SDE (k-diffusion, on Lu et al. 2022b): `dpmpp_2s` with noise. Strong order 1.

    eta   0 is the ODE, which is `dpmpp_2s`; 1 is the reverse SDE, DDPM's in the limit of small steps
    path  the Brownian path of each sample, also to the midpoint; default: seeds 0 ... B-1

    Two calls a step; steps from pure noise or to data have no midpoint: one call.
    """
    check_eta(eta)
    path = path or BrownianPath(range(len(x)))
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        node = t, estimate.x0
        if has_lambda(t) and has_lambda(s):
            middle = grid.between(halfway(t, s))
            node = middle, denoiser(noisy_step(x, t, middle, [node], eta, path), middle).x0
        x = noisy_step(x, t, s, [node], eta, path)
        yield Step(i, s, x, estimate)
