"""UniPC: a predictor, and a corrector that costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from diffusion import DenoiserLike, Grid, NoiseLevel
from samplers import exponential
from samplers.exponential import Node, has_lambda, midpoint
from samplers.solver import Step


def unipc(denoiser: DenoiserLike, x: Tensor, grid: Grid, *, order: int = 2) -> Iterator[Step]:
    """UniPC (Zhao et al. 2023, alg. 1-2, data prediction, B(h) = e^h - 1): each estimate first mends the step
    that led to it. Order 3.

    order  2 predicts by two estimates (`dpmpp_2m`) and corrects by three; 3 by three and four. Both start
           with single steps, which leave order 3 in all. Step.x is the prediction, which the next step
           corrects; one call a step.
    Steps from pure noise or to data have no finite lambda: there it is DDIM, uncorrected.
    """
    if order not in (2, 3) or order > max(2, grid.steps):
        raise ValueError(
            f"order must be 2 or 3, and at most the number of steps, not {order} on {grid.steps} steps"
        )
    nodes: list[Node] = []
    x_began = x
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        node = t, estimate.x0
        if nodes:
            x = exponential.step(
                x_began, nodes[0][0], t, [node, *nodes] if len(nodes) > 1 else [_mean(node, *nodes)]
            )
        nodes, x_began = [node, *nodes][:order] if has_lambda(t) else [], x
        x = exponential.step(x, t, s, _ahead(node, nodes, s) if has_lambda(s) else [node])
        yield Step(i, s, x, estimate)


def _ahead(node: Node, nodes: list[Node], s: NoiseLevel) -> list[Node]:
    """What the predictor goes by: one estimate held, two at the middle of the step, three as a parabola."""
    return nodes if len(nodes) == 3 else [midpoint(node, nodes[1] if len(nodes) == 2 else None, s)]


def _mean(a: Node, b: Node) -> Node:
    """The first corrector has two estimates, and holds their mean."""
    return a[0], (a[1] + b[1]) / 2
