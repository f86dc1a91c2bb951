"""UniPC: a predictor, and a corrector that needs no extra call."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid, NoiseLevel
from samplers import exponential
from samplers.exponential import Node, has_lambda, midpoint
from samplers.solver import Step


def unipc(denoiser: DenoiserLike, x: Tensor, grid: Grid, *, order: int = 2) -> Iterator[Step]:
    """UniPC (Zhao et al. 2023, alg. 1-2): each new estimate first corrects the last step. Order 3.

    With data prediction and B(h) = e^h - 1; one call a step.

    order  2 predicts from two estimates (`dpmpp_2m`) and corrects with three; 3 uses three and four. Both
           start with single steps, so that the whole is of order 3. Step.x is the prediction, before its
           correction

    Steps from pure noise or to data are DDIM, without correction.
    """
    if order not in (2, 3) or order > max(2, grid.steps):
        raise ValueError(f"order must be 2 or 3 and at most the steps, not {order} on {grid.steps} steps")
    nodes: list[Node] = []
    x_start = x
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        node = t, estimate.x0
        if nodes:
            corrector = [node, *nodes] if len(nodes) > 1 else [_mean(node, *nodes)]
            x = exponential.step(x_start, nodes[0][0], t, corrector)
        nodes, x_start = [node, *nodes][:order] if has_lambda(t) else [], x
        x = exponential.step(x, t, s, _ahead(node, nodes, s) if has_lambda(s) else [node])
        yield Step(i, s, x, estimate)


def _ahead(node: Node, nodes: list[Node], s: NoiseLevel) -> list[Node]:
    """The predictor's nodes: one is constant, two give the midpoint of a line, three a parabola."""
    return nodes if len(nodes) == 3 else [midpoint(node, nodes[1] if len(nodes) == 2 else None, s)]


def _mean(a: Node, b: Node) -> Node:
    """The first corrector uses the mean of its two estimates."""
    return a[0], (a[1] + b[1]) / 2
