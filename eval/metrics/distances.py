"""Euclidean distances between rows: fast ones between all pairs, exact ones between a few."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256
SPARE = 4  # candidates besides the nearest by rounded distances


@dataclass(frozen=True)
class Nearest:
    """distance, index (N, k): of each row's k nearest rows of a reference, from near to far."""

    distance: Tensor
    index: Tensor


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M): |x_i - y_j|^2 of float64 rows (N, D) and (M, D), to 1e-15 of |x_i|^2 + |y_j|^2, not below 0.

    One matrix product. Nearly equal rows far from 0 may have no correct digit: see `exact_distances`.
    """
    return torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1), x, y.T, alpha=-2).clamp_(min=0)


def exact_distances(x: Tensor, y: Tensor) -> Tensor:
    """(...): |x_i - y_i| of rows (..., D), through their differences; exactly 0 for a copy."""
    return (x - y).square().sum(-1).sqrt()


def nearest(x: Tensor, reference: Tensor, k: int = 1) -> Nearest:
    """The k nearest rows of `reference` (M, D) to each row of x (N, D)."""
    _check_count(len(reference), k)
    return _join(_refined(rows, reference, squared_distances(rows, reference), k) for rows in x.split(ROWS))


def nearest_others(x: Tensor, k: int = 1) -> Nearest:
    """The k nearest other rows of x (N, D) to each of its rows; a copy of a row is another row, at 0."""
    _check_count(len(x) - 1, k)
    found = []
    for start, rows in zip(range(0, len(x), ROWS), x.split(ROWS), strict=True):
        squared = squared_distances(rows, x)
        squared[:, start:].fill_diagonal_(torch.inf)
        found.append(_refined(rows, x, squared, k))
    return _join(found)


def _refined(rows: Tensor, reference: Tensor, squared: Tensor, k: int) -> Nearest:
    """The k nearest by exact distances, among a few more candidates by rounded squared ones (rows, M)."""
    rounded, index = squared.topk(min(k + SPARE, len(reference)), largest=False)
    exact = torch.stack([exact_distances(rows, reference[column]) for column in index.unbind(1)], 1)
    distance, order = exact.masked_fill_(rounded.isinf(), torch.inf).sort(dim=1, stable=True)
    return Nearest(distance[:, :k], index.gather(1, order)[:, :k])


def _join(found: Iterable[Nearest]) -> Nearest:
    parts = list(found)
    return Nearest(torch.cat([part.distance for part in parts]), torch.cat([part.index for part in parts]))


def _check_count(candidates: int, k: int) -> None:
    if not 1 <= k <= candidates:
        raise ValueError(f"{k} nearest neighbours need {k} candidates, not {max(0, candidates)}")
