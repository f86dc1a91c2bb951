"""DPM-Solver++(2M) for the reverse SDE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import BrownianPath, DenoiserLike, Grid, NoisePath
from samplers import exponential
from samplers.exponential import Node, check_eta, midpoint
from samplers.solver import Step


def dpmpp_2m_sde(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, eta: float = 1.0, path: NoisePath | None = None
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, app. A): `dpmpp_2m` with noise. Strong order 1.

    In k-diffusion's midpoint form.

    eta   0 is the ODE, which is `dpmpp_2m`; 1 is the reverse SDE, DDPM's in the limit of small steps
    path  the Brownian path of each sample; default: seeds 0 ... B-1
    """
    check_eta(eta)
    path, last = path or BrownianPath(range(len(x))), None
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        node: Node = t, estimate.x0
        x = exponential.noisy_step(x, t, s, [midpoint(node, last, s)], eta, path)
        last = node
        yield Step(i, s, x, estimate)
