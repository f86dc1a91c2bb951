"""Closed-form denoisers: data distributions with known E[x0 | x_t], at every level and on every schedule.

Every solver is tested against them, and notebooks use them as ideal networks. They ignore conditions that
they do not know. Samples have any shape (B, ...); computation is in x_t's dtype, float64 for proofs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.condition import NONE, Condition
from diffusion.level import Level, Scalar, broadcast
from diffusion.prediction import Estimate


class PointMass:
    """All data is one point: the simplest data set, on which every solver must be exact."""

    def __init__(self, x0: Tensor) -> None:
        """x0: one sample (...), or a batch that matches x_t."""
        self.x0 = x0

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        return Estimate.from_x0(x_t, self.x0.to(x_t).expand_as(x_t), level)


class GaussianMixture:
    """Isotropic Gaussians: mean (K, *shape), std (K,), weight (K,), default equal. Exact at both ends."""

    def __init__(self, mean: Tensor, std: Tensor, weight: Tensor | None = None) -> None:
        weight = torch.ones_like(std) if weight is None else weight
        if not (len(mean) == len(std) == len(weight) and (std > 0).all() and (weight > 0).all()):
            raise ValueError("a mixture needs as many positive stds and weights as means")
        self.mean, self.std, self.weight = mean, std, weight / weight.sum()

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        flat, mean, variance, log_joint = self._terms(x_t, level)
        alpha, sigma = broadcast(level.alpha, flat), broadcast(level.sigma, flat)
        responsibility = log_joint.softmax(1)
        # (B, K, D), minus the score of each component
        pull = (flat[:, None] - _column(alpha) * mean) / variance[..., None]
        shrink = _column(alpha) * (self.std.to(flat) ** 2)[:, None]
        x0 = (responsibility[..., None] * (mean + shrink * pull)).sum(1)
        eps = sigma * (responsibility[..., None] * pull).sum(1)
        return Estimate(x0.view_as(x_t), eps.view_as(x_t))

    def log_prob(self, x_t: Tensor, level: Level) -> Tensor:
        """log density of the noised mixture at x_t, (B,), in nats."""
        _, mean, _, log_joint = self._terms(x_t, level)
        return log_joint.logsumexp(1) - 0.5 * mean.shape[1] * math.log(2 * math.pi)

    def quantile(self, u: Tensor, level: Level) -> Tensor:
        """x_t (N, 1) where the distribution function of the noised mixture is u (N,), by bisection; 1-D only.

        In one dimension the probability-flow ODE preserves quantiles, so that this is its exact solution.
        """
        if self.mean[0].numel() != 1:
            raise ValueError(f"quantiles need samples of one dimension, not {tuple(self.mean.shape[1:])}")
        mean = level.alpha * self.mean.flatten()
        std = (level.alpha**2 * self.std**2 + level.sigma**2) ** 0.5
        ends = (mean - 40 * std).min(), (mean + 40 * std).max()
        low, high = (torch.full_like(u, float(end)) for end in ends)
        for _ in range(80):
            middle = 0.5 * (low + high)
            below = (self.weight * torch.special.ndtr((middle[:, None] - mean) / std)).sum(1) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low[:, None]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n samples of clean data, (n, *shape)."""
        k = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        noise = torch.randn(n, *self.mean.shape[1:], generator=generator, dtype=self.mean.dtype)
        return self.mean[k] + self.std[k].view(-1, *[1] * (self.mean.ndim - 1)) * noise

    def _terms(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t (B, D), mean (K, D), noised variance (1 or B, K), log weight + log density + const (B, K)."""
        flat, mean = x_t.flatten(1), self.mean.to(x_t).flatten(1)
        alpha, sigma = broadcast(level.alpha, flat), broadcast(level.sigma, flat)
        variance = (alpha**2 * self.std.to(x_t)[None] ** 2) + sigma**2
        off = (flat[:, None] - _column(alpha) * mean).square().sum(-1)
        log_joint = self.weight.to(x_t).log() - 0.5 * mean.shape[1] * variance.log() - 0.5 * off / variance
        return flat, mean, variance, log_joint


class EmpiricalData:
    """The data set itself, each image a point: what a network of unlimited capacity would memorise.

    x0 is the average of the training images, weighted by how well each explains x_t (Karras et al. 2022, eq.
    57). With labels (N,), a condition's label (B,) restricts each sample to its class; unknown labels mean
    any class.
    """

    def __init__(self, data: Tensor, labels: Tensor | None = None) -> None:
        self.data, self.labels = data, labels

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        data = self.data.to(x_t).flatten(1)
        weight = self.weights(x_t, level, condition.label)
        return Estimate.from_x0(x_t, (weight @ data).view_as(x_t), level)

    def weights(self, x_t: Tensor, level: Level, label: Tensor | None = None) -> Tensor:
        """The posterior probability of each training image given x_t, (B, N). level.sigma > 0."""
        data = self.data.to(x_t).flatten(1)
        flat = x_t.flatten(1)
        alpha, sigma = broadcast(level.alpha, flat), broadcast(level.sigma, flat)
        if isinstance(alpha, Tensor):
            distance = (flat[:, None] - alpha[:, None] * data).norm(dim=-1)
        else:
            distance = torch.cdist(flat, alpha * data, compute_mode="donot_use_mm_for_euclid_dist")
        log_weight = -0.5 * (distance / sigma).square()
        if label is not None and self.labels is not None:
            other = label[:, None] != self.labels.to(label)[None]
            any_class = ~torch.isin(label, self.labels.to(label))[:, None]
            log_weight = log_weight.masked_fill(other & ~any_class, -math.inf)
        return log_weight.softmax(1)


def _column(coefficient: Scalar) -> Scalar:
    """A coefficient per sample (B, 1), with an axis added for (B, K, D)."""
    return coefficient[..., None] if isinstance(coefficient, Tensor) else coefficient
