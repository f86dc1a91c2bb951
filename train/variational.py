"""Terms of the variational bound (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion import BatchLevel, Schedule, learned_std, posterior, tau
from diffusion.level import broadcast


def variational_bound(
    schedule: Schedule, x0: Tensor, x_t: Tensor, x0_hat: Tensor, variance: Tensor, level: BatchLevel
) -> Tensor:
    """The bound in bits per dimension, (B,), estimated as one step's term times the number of steps.

    The term for t > 0 is the KL divergence from the exact posterior q(x_{t-1} | x_t, x0) to the network's
    Gaussian, for t = 0 the negative log-likelihood of x0's 8-bit value. x0_hat is the network's estimate,
    variance its v in [-1, 1].
    """
    if schedule.rows is None:
        raise ValueError("a learned variance needs a schedule with steps, such as DiscreteVP")
    first = level.t == 0
    # Row 0 steps to data, where the posterior has no variance: use that of row 1, and the likelihood as term.
    above, below = schedule.levels(level.t.clamp(min=1)), schedule.levels(level.t.clamp(min=1) - 1)
    exact, guess = posterior(x_t, x0, above, below), posterior(x_t, x0_hat, above, below)
    std = learned_std(
        variance, exact.std, torch.where(first, level.sigma, above.sigma * tau(above, below) ** 0.5)
    )
    divergence = gaussian_kl(exact.mean, broadcast(exact.std, x_t), guess.mean, std)
    likelihood = -discretised_log_likelihood(x0, x0_hat, std)
    nats = torch.where(
        first.to(x0.device, non_blocking=True), likelihood.flatten(1).mean(1), divergence.flatten(1).mean(1)
    )
    return schedule.rows * nats / math.log(2)


def gaussian_kl(mean_p: Tensor, std_p: Tensor | float, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(p || q) of normal distributions, element by element, in nats."""
    log_ratio = torch.as_tensor(std_q).log() - torch.as_tensor(std_p).log()
    return log_ratio + 0.5 * ((std_p / std_q) ** 2 + ((mean_p - mean_q) / std_q) ** 2 - 1)


def discretised_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-probability of x's 8-bit bin in [-1, 1] under N(mean, std), in nats (Ho et al. 2020, eq. 13)."""
    upper = torch.special.ndtr((x - mean + 1 / 255) / std)
    lower = torch.special.ndtr((x - mean - 1 / 255) / std)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
