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
    """DPM++ 3M SDE (k-diffusion): x0 on the parabola of the last three estimates, with noise. Strong order 1.

    eta   0 is the ODE, at order 2 because it starts with a DDIM step; 1 is the reverse SDE, DDPM's in the
          limit of small steps
    path  the Brownian path of each sample; default: seeds 0 ... B-1

    On Lu et al. 2022b. The parabola's second derivative is the full one, as in `dpmpp_3m`.
    """
    check_eta(eta)
    path = path or BrownianPath(range(len(x)))
    nodes: list[Node] = []
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        node = t, estimate.x0
        nodes = [node, *nodes][:3] if has_lambda(t) else []
        x = noisy_step(x, t, s, spread(nodes, s) if nodes and has_lambda(s) else [node], eta, path)
        yield Step(i, s, x, estimate)
