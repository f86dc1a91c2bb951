"""The Frechet distance beside scipy.linalg.sqrtm as pytorch-fid calls it, in one run. `python -m eval experiment=bench_frechet`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.spec import check_at_least_one, make_params
from eval.bench.record import write_bench
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import Moments
from plain_diffusion.extras import extra


@dataclass(frozen=True)
class BenchParams:
    """What to time: see configs/eval/experiment/bench_frechet.yaml."""

    out: str
    dim: int = 2048
    samples: tuple[int, ...] = (10000, 500)
    rounds: int = 5
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "dim", "rounds")
        if not self.samples or min(self.samples) < 2:
            raise ValueError(f"samples must be numbers of 2 or more, not {list(self.samples)}")


@dataclass(frozen=True)
class Timing:
    """Seconds of a distance from moments, medians over rounds; and how far the result lies from the truth, relative to it.

    The truth is from singular values of the features themselves, without a covariance.
    """

    samples: int
    dim: int
    ours: float
    theirs: float
    speedup: float  # the median of the rounds' ratios
    error: float
    their_error: float


def run(config: Mapping[str, Any]) -> list[Timing]:
    """Time both on sets of each size, round after round, and write out/bench.json and out/bench.md."""
    params = make_params("", BenchParams, {key: value for key, value in config.items() if key != "program"})
    sqrtm = _scipy_sqrtm()
    timings = [_time(n, params, sqrtm) for n in tqdm(params.samples, desc="timing", disable=not params.progress)]
    write_bench(Path(params.out), timings, table(timings), threads=torch.get_num_threads())
    return timings


def table(timings: Sequence[Timing]) -> str:
    """A Markdown table, one row per size of the sets."""
    rows = [
        f"| {t.samples} | {t.dim} | {t.ours:.2f} | {t.theirs:.2f} | {t.speedup:.1f} | {t.error:.0e} | {t.their_error:.0e} |"
        for t in timings
    ]
    head = "| samples | dimensions | s | scipy, s | speed-up | error | scipy's error |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _time(n: int, params: BenchParams, sqrtm: Callable[[Any], Any]) -> Timing:
    x, y = (features(n, params.dim, seed) for seed in (0, 1))
    a, b = Moments.of(x), Moments.of(y)
    results = [(_timed(lambda: frechet_distance(a, b)), _timed(lambda: peer_distance(a, b, sqrtm))) for _ in range(params.rounds + 1)]
    truth, rounds = distance_of_features(x, y), results[1:]  # the first round warms up
    ours, theirs = (statistics.median(one[k][1] for one in rounds) for k in (0, 1))
    speedup = statistics.median(theirs[1] / ours[1] for ours, theirs in rounds)
    error, their_error = (abs(one[0] - truth) / truth for one in rounds[0])
    return Timing(n, params.dim, ours, theirs, speedup, error, their_error)


def features(n: int, dim: int, seed: int) -> Tensor:
    """(n, dim): correlated, with standard deviations that fall as those of Inception's features do, over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, dim, dtype=torch.float64)
    reflection = torch.randn(dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return 0.4 + 0.01 * seed + x - torch.outer(x @ reflection, reflection) * (2 / reflection.square().sum())


def peer_distance(a: Moments, b: Moments, sqrtm: Callable[[Any], Any]) -> float:
    """The distance by a root of the product of the covariances, as in pytorch-fid."""
    root = sqrtm((a.covariance @ b.covariance).numpy())
    difference = (a.mean - b.mean).square().sum()
    return float(difference + a.covariance.trace() + b.covariance.trace()) - 2 * float(root.real.trace())


def distance_of_features(x: Tensor, y: Tensor) -> float:
    """The distance from features (N, D) by the singular values of the product of the centred sets, which are reduced to D rows by QR."""
    roots = [torch.linalg.qr((z - z.mean(0)) / math.sqrt(len(z) - 1), mode="r").R for z in (x, y)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    difference = (x.mean(0) - y.mean(0)).square().sum()
    return float(difference + sum(root.square().sum() for root in roots) - 2 * cross)


def _timed(compute: Callable[[], float]) -> tuple[float, float]:
    """The result, and the seconds it took."""
    start = time.perf_counter()
    result = compute()
    return result, time.perf_counter() - start


def _scipy_sqrtm() -> Callable[[Any], Any]:
    with extra("bench"):
        from scipy.linalg import sqrtm
    return sqrtm
