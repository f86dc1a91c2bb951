"""What a benchmark measures: one `Score` per row of the table, one `Target` per promise. Plain data, kept as JSON beside a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from models.files.text import strict

Metric = Literal["frechet", "kernel", "accuracy", "nearest", "copies"]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds. NaN where a reference cannot have it, such as the distance of a set from itself."""

    mean: float
    std: float  # standard deviation over seeds, 0 for one seed

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and standard deviation (n - 1 in its denominator) of one value per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Score:
    """One row of the table: one model, sampler, number of steps and guidance scale, or one reference set.

    kind  "model"; "floor", training images, and "ceiling", noise: what memory and what ignorance would get at the same n;
          "held_out", the images that the others are compared with
    """

    model: str
    kind: Literal["model", "floor", "held_out", "ceiling"]
    sampler: str  # "" for references
    steps: int  # 0 for references
    guidance: float  # 1 is off
    calls: int  # network calls per sample; guidance doubles them where it is on
    n: int  # images per seed
    seeds: int
    frechet: Spread  # to held-out real images, in squared feature units
    kernel: Spread  # to held-out real images, unbiased, may fall below 0
    accuracy: Spread  # share in [0, 1] whose asked-for label the judge agrees with
    nearest: Spread  # Euclidean distance to the nearest training image, mean over images
    copies: Spread  # share in [0, 1] nearer to the training set than all but 1 % of held-out images are
    kernel_error: float  # mean standard error of kernel
    seconds: float  # sampling time per 1000 images

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump. Infinities and NaN become null: strict JSON has neither."""
        return dict(strict(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Score:
        """The inverse of `to_json`. Raises on a missing or unknown field."""
        plain: dict[str, Any] = dict(values)
        plain |= {name: Spread(_number(values[name]["mean"]), _number(values[name]["std"])) for name in METRICS}
        plain |= {name: _number(values[name]) for name in ("guidance", "kernel_error", "seconds")}
        return cls(**plain)


METRICS: tuple[Metric, ...] = ("frechet", "kernel", "accuracy", "nearest", "copies")


@dataclass(frozen=True)
class Target:
    """What a run promised, and what it measured."""

    name: str
    value: float
    limit: float
    at_most: bool  # whether limit is the largest value allowed, or the smallest
    note: str = ""  # the numbers that explain a miss

    @property
    def met(self) -> bool:
        """A value that is not a number meets nothing."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump, with `met` for readers without this library."""
        return {**strict(asdict(self)), "met": self.met}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Target:
        """The inverse of `to_json`."""
        kept = {name: value for name, value in values.items() if name != "met"}
        return cls(**{**kept, "value": _number(values["value"]), "limit": _number(values["limit"])})


def reference(scores: Iterable[Score], kind: Literal["floor", "ceiling"], metric: Metric) -> Spread | None:
    """The figure of real data ("floor") or of noise ("ceiling") to judge a metric by; None where no row has one.

    Distances between sets are judged by training images, which are as far from the held-out ones as real data is at this n.
    Accuracy and the nearest training image are judged by the held-out images, which neither judge nor model has seen.
    """
    wanted = "held_out" if kind == "floor" and metric in ("accuracy", "nearest", "copies") else kind
    found: list[Spread] = [getattr(s, metric) for s in scores if s.kind == wanted]
    return next((spread for spread in found if math.isfinite(spread.mean)), None)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
