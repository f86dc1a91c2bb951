"""Quantiles of the Beta distribution, for the beta spacing: the core does not need scipy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def beta_quantile(p: Tensor, a: float, b: float) -> Tensor:
    """x in [0, 1] with regularised incomplete beta function I_x(a, b) = p, in float64. a, b in (0, 100].

    Beyond the centre (a+1) / (a+b+2), solve for 1 - x by I_x(a, b) = 1 - I_(1-x)(b, a) (DLMF 8.17.4): the
    fraction below converges fast on one side of the centre only.
    """
    p, centre = p.to(torch.float64), (a + 1) / (a + b + 2)
    x = _lower_quantile(p, a, b, centre)
    return torch.where(x < centre, x, 1 - _lower_quantile(1 - p, b, a, 1 - centre))


def _lower_quantile(p: Tensor, a: float, b: float, most: float) -> Tensor:
    """The quantile if it is less than `most`, else `most`.

    Newton's method on log I_x = log p over u = log x, where d log I_x / du = a / ((1 - x) F). It starts on
    the tangent at x = 0, I_x ~ x^a / (a B(a, b)), and cannot overshoot: log I_x is convex in u for b < 1 and
    concave for b > 1.
    """
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    target = p.clamp(min=torch.finfo(p.dtype).tiny).log() + math.log(a) + log_beta
    u = (target / a).clamp(max=math.log(most))
    for _ in range(100):
        x = u.exp()
        f = _fraction(x, a, b)
        before, u = u, u - (a * u + b * torch.log1p(-x) + f.log() - target) * (1 - x) * f / a
        u = u.clamp(max=math.log(most))
        if torch.allclose(u, before, rtol=1e-15, atol=1e-15):
            break
    x = torch.where(u < math.log(most), u.exp(), most)
    return torch.where(p > 0, x, 0)


def _fraction(x: Tensor, a: float, b: float) -> Tensor:
    """F in I_x(a, b) = x^a (1 - x)^b F / (a B(a, b)): the continued fraction of DLMF 8.17.22."""
    f = torch.ones_like(x)
    for m in range(40, 0, -1):  # 40 pairs reach 1e-13 up to a = b = 100
        odd = -(a + m - 1) * (a + b + m - 1) / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        f = 1 + odd * x / (1 + even * x / f)
    return 1 / f
