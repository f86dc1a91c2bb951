"""Guidance rules combine two estimates of one sample: (x_t, level, good, bad, scale) -> Estimate.

good and bad are estimates with and without the condition, or of a network and a weaker one. Every rule gives
`good` at scale 1 and leads away from `bad` above it. A guidance (diffusion/guidance.py) makes the estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.level import Level, NoiseLevel, Scalar, broadcast, linear
from diffusion.prediction import FLOW, Estimate, Prediction, V, build_prediction
from diffusion.spec import check_mapping, make

Rule = Callable[[Tensor, Level, Estimate, Estimate, Scalar], Estimate]
"""(x_t, level, good, bad, scale) -> Estimate; the scale w is one number, or (B,) at a BatchLevel."""


def extrapolate(x_t: Tensor, level: Level, good: Estimate, bad: Estimate, scale: Scalar) -> Estimate:
    """bad + w (good - bad), for x0 and eps (Ho & Salimans 2022, eq. 6, with w = 1 for off)."""
    w = broadcast(scale, x_t)
    return Estimate(torch.lerp(bad.x0, good.x0, w), torch.lerp(bad.eps, good.eps, w), good.variance)


def rescaled(phi: float = 0.7, rule: Rule = extrapolate, space: Prediction = V) -> Rule:
    """Another rule's output o with the contrast of `good`: (phi std(good)/std(o) + 1 - phi) o.

    Lin et al. 2024, eq. 15-16: high scales overexpose. std is over all values of a sample, of the network
    output in `space`: give the network's own prediction. An output with std 0 stays. phi in [0, 1], 0 is off.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must lie in [0, 1], not {phi:g}")

    def rescale(x_t: Tensor, level: Level, good: Estimate, bad: Estimate, scale: Scalar) -> Estimate:
        guided = rule(x_t, level, good, bad, scale)
        target, out = (estimate.combine(*space.coefficients(level)) for estimate in (good, guided))
        factor = 1 + phi * (_quotient(_std(target), _std(out), 1.0) - 1)
        return space.estimate(x_t, broadcast(factor, out) * out, level, good.variance)

    return rescale


def zero_star(x_t: Tensor, level: Level, good: Estimate, bad: Estimate, scale: Scalar) -> Estimate:
    """CFG-Zero* (Fan et al. 2025): s v_bad + w (v_good - s v_bad), s = <v_good, v_bad> / |v_bad|^2 per
    sample.

    s v_bad is the multiple of v_bad nearest to v_good, so that guidance corrects directions, not lengths. v =
    eps - x0 is the velocity of flow time; with x_t = alpha x0 + sigma eps it gives x0 and eps on every
    schedule, because the determinant is alpha + sigma. The paper's other half is `ZeroInit`.
    """
    v_good, v_bad = good.combine(-1.0, 1.0), bad.combine(-1.0, 1.0)
    s = broadcast(_quotient(_dot(v_good, v_bad), _dot(v_bad, v_bad), 0.0), x_t)
    return FLOW.estimate(x_t, torch.lerp(s * v_bad, v_good, broadcast(scale, x_t)), level, good.variance)


class APG:
    """Adaptive projected guidance (Sadat et al. 2024, alg. 1): x0_good + (w - 1) (d_orthogonal + eta
    d_parallel).

    d = x0_good - x0_bad, averaged over the steps and limited in length, is split into its part along x0_good,
    which oversaturates, and the rest. eps follows from x0.

    eta         factor of the parallel part; at 1, without limit and momentum, the rule is `extrapolate`
    norm_limit  the largest 2-norm of d, over a whole sample, so that it depends on the sample's size; > 0
    momentum    in (-1, 1): average = d + momentum * average replaces d. The paper's are negative: push less
                where the last step pushed. For SDXL the paper uses eta 0, norm_limit 15, momentum -0.5

    With momentum a rule has state: each guidance needs its own, and runs must not overlap. The average
    restarts when the noise is back at its first level, when it rises by more than churn raises it (EDM: by
    sqrt(2) at most), and when the shape, dtype or device changes. Solvers with several calls per step update
    it at every call.
    """

    def __init__(self, eta: float = 0.0, norm_limit: float = math.inf, momentum: float = 0.0) -> None:
        if not math.isfinite(eta):
            raise ValueError(f"eta must be a finite number, not {eta}")
        if not norm_limit > 0:
            raise ValueError(f"norm_limit must be positive, not {norm_limit:g}")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum must lie in (-1, 1), not {momentum:g}")
        self.eta, self.norm_limit, self.momentum = eta, norm_limit, momentum
        self._average: Tensor | None = None
        self._first = self._last = math.nan

    def __call__(
        self, x_t: Tensor, level: Level, good: Estimate, bad: Estimate, scale: Scalar, /
    ) -> Estimate:
        d = self._averaged(good.x0 - bad.x0, level)
        length = (self.norm_limit / _dot(d, d).sqrt()).clamp(max=1)
        along = _quotient(_dot(d, good.x0), _dot(good.x0, good.x0), 0.0)  # d_parallel = along * x0_good
        update = linear(1.0, (self.eta - 1) * along, d, good.x0)
        x0 = good.x0 + (broadcast(scale, x_t) - 1) * broadcast(length, x_t) * update
        return Estimate.from_x0(x_t, x0, level, good.variance)

    def _averaged(self, d: Tensor, level: Level) -> Tensor:
        if self.momentum == 0:
            return d
        if not isinstance(level, NoiseLevel):
            raise ValueError("momentum needs one level for the batch: with a level per sample use momentum=0")
        last = self._average
        like = last is not None and (last.shape, last.dtype, last.device) == (d.shape, d.dtype, d.device)
        if last is not None and like and level.ratio != self._first and level.ratio <= 1.5 * self._last:
            d = torch.add(d, last, alpha=self.momentum)
        else:
            self._first = level.ratio
        self._average, self._last = d, level.ratio
        return d


RULES: dict[str, Callable[..., Rule]] = {
    "extrapolate": lambda: extrapolate,
    "rescaled": rescaled,
    "zero_star": lambda: zero_star,
    "apg": APG,
}


def build_rule(spec: Mapping[str, Any], prediction: Prediction) -> Rule:
    """A rule from its description: {"name": "rescaled", "phi": 0.5, "rule": {"name": "zero_star"}, "space":
    "x0"}.

    prediction  the network's own: the space of `rescaled` unless the description names another
    """
    options = check_mapping("the description of the guidance rule", spec)
    if "rule" in options:
        options["rule"] = build_rule(options["rule"], prediction)
    if "space" in options:
        options["space"] = build_prediction(options["space"])
    elif options.get("name") == "rescaled":
        options["space"] = prediction
    return make("guidance rule", options, RULES)


def _std(x: Tensor) -> Tensor:
    """The standard deviation of each sample, (B,)."""
    return x.reshape(len(x), -1).std(1, correction=0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each pair of samples, (B,)."""
    return (x * y).reshape(len(x), -1).sum(1)


def _quotient(a: Tensor, b: Tensor, where_zero: float) -> Tensor:
    """a / b, or `where_zero` where b is 0."""
    return torch.where(b == 0, where_zero, a / b)
