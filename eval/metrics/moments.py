"""Streaming mean and covariance of features, in float64 and centred, mergeable."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """n, mean and covariance of everything given to `update`; `merge` adds another's (Chan et al. 1979).

    Centred sums keep full precision where E[x^2] - E[x]^2 loses it (features around 10 +- 0.01, say).
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features (N, D)."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Take in features (N, D), any float dtype. Raises on another width and on NaN or infinity."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must have shape (N, {len(self.mean)}), not {tuple(features.shape)}")
        x = features.detach().to("cpu", torch.float64)
        if not x.isfinite().all():
            raise ValueError(f"{int((~x.isfinite()).any(1).sum())} of {len(x)} feature vectors are not finite")
        if len(x) == 0:
            return
        mean = x.mean(0)
        centred = x - mean
        self._add(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in all that `other` has seen."""
        if other.n:
            self._add(other.n, other.mean, other._scatter)

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate (D, D); needs n >= 2."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.n}")
        return self._scatter / (self.n - 1)

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total, delta = self.n + n, mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total
