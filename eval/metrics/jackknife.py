"""Standard errors of statistics of samples in groups, by leaving out each group in turn (Tukey 1958)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from eval.metrics.figure import Figure


def jackknife(statistic: Callable[[int | None], float], groups: int) -> Figure:
    """statistic(None) of all samples; a 95 % interval from statistic(g), without group g = 0 ... G - 1.

    error^2 = (G - 1) / G sum_g (statistic(g) - mean)^2; the interval is value +- t error by Student's t with
    G - 1 degrees of freedom. Groups should be of equal sizes. extra: error, and bias = (G - 1) (mean -
    value), exact if it falls as 1/N; the bias is not subtracted, so that the interval is of statistics at
    this N.
    """
    if groups < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, not {groups}")
    value, left = statistic(None), [statistic(g) for g in range(groups)]
    mean = math.fsum(left) / groups
    error = math.sqrt((groups - 1) / groups * math.fsum((v - mean) ** 2 for v in left))
    half = student_quantile(0.975, groups - 1) * error
    return Figure(value, value - half, value + half, {"error": error, "bias": (groups - 1) * (mean - value)})


def mean_of(figures: Sequence[Figure]) -> Figure:
    """The mean of figures of equal parts of the samples, with Student's 95 % interval; of one figure, itself.

    extra: the means of theirs, `std` over the parts, and their number, `parts`.
    """
    if len(figures) == 1:
        return figures[0]
    values = [figure.value for figure in figures]
    value, std = statistics.fmean(values), statistics.stdev(values)
    half = student_quantile(0.975, len(values) - 1) * std / math.sqrt(len(values))
    extra = {name: statistics.fmean(figure.extra[name] for figure in figures) for name in figures[0].extra}
    return Figure(value, value - half, value + half, {**extra, "std": std, "parts": float(len(values))})


def student_quantile(p: float, freedom: int) -> float:
    """The quantile 0.5 <= p < 1 of Student's t with `freedom` >= 1 degrees of freedom, to 1e-10."""
    if not 0.5 <= p < 1 or freedom < 1:
        raise ValueError(
            f"a quantile of Student's t needs 0.5 <= p < 1 and freedom >= 1, not {p} and {freedom}"
        )
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < 2 * p - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(angle)), a finite sum (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term, terms = math.cos(angle) ** odd, []
    for k in range(2 + odd, freedom + 1, 2):
        terms.append(term)
        term *= (k - 1) / k * math.cos(angle) ** 2
    series = math.sin(angle) * math.fsum(terms)
    return 2 / math.pi * (angle + series) if odd else series
