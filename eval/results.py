"""Results as JSON: each figure has its interval and its basis, without which figures cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion.spec import check_mapping, check_type, make_params
from models.files.text import read_json, strict, write_json

Better = Literal["lower", "higher", "neither"]
Role = Literal["floor", "held_out", "ceiling"]
"""Rows that others are judged by: real pictures scored as samples are, unseen real pictures, and noise."""


@dataclass(frozen=True)
class Scored:
    """A number that can be cited.

    n          samples; of each part, where the value is a mean over parts
    basis      what two numbers that are compared must share: metric, protocol, extractor, reference, n, ...
    low, high  95 % confidence interval; NaN if unknown
    extra      `std` over `parts`, or over the splits of an Inception Score, ...
    """

    value: float
    better: Better
    n: int
    basis: dict[str, Any]
    low: float = math.nan
    high: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f"   {self.low:.5g} to {self.high:.5g}"
        return f"{self.value:.5g}{interval}"

    @property
    def random(self) -> bool:
        """Whether the network had random weights: the number means nothing outside a test."""
        return bool(self.basis.get("extractor", {}).get("random"))


@dataclass(frozen=True, repr=False)
class Result:
    """What one evaluation found.

    name      of its row in tables
    figures   by metric
    samples   where they are from, how many, the SHA-256 of their pixels; if drawn, sampler, steps, network
              calls and seconds; if given, the model's name and the row's role
    notes     what a reader should know: pictures left out, captions cut, random weights
    settings  of the evaluation
    facts     versions and machine
    """

    name: str
    figures: dict[str, Scored]
    samples: dict[str, Any]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Its name, the number of samples, and at most four figures."""
        lines = [f"{self.name}: {self.samples.get('n', 0):,} samples"]
        lines += [f"  {name:18} {figure}" for name, figure in self.figures.items()]
        if len(lines) > 6:
            lines = [*lines[:5], f"  ... and {len(lines) - 5} more figures"]
        return "\n".join(lines)

    @property
    def role(self) -> Role | None:
        """Its role in a table; None for samples."""
        found: Role | None = self.samples.get("role")
        return found

    def basis(self, metric: str) -> dict[str, Any]:
        """What another result must share for the figure to be compared: its basis, and the samples' size.

        Extractors resize pictures, which hides the details that small pictures lack.
        """
        sizes = self.samples.get("sizes") or []
        size = {"size of the samples": sizes[0] if len(sizes) == 1 else "several"} if sizes else {}
        return {**self.figures[metric].basis, **size}

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dump; NaN becomes null, which strict JSON has."""
        return dict(strict(asdict(self)))


def write_result(result: Result, path: str | Path) -> None:
    """One JSON file, whole or not at all."""
    write_json(path, result.to_json())


def read_result(path: str | Path) -> Result:
    """The inverse of `write_result`. ValueError in one line for a file that holds something else."""
    content = read_json(path)
    try:
        found = check_mapping("figures", content.get("figures"))
        figures = {
            name: make_params("", Scored, _known(check_mapping(name, value))) for name, value in found.items()
        }
        result = make_params("", Result, {**content, "figures": figures})
        _check_kinds(result)
        return result
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a result of plain-diffusion eval: {error}") from None


def _check_kinds(result: Result) -> None:
    """ValueError or OverflowError for entries that a report could not read."""
    for name, figure in result.figures.items():
        check_mapping(f"figures.{name}.basis.extractor", figure.basis.get("extractor", {}))
    check_mapping("settings.keys", result.settings.get("keys", {}))
    drawn = check_mapping("samples.settings", result.samples.get("settings") or {})
    check_type("samples.role", result.samples.get("role"), Role | None)
    check_type("samples.model", result.samples.get("model"), str | None)
    check_type("samples.sizes", result.samples.get("sizes", []), Sequence[str])
    check_type("samples.settings.steps", drawn.get("steps"), int | None)
    numbers = {name: result.samples.get(name) for name in ("calls", "seconds")}
    numbers["settings.guidance"] = drawn.get("guidance")
    for name, value in numbers.items():
        check_type(f"samples.{name}", value, float | None)
    ends = [end for figure in result.figures.values() for end in (figure.value, figure.low, figure.high)]
    for number in (*numbers.values(), *ends):
        float(number or 0)  # JSON has integers that are larger than any float


def check_comparable(results: Sequence[Result], metric: str) -> None:
    """ValueError, which names the difference, unless all results have this figure on the same basis."""
    first: Result | None = None
    for result in results:
        if metric not in result.figures:
            raise ValueError(f"{result.name!r} has no {metric}: score it with metric=[{metric}]")
        if first is None:
            first = result
        elif difference := _difference(first.basis(metric), result.basis(metric)):
            name, one, other = difference
            raise ValueError(
                f"{metric} of {first.name!r} and of {result.name!r} cannot be compared: {name} is {one} "
                f"there and {other} here; score both with the same"
            )


def comparable_parts(results: Sequence[Result], metric: str) -> list[list[Result]]:
    """The results that have the figure, in parts whose figures can be compared, in order."""
    parts: list[list[Result]] = []
    for result in results:
        if metric in result.figures:
            basis = result.basis(metric)
            for part in parts:
                if not _difference(part[0].basis(metric), basis):
                    part.append(result)
                    break
            else:
                parts.append([result])
    return parts


def _difference(
    one: Mapping[str, Any], other: Mapping[str, Any], within: str = ""
) -> tuple[str, Any, Any] | None:
    """The name of the first entry in which two bases differ, and both values."""
    for name in dict.fromkeys((*one, *other)):
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if inner := _difference(a, b, f"{within}{name} "):
                return inner
        elif a != b:
            return f"{within}{name}", _short(a), _short(b)
    return None


def _short(value: Any) -> Any:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
