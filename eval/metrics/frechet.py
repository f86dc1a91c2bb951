"""Frechet distance between two sets of features, as normal distributions (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.metrics.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in squared feature units; 0 for equal moments.

    tr (C_a C_b)^(1/2) is the sum of the singular values of R_a^T R_b for any factors C = R R^T, so symmetric
    eigendecompositions suffice, exact also where the covariances lack full rank.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of different width: {len(a.mean)} and {len(b.mean)}: were they made by the same extractor?")
    difference = (a.mean - b.mean).square().sum()
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    return max(0.0, float(difference + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def _factor(covariance: Tensor) -> Tensor:
    """R with R R^T = covariance, one column per eigenvalue above rounding noise."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
