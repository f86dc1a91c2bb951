"""Exponential integrators in lambda = log(alpha / sigma), exact for x0 polynomial in lambda (Lu et al. 2022b;
Zhao et al. 2023).

With h = lambda_s - lambda_t, H = (1 + eta) h and v running from 0 at t to 1 at s,

    x_s = sigma_s/sigma_t e^{-eta h} x_t + alpha_s integral_0^1 H e^{-H (1 - v)} x0(v) dv + sigma_s sqrt(1 -
    e^{-2 eta h}) z

solves the ODE at eta = 0 and the reverse SDE at eta = 1. With x0 held it is DDIM at eta = 0 and DDPM at eta =
1, at both ends of every schedule; with x0 of higher degree lambda must be finite at t, at s and wherever an
estimate was made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion import NoiseLevel, NoisePath, decay
from diffusion.level import linear

Node = tuple[NoiseLevel, Tensor]
"""An estimate of x0 and the level it was made at."""


def has_lambda(level: NoiseLevel) -> bool:
    """Whether lambda is finite: neither pure noise nor data."""
    return level.alpha > 0 and level.sigma > 0


def step(x: Tensor, t: NoiseLevel, s: NoiseLevel, nodes: Sequence[Node], eta: float = 0.0) -> Tensor:
    """x_s, or its mean where eta > 0, for the x0 that runs through all nodes: one is held, two are a line,
    three a parabola, ..."""
    kept = s.sigma / t.sigma * (float(decay(t, s)) ** eta if eta > 0 else 1.0)
    if len(nodes) == 1:
        return linear(kept, s.alpha - kept * t.alpha, x, nodes[0][1])
    weights = _weights(t, s, [level for level, _ in nodes], eta)
    x = linear(kept, s.alpha * weights[0], x, nodes[0][1])
    for weight, (_, x0) in zip(weights[1:], nodes[1:], strict=True):
        x = torch.add(x, x0, alpha=s.alpha * weight)
    return x


def noisy_step(
    x: Tensor, t: NoiseLevel, s: NoiseLevel, nodes: Sequence[Node], eta: float, path: NoisePath
) -> Tensor:
    """x_s with the noise of the SDE, which is the increment of a Brownian motion in the clock (alpha /
    sigma)^(2 eta)."""
    mean, new = step(x, t, s, nodes, eta), 1 - float(decay(t, s)) ** (2 * eta) if eta > 0 else 0.0
    if s.sigma * new == 0:
        return mean
    return torch.add(
        mean, path(x, t.ratio ** (-2 * eta), s.ratio ** (-2 * eta)), alpha=s.sigma * math.sqrt(new)
    )


def halfway(t: NoiseLevel, s: NoiseLevel) -> float:
    """sigma / alpha in the middle of a step in lambda."""
    return math.sqrt(t.ratio * s.ratio)


def spread(nodes: Sequence[Node], s: NoiseLevel) -> list[Node]:
    """Those of the nodes, newest first, that lie at least a quarter of the coming step from the one kept
    before.

    A parabola through nearer ones, followed for the whole step, would magnify every error of the network many
    times.
    """
    kept = [nodes[0]]
    h = s.half_log_snr - nodes[0][0].half_log_snr
    for node in nodes[1:]:
        if abs(kept[-1][0].half_log_snr - node[0].half_log_snr) >= abs(h) / 4:
            kept.append(node)
    return kept


def midpoint(node: Node, last: Node | None, s: NoiseLevel) -> Node:
    """x0 halfway from a node's level to s, on the line through the node and the one before; the node itself
    where there is no line."""
    if last is None or not (has_lambda(last[0]) and has_lambda(s)):
        return node
    t, x0 = node
    h, h_last = s.half_log_snr - t.half_log_snr, t.half_log_snr - last[0].half_log_snr
    return t, linear(1 + h / (2 * h_last), -h / (2 * h_last), x0, last[1])


def check_eta(eta: float) -> None:
    """ValueError for a negative share of noise."""
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be 0 or more, not {eta:g}")


def _weights(t: NoiseLevel, s: NoiseLevel, levels: Sequence[NoiseLevel], eta: float) -> list[float]:
    """What each node counts: sum_j w_j v_j^k = integral_0^1 H e^{-H (1 - v)} v^k dv for every power k below
    the number of nodes."""
    h = s.half_log_snr - t.half_log_snr
    moments = [-math.expm1(-(1 + eta) * h)]
    for k in range(1, len(levels)):
        moments.append(1 - k / ((1 + eta) * h) * moments[-1])
    v = [(level.half_log_snr - t.half_log_snr) / h for level in levels]
    powers = np.vander(v, increasing=True).T
    return np.linalg.solve(powers, moments).tolist()
