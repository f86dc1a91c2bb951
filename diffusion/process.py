"""The forward process and its exact conditionals, for any schedule: Gaussian, and without clamps.

Levels are one for the batch or one per sample. s is the less noisy level, with alpha > 0; t is the noisier
one, with sigma > 0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from diffusion.level import Level, Scalar, broadcast, linear


class Gaussian(NamedTuple):
    """An isotropic normal distribution per sample: mean like x, std one number or (B,)."""

    mean: Tensor
    std: Scalar

    def sample(self, z: Tensor) -> Tensor:
        """mean + std * z, for standard normal z."""
        return self.mean + broadcast(self.std, z) * z


def marginal(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """x_t = alpha*x0 + sigma*eps: a sample of q(x_t | x0) (Ho et al. 2020, eq. 4)."""
    return linear(level.alpha, level.sigma, x0, eps)


def decay(t: Level, s: Level) -> Scalar:
    """(sigma_s / alpha_s) / (sigma_t / alpha_t) = e^-h, h the step in lambda = log(alpha / sigma).

    The factor of x_t's noise in the posterior of x_s: 0 at data or from pure noise, 1 for s = t.
    """
    return (t.alpha * s.sigma) / (s.alpha * t.sigma)


def tau(t: Level, s: Level) -> Scalar:
    """The new share of x_s's noise variance after a step from t: 1 - (alpha_t sigma_s / (alpha_s sigma_t))^2.

    0 for s = t, 1 at data or from pure noise. It scales every ancestral and stochastic step.
    """
    ratio = decay(t, s)
    return (1 - ratio) * (1 + ratio)


def transition(x_s: Tensor, s: Level, t: Level) -> Gaussian:
    """q(x_t | x_s): mean (alpha_t/alpha_s) x_s, variance sigma_t^2 tau (Kingma et al. 2021, eq. 21)."""
    return Gaussian(broadcast(t.alpha / s.alpha, x_s) * x_s, t.sigma * tau(t, s) ** 0.5)


def posterior(x_t: Tensor, x0: Tensor, t: Level, s: Level) -> Gaussian:
    """q(x_s | x_t, x0) for any two levels, variance sigma_s^2 tau (Ho et al. 2020, eq. 6-7)."""
    kept = s.sigma / t.sigma * decay(t, s)
    return Gaussian(linear(s.alpha - kept * t.alpha, kept, x0, x_t), s.sigma * tau(t, s) ** 0.5)


def learned_std(v: Tensor, lower: Scalar, upper: Scalar) -> Tensor:
    """The std of a denoising step from a network's v in [-1, 1] (Nichol & Dhariwal 2021, eq. 15). lower > 0.

    Interpolated in log variance between the posterior's (lower, v = -1) and the forward step's (upper, v =
    1).
    """
    return broadcast(lower, v) * broadcast(upper / lower, v) ** ((v + 1) / 2)
