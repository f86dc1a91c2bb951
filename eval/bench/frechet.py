"""The Frechet distance against scipy.linalg.sqrtm, called as in pytorch-fid (experiment=bench_frechet)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.settings import setting
from diffusion.spec import check_at_least_one
from eval.bench.harness import BenchParams, alternate, column, timed
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import Moments
from plain_diffusion.extras import extra


@dataclass(frozen=True, kw_only=True)
class Params(BenchParams):
    """What to time."""

    dim: int = setting(2048, "features of a sample; Inception has 2048")
    n: tuple[int, ...] = setting((10000, 500), "samples of each of the two sets: full rank, and below it")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "dim")
        if not self.n or min(self.n) < 2:
            raise ValueError(f"n must be numbers of 2 or more, not {list(self.n)}")


@dataclass(frozen=True)
class Timing:
    """Seconds to compute a distance from moments, medians over rounds, and its relative error.

    The exact distance is from singular values of the features themselves, without a covariance.
    """

    samples: int = column("samples")
    dim: int = column("dimensions")
    ours: float = column("s", ".2f")
    theirs: float = column("scipy, s", ".2f")
    speedup: float = column("speed-up", ".1f")  # the median of the rounds' ratios
    error: float = column("error", ".0e")
    their_error: float = column("scipy's error", ".0e")


def measure(params: Params) -> tuple[list[Timing], dict[str, Any]]:
    """Time both on sets of each size."""
    with extra("bench"):
        from scipy.linalg import sqrtm
    rows = []
    for n in tqdm(params.n, desc="timing", disable=not params.progress):
        x, y = (features(n, params.dim, seed) for seed in (0, 1))
        a, b, exact = Moments.of(x), Moments.of(y), distance_of_features(x, y)
        sides = [partial(frechet_distance, a, b), partial(peer_distance, a, b, sqrtm)]
        rounds = alternate([timed(side) for side in sides], params.rounds)
        error, their_error = (abs(side() - exact) / exact for side in sides)
        times = rounds.median(0), rounds.median(1), rounds.ratio(1, 0)
        rows.append(Timing(n, params.dim, *times, error, their_error))
    return rows, {"threads": torch.get_num_threads()}


def features(n: int, dim: int, seed: int) -> Tensor:
    """(n, dim): correlated, with standard deviations over two orders of magnitude, as Inception's."""
    generator, f64 = torch.Generator().manual_seed(seed), torch.float64
    x = torch.randn(n, dim, generator=generator, dtype=f64) * torch.logspace(0, -2, dim, dtype=f64)
    reflection = torch.randn(dim, generator=torch.Generator().manual_seed(9), dtype=f64)
    return 0.4 + 0.01 * seed + x - torch.outer(x @ reflection, reflection) * (2 / reflection.square().sum())


def peer_distance(a: Moments, b: Moments, sqrtm: Callable[[Any], Any]) -> float:
    """The distance by a square root of the product of the covariances, as in pytorch-fid."""
    root = sqrtm((a.covariance @ b.covariance).numpy())
    difference = (a.mean - b.mean).square().sum()
    return float(difference + a.covariance.trace() + b.covariance.trace()) - 2 * float(root.real.trace())


def distance_of_features(x: Tensor, y: Tensor) -> float:
    """The distance by singular values of the product of centred features (N, D), reduced to D rows by QR."""
    roots = [torch.linalg.qr((z - z.mean(0)) / math.sqrt(len(z) - 1), mode="r").R for z in (x, y)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    difference = (x.mean(0) - y.mean(0)).square().sum()
    return float(difference + sum(root.square().sum() for root in roots) - 2 * cross)
