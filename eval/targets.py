"""Targets: limits that a configuration sets for results, and whether they are met."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffusion.spec import check_names
from eval.metrics.registry import find_metric
from eval.results import Result, Scored
from models.files.text import strict


@dataclass(frozen=True)
class TargetParams:
    """A limit for a metric of one row, or for its ratio to that of another row.

    row, over          names of rows; over: the one to divide by
    at_most, at_least  the limit: one of the two
    note               shown with the result; empty: the two values of a ratio
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
    """A measured value and its limit, which is the largest value allowed, or (at_most=False) the smallest."""

    name: str
    value: float
    limit: float
    at_most: bool
    note: str = ""

    @property
    def met(self) -> bool:
        """False for NaN."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump, with `met`."""
        return {**strict(asdict(self)), "met": self.met}


def check_rows(targets: Sequence[TargetParams], rows: Collection[str]) -> None:
    """ValueError unless all rows that targets name exist."""
    for target in targets:
        for row in filter(None, (target.row, target.over)):
            if row not in rows:
                raise ValueError(f"the target {target.name!r} needs the row {row!r}: add it to rows")


def evaluate(params: TargetParams, results: Mapping[str, Result]) -> Target:
    """The target with its measured value, from results by the names of rows."""

    def figure(row: str) -> Scored:
        check_names(f"figure of {row}", [params.metric], results[row].figures)
        return results[row].figures[params.metric]

    value, note = figure(params.row).value, params.note
    if params.over is not None:
        other = figure(params.over)
        spread = f" ± {other.extra['std']:.3f}" if "std" in other.extra else ""
        note = note or f"{value:.3f} against {other.value:.3f}{spread}"
        value = value / other.value if other.value else float("nan")
    limit = params.at_most if params.at_most is not None else params.at_least
    assert limit is not None
    return Target(params.name, value, limit, params.at_most is not None, note)
