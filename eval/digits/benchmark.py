"""A benchmark: models x samplers x steps x guidance, each over several seeds, and the real data and noise to judge them by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import models
from diffusion import Condition, Grid, initial_noise
from diffusion.spec import check_at_least_one, check_call, check_mapping, make_params
from eval.digits.judge import DigitJudge, Figures
from eval.digits.score import Score, Spread
from eval.images.calls import calls_per_image
from models import Model
from samplers import sample
from samplers.guide import steered
from samplers.sample import find_sampler

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Job:
    """One row to measure: `seeds` sets of images, as many as asked for, with classes as frequent as among the held-out digits.

    guide, grid, options  as for `python -m samplers`; the row's name should say them, for no column does
    """

    name: str
    run: str
    sampler: str
    steps: int
    guidance: float = 1.0
    seeds: int = 3
    guide: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least_one(self, "steps", "seeds")

    def __str__(self) -> str:
        return f"{self.name}, {self.sampler}, {self.steps} steps, guidance {self.guidance:g}"

    def calls(self, model: Model) -> int:
        """Network calls per image, as counted: guidance makes two of one, but only where it is on."""
        return calls_per_image(model, lambda counting: draw(counting, self, torch.zeros(1, dtype=torch.int64), [0]))

    def levels(self, model: Model) -> Grid:
        """The model's own grid of `steps` steps, or the one that the settings under `grid` describe: spacing, t_start, ..."""
        return model.grid(self.steps, **self.grid)


def jobs(spec: Sequence[Mapping[str, Any]]) -> list[Job]:
    """The rows that a configuration lists: sampler, steps and guidance may be lists, of which every combination is a row."""
    found = []
    for entry in spec:
        fixed = {
            key: value for key, value in check_mapping("a benchmark entry", entry).items() if key not in ("sampler", "steps", "guidance")
        }
        lists = [
            value if isinstance(value := entry.get(key, default), list) else [value]
            for key, default in (("sampler", None), ("steps", None), ("guidance", 1.0))
        ]
        found += [
            make_params("jobs", Job, {**fixed, "sampler": sampler, "steps": steps, "guidance": guidance})
            for sampler, guidance, steps in product(lists[0], lists[2], lists[1])
        ]
    rows = [str(job) for job in found]
    for row in rows:
        if rows.count(row) > 1:
            raise ValueError(f"jobs has more than one row that reads {row!r}: give those with other settings another name")
    return found


def measure(
    all_jobs: Sequence[Job], judge: DigitJudge, n: int, workers: int | None = None, progress: bool = True
) -> tuple[list[Score], dict[Job, Tensor]]:
    """A score per job, and the images of its first seed.

    n        images per seed
    workers  sets of images drawn side by side, each on its share of torch's threads; None: as many as torch has. Two cores draw
             two sets on one core each faster than one set after the other on both, most of all where they are shared.
    """
    loaded = {job.run: _load(job.run) for job in all_jobs}
    parts = [(job, seed) for job in all_jobs for seed in range(job.seeds)]
    for job in all_jobs:  # what is wrong with the last row is said before the first is drawn
        job.levels(loaded[job.run])
        steered(loaded[job.run], job.guidance, clip=True, guide=job.guide)
        check_call(job.sampler, find_sampler(job.sampler), 3, job.options)
    labels = judge.classes(n)
    calls = {job: job.calls(loaded[job.run]) for job in all_jobs}

    def drawn(part: tuple[Job, int]) -> tuple[Tensor, Figures, float]:
        job, seed = part
        start = time.perf_counter()
        x = draw(loaded[job.run], job, labels, range(seed * n, (seed + 1) * n))
        seconds = time.perf_counter() - start
        bar.set_postfix_str(str(job), refresh=False)
        bar.update(calls[job] * n)
        return x, judge.judge(x, labels), seconds

    total = sum(calls[job] * job.seeds for job in all_jobs) * n
    with tqdm(total=total, desc="sampling", unit="call", unit_scale=True, disable=not progress) as bar:
        results = dict(zip(parts, _side_by_side(drawn, parts, workers or torch.get_num_threads()), strict=True))
    scores, images = [], {}
    for job in all_jobs:
        sets, figures, seconds = zip(*(results[job, seed] for seed in range(job.seeds)), strict=True)
        scores.append(_score(job, calls[job], figures, n, 1000 * sum(seconds) / (job.seeds * n)))
        images[job] = sets[0]
    return scores, images


def _side_by_side(function: Callable[[Part], Result], parts: Sequence[Part], workers: int) -> list[Result]:
    """function(part) of every part, in order, by `workers` threads that share torch's own: it leaves Python free while it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(function, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def draw(model: Model, job: Job, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Images of these classes from these seeds."""
    denoiser = steered(model, job.guidance, clip=True, guide=job.guide)
    return sample(
        job.sampler, denoiser, job.levels(model), shape=model.shape, seeds=seeds, condition=Condition(label=labels), **job.options
    )


def references(judge: DigitJudge, n: int, seeds: int = 20) -> list[Score]:
    """What real digits and pure noise get at the same n: random parts of the train split, the held-out digits, noise.

    The parts have as many digits of each class as the samples have, so that floor and samples differ in nothing but origin.
    """
    train, held_out, labels = judge.train, judge.held_out, judge.classes(n)
    parts = [train.of_classes(labels, seed) for seed in range(seeds)]
    real = [judge.judge(train.images[part], labels)._replace(nearest=0.0) for part in parts]
    own = judge.judge(held_out.images, judge.labels)._replace(frechet=math.nan, kernel=math.nan, kernel_error=math.nan)
    noise = [judge.judge(initial_noise(range(k * n, (k + 1) * n), train.shape), labels) for k in range(3)]
    row: dict[str, Any] = dict(sampler="", steps=0, guidance=1.0, calls=0, seconds=0.0)
    return [
        Score(model="Real digits (train split)", kind="floor", n=n, seeds=seeds, **row, **_spread(real)),
        Score(model="Held-out digits", kind="held_out", n=len(held_out), seeds=1, **row, **_spread([own])),
        Score(model="Pure noise", kind="ceiling", n=n, seeds=3, **row, **_spread(noise)),
    ]


def _load(run: str) -> Model:
    model = models.load(run)
    model.network.eval().requires_grad_(False)
    return model


def _score(job: Job, calls: int, figures: Sequence[Figures], n: int, seconds: float) -> Score:
    return Score(
        model=job.name, kind="model", sampler=job.sampler, steps=job.steps, guidance=job.guidance, calls=calls,
        n=n, seeds=job.seeds, seconds=seconds, **_spread(figures),
    )  # fmt: skip


def _spread(figures: Sequence[Figures]) -> dict[str, Any]:
    columns = {name: [getattr(figure, name) for figure in figures] for name in Figures._fields}
    error = columns.pop("kernel_error")
    return {**{name: Spread.of(values) for name, values in columns.items()}, "kernel_error": sum(error) / len(error)}
