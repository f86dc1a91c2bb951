"""Exponential integrators in lambda = log(alpha / sigma) (Lu et al. 2022b; Zhao et al. 2023).

Exact for x0 polynomial in lambda. With h = lambda_s - lambda_t, H = (1 + eta) h and v from 0 at t to 1 at s,

    x_s = sigma_s/sigma_t e^{-eta h} x_t + alpha_s integral_0^1 H e^{-H (1 - v)} x0(v) dv
          + sigma_s sqrt(1 - e^{-2 eta h}) z

solves the ODE at eta = 0 and the reverse SDE at eta = 1. With constant x0 it is DDIM at eta = 0 and DDPM at
eta = 1, at both ends of every schedule. With x0 of higher degree lambda must be finite at t, at s and at
every estimate.
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
    """x_s (if eta > 0 its mean) for x0 through all nodes: one is a constant, two a line, three a parabola."""
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
    """x_s with the SDE's noise: the increment of a Brownian path in the clock (alpha / sigma)^(2 eta)."""
    mean, new = step(x, t, s, nodes, eta), 1 - float(decay(t, s)) ** (2 * eta) if eta > 0 else 0.0
    if s.sigma * new == 0:
        return mean
    noise = path(x, t.ratio ** (-2 * eta), s.ratio ** (-2 * eta))
    return torch.add(mean, noise, alpha=s.sigma * math.sqrt(new))


def halfway(t: NoiseLevel, s: NoiseLevel) -> float:
    """sigma / alpha at the midpoint of a step in lambda."""
    return math.sqrt(t.ratio * s.ratio)


def spread(nodes: Sequence[Node], s: NoiseLevel) -> list[Node]:
    """The nodes, newest first, without those less than a quarter of the coming step from the last one kept.

    A parabola through closer ones, extrapolated over the step, would magnify the network's errors.
    """
    kept = [nodes[0]]
    h = s.half_log_snr - nodes[0][0].half_log_snr
    for node in nodes[1:]:
        if abs(kept[-1][0].half_log_snr - node[0].half_log_snr) >= abs(h) / 4:
            kept.append(node)
    return kept


def midpoint(node: Node, last: Node | None, s: NoiseLevel) -> Node:
    """x0 halfway from a node to s on the line through it and the last node; the node if there is no line."""
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
    """w_j with sum_j w_j v_j^k = integral_0^1 H e^{-H (1 - v)} v^k dv for k = 0 ... number of nodes - 1."""
    h = s.half_log_snr - t.half_log_snr
    moments = [-math.expm1(-(1 + eta) * h)]
    for k in range(1, len(levels)):
        moments.append(1 - k / ((1 + eta) * h) * moments[-1])
    v = [(level.half_log_snr - t.half_log_snr) / h for level in levels]
    powers = np.vander(v, increasing=True).T
    return np.linalg.solve(powers, moments).tolist()
