"""Targets: what results must reach, as a configuration says it, and whether they do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffusion.spec import check_names
from eval.metrics.registry import find_metric
from eval.results import Result, Scored
from models.files.text import strict


@dataclass(frozen=True)
class Promise:
    """A limit to the figure of a metric in one row, or to its ratio over that in another one.

    row, over          names of rows
    at_most, at_least  the limit: one of the two
    note               beside the verdict; empty: the two figures of a ratio
    """

    name: str
    metric: str
    row: str
    over: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        find_metric(self.metric)
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"the target {self.name!r} needs one limit: at_most or at_least")


@dataclass(frozen=True)
class Target:
    """What was promised, and what was measured; `at_most`: whether the limit is the largest value allowed, or
    the smallest."""

    name: str
    value: float
    limit: float
    at_most: bool
    note: str = ""

    @property
    def met(self) -> bool:
        """A value that is not a number meets nothing."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump, with `met` for readers without this library."""
        return {**strict(asdict(self)), "met": self.met}


def check_rows(promises: Sequence[Promise], rows: Collection[str]) -> None:
    """ValueError unless the rows that targets speak of are among these."""
    for promise in promises:
        for row in filter(None, (promise.row, promise.over)):
            if row not in rows:
                raise ValueError(f"the target {promise.name!r} needs the row {row!r}: add it to rows")


def judge(promise: Promise, results: Mapping[str, Result]) -> Target:
    """The promise with what was measured, by the names of rows."""

    def figure(row: str) -> Scored:
        check_names(f"figure of {row}", [promise.metric], results[row].figures)
        return results[row].figures[promise.metric]

    value, note = figure(promise.row).value, promise.note
    if promise.over is not None:
        other = figure(promise.over)
        spread = f" ± {other.extra['std']:.3f}" if "std" in other.extra else ""
        note = note or f"{value:.3f} against {other.value:.3f}{spread}"
        value = value / other.value if other.value else float("nan")
    limit = promise.at_most if promise.at_most is not None else promise.at_least
    assert limit is not None
    return Target(promise.name, value, limit, promise.at_most is not None, note)
