"""Consistency functions: denoisers bent so that they are the identity at the data end, and so map a whole
trajectory to one x0.

Two published parametrisations, kept apart by name because they are not the same function:

cm   Song et al. 2023, appendix C: EDM's scalings moved by sigma_min, in EDM's coordinates (x / alpha, sigma /
     alpha)
lcm  Luo et al. 2023: x itself and a scaled training time, as published LCM weights expect
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffusion.condition import NONE, Condition
from diffusion.denoiser import Denoiser, Wrapper
from diffusion.level import Level, Scalar, broadcast
from diffusion.prediction import Estimate
from diffusion.spec import make

Blend = Callable[[Level], tuple[Scalar, Scalar]]
"""level -> (p, q) in f(x_t) = p * x_t + q * x0_hat, with (1, 0) in the limit of data."""


def cm(ratio_min: float = 0.002, sigma_data: float = 0.5) -> Blend:
    """f = c_skip x + c_out F with c_skip = sd^2 / ((r - r_min)^2 + sd^2), c_out = sd (r - r_min) / sqrt(r^2 +
    sd^2), r = sigma/alpha.

    Written in terms of x0_hat = EDM's own c_skip x + c_out F, so that it fits every prediction. The identity
    (on x / alpha) at r = r_min. Both skips are over alpha and with r = sigma/alpha multiplied out, so that
    alpha = 0 gives x0_hat. Needs sigma > 0.
    """

    def blend(level: Level) -> tuple[Scalar, Scalar]:
        alpha, sigma = level.alpha, level.sigma
        above, data = sigma - ratio_min * alpha, sigma_data * alpha
        share = above / sigma  # c_out of the consistency model over EDM's
        skip, own_skip = (sigma_data * data / (noise**2 + data**2) for noise in (above, sigma))
        return skip - share * own_skip, share

    return blend


def lcm(scaling: float = 10.0, sigma_data: float = 0.5) -> Blend:
    """f = c_skip x_t + c_out x0_hat with c_skip = sd^2 / (s^2 + sd^2), c_out = s / sqrt(s^2 + sd^2), s =
    scaling * t.

    ValueError unless both are above 0: a consistency function is the identity at the data end alone.
    """
    if not (scaling > 0 and sigma_data > 0):
        raise ValueError(
            f"scaling and sigma_data of an LCM must be above 0, not {scaling:g} and {sigma_data:g}"
        )

    def blend(level: Level) -> tuple[Scalar, Scalar]:
        s = scaling * level.t
        return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2) ** 0.5

    return blend


PARAMETRISATIONS: dict[str, Callable[..., Blend]] = {"cm": cm, "lcm": lcm}


class ConsistencyFunction(Wrapper):
    """A denoiser whose x0 is f(x_t) = p x_t + q x0_hat; eps follows from it. Any solver takes it;
    `consistency` is made for it."""

    def __init__(self, denoiser: Denoiser, blend: Blend) -> None:
        super().__init__(denoiser)
        self.blend = blend

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        skip, out = self.blend(level)
        x0_hat = self.denoiser(x_t, level, condition).x0
        return Estimate.from_x0(x_t, broadcast(skip, x_t) * x_t + broadcast(out, x_t) * x0_hat, level)


def build_blend(spec: Mapping[str, Any]) -> Blend:
    """A parametrisation from its description, e.g. {"name": "cm", "ratio_min": 0.03}."""
    return make("consistency parametrisation", spec, PARAMETRISATIONS)
