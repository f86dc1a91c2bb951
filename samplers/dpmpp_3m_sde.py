"""DPM-Solver++(3M) for the reverse SDE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import BrownianPath, DenoiserLike, Grid, NoisePath
from samplers.exponential import Node, check_eta, has_lambda, noisy_step, spread
from samplers.solver import Step


def dpmpp_3m_sde(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, eta: float = 1.0, path: NoisePath | None = None
) -> Iterator[Step]:
    """DPM++ 3M SDE (k-diffusion, on Lu et al. 2022b): x0 on the parabola through the last three estimates,
    with noise. Strong order 1.

    eta   0 is the ODE, at order 2 since it starts with a step of DDIM; 1 the reverse SDE, DDPM's in the limit
          of small steps
    path  the Brownian motion of each sample; default that of seeds 0 ... B-1
    The parabola's second derivative counts in full, as in `dpmpp_3m`.
    """
    check_eta(eta)
    path = path or BrownianPath(range(len(x)))
    nodes: list[Node] = []
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        nodes = [(t, estimate.x0), *nodes][:3] if has_lambda(t) else []
        x = noisy_step(
            x, t, s, spread(nodes, s) if nodes and has_lambda(s) else [(t, estimate.x0)], eta, path
        )
        yield Step(i, s, x, estimate)
