"""Consistency functions: denoisers that are the identity at data and map a whole trajectory to one x0.

There are two published parametrisations, and they are different functions:

cm   Song et al. 2023, appendix C: EDM's scalings shifted by sigma_min, in EDM's coordinates (x / alpha, sigma
     / alpha)
lcm  Luo et al. 2023: in x itself and a scaled training time, as published LCM weights expect
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
"""level -> (p, q) of f(x_t) = p * x_t + q * x0_hat; (1, 0) in the limit of data."""


def cm(ratio_min: float = 0.002, sigma_data: float = 0.5) -> Blend:
    """Song et al. 2023: f = c_skip x + c_out F, with sd = sigma_data and r = sigma/alpha:

        c_skip = sd^2 / ((r - r_min)^2 + sd^2),    c_out = sd (r - r_min) / sqrt(r^2 + sd^2)

    Written in terms of x0_hat = EDM's own c_skip x + c_out F, so that it works with every prediction. It is
    the identity (on x / alpha) at r = r_min. Both skips are divided by alpha, and r = sigma/alpha is
    multiplied out, so that alpha = 0 gives x0_hat. Needs sigma > 0.
    """

    def blend(level: Level) -> tuple[Scalar, Scalar]:
        alpha, sigma = level.alpha, level.sigma
        above, data = sigma - ratio_min * alpha, sigma_data * alpha
        share = above / sigma  # c_out of the consistency model over EDM's
        skip, own_skip = (sigma_data * data / (noise**2 + data**2) for noise in (above, sigma))
        return skip - share * own_skip, share

    return blend


def lcm(scaling: float = 10.0, sigma_data: float = 0.5) -> Blend:
    """Luo et al. 2023: f = sd^2 / (s^2 + sd^2) x_t + s / sqrt(s^2 + sd^2) x0_hat, with s = scaling * t.

    ValueError unless scaling and sigma_data are above 0: only then is f the identity exactly at data.
    """
    if not (scaling > 0 and sigma_data > 0):
        raise ValueError(f"scaling and sigma_data of lcm must be above 0, not {scaling:g} and {sigma_data:g}")

    def blend(level: Level) -> tuple[Scalar, Scalar]:
        s = scaling * level.t
        return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2) ** 0.5

    return blend


PARAMETRISATIONS: dict[str, Callable[..., Blend]] = {"cm": cm, "lcm": lcm}


class ConsistencyFunction(Wrapper):
    """A denoiser with x0 = f(x_t) = p x_t + q x0_hat. Any solver takes it; `consistency` is made for it."""

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
