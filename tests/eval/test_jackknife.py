"""The jackknife's interval against what is known of normal samples, and Student's quantile against scipy."""

from __future__ import annotations

import math

import pytest
import torch

from eval.metrics.frechet import frechet_distance
from eval.metrics.jackknife import jackknife, student_quantile
from eval.metrics.moments import GroupedMoments, Moments
from tests.eval.test_metrics import F64, exact, normal
from tests.peers import scipy


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 15, 16, 99, 1000])
def test_student_quantile_is_scipys(freedom: int) -> None:
    """At odd and even degrees of freedom, from the median to 1 - 1e-4, to 1e-10."""
    for p in (0.5, 0.6, 0.9, 0.975, 0.9999):
        assert student_quantile(p, freedom) == pytest.approx(
            scipy.stats.t.ppf(p, freedom), rel=1e-10, abs=1e-14
        )


@pytest.mark.parametrize(("p", "freedom"), [(0.4, 5), (1.0, 5), (0.975, 0)])
def test_student_quantile_refuses_what_it_cannot_give(p: float, freedom: int) -> None:
    """Below the median, at 1, and without a degree of freedom."""
    with pytest.raises(ValueError, match=r"needs 0\.5 <= p < 1 and freedom >= 1"):
        student_quantile(p, freedom)


def test_jackknife_of_a_mean_is_students_interval() -> None:
    """Of a mean of 12 in groups of one it is the textbook's: s / sqrt(12), t with 11 degrees of freedom, no
    bias."""
    x = normal(0, 12)
    found = jackknife(lambda g: float(x[torch.arange(12) != g].mean()), 12)  # no index equals None
    low, high = scipy.stats.t.interval(0.95, 11, float(x.mean()), float(x.std()) / math.sqrt(12))
    assert (found.value, found.low, found.high) == pytest.approx((float(x.mean()), low, high), rel=1e-12)
    assert found.extra["error"] == pytest.approx(float(x.std()) / math.sqrt(12), rel=1e-12)
    assert found.extra["bias"] == pytest.approx(0, abs=1e-14)


def test_jackknife_finds_a_bias_of_first_order() -> None:
    """The variance with 1/N instead of 1/(N - 1): the value less the stated bias is the unbiased one, to
    1e-12."""
    x = normal(0, 20)
    found = jackknife(lambda g: float(x[torch.arange(20) != g].var(correction=0)), 20)
    assert found.value - found.extra["bias"] == pytest.approx(float(x.var()), rel=1e-12)
    with pytest.raises(ValueError, match="at least 2 groups, not 1"):
        jackknife(lambda g: 0.0, 1)


def test_the_interval_of_a_mean_covers_the_truth() -> None:
    """Means of 48 normal numbers in 16 groups: 95 % of 2000 intervals hold 0, within three standard errors of
    that share."""
    x = normal(0, 2000, 3, 16)
    covered = 0
    for draw in x.mean(1):
        found = jackknife(
            lambda g, draw=draw: float(draw.mean() if g is None else (draw.sum() - draw[g]) / 15),  # type: ignore[misc]
            16,
        )
        covered += found.low < 0 < found.high
    assert abs(covered / 2000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_the_interval_of_a_frechet_distance_covers_its_mean() -> None:
    """Frechet distances of 4 dimensions from 400 samples in 16 groups: 95 % of 300 intervals hold their mean,
    within 4 %, and the error stated is their spread, within 15 %.
    """
    reference = exact(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64))
    scale = torch.linspace(0.5, 2, 4, dtype=F64)
    found = []
    for i in range(300):
        grouped = GroupedMoments(4)
        grouped.update(torch.arange(400), 0.5 + scale * normal(i, 400, 4))
        whole, parts = grouped.whole(), [grouped.group(g) for g in range(16)]

        def statistic(g: int | None, whole: Moments = whole, parts: list[Moments] = parts) -> float:
            return frechet_distance(whole if g is None else whole.without(parts[g]), reference)

        found.append(jackknife(statistic, 16))
    values = torch.tensor([f.value for f in found], dtype=F64)
    share = sum(f.low < float(values.mean()) < f.high for f in found) / 300
    stated = torch.tensor([f.extra["error"] for f in found]).square().mean().sqrt()
    assert abs(share - 0.95) < 0.04
    assert float(stated) == pytest.approx(float(values.std()), rel=0.15)
