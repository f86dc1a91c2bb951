"""The Frechet distance by closed forms on either of its two paths, where its peers are off, and what it tends
to with more samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.metrics import frechet
from eval.metrics.frechet import Reference, frechet_distance, frechet_infinity
from eval.metrics.moments import GroupedMoments, Moments
from tests.eval.test_metrics import F64, exact, normal, peer_scipy, peer_torchmetrics
from tests.peers import torchmetrics

WIDE = 300  # more than one block of the product


def rotated(values: Tensor) -> Moments:
    """Moments with these eigenvalues, in a basis that is always the same."""
    basis, _ = torch.linalg.qr(normal(9, len(values), len(values)))
    covariance = (basis * values) @ basis.T
    return exact(torch.zeros(len(values), dtype=F64), (covariance + covariance.T) / 2)


def from_data(x: Tensor, y: Tensor) -> float:
    """The distance from singular values of the centred features, without any covariance."""
    a, b = ((z.double() - z.double().mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    difference = (x.double().mean(0) - y.double().mean(0)).square().sum()
    return float(difference + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let torch.linalg's function of this name raise."""

    def raising(*_: object) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(torch.linalg, name, raising)


@pytest.mark.parametrize("exponent", [0, -2, -4])
def test_full_rank_closed_form(exponent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues over up to four orders on either side, ordered alike and oppositely: sum (sqrt(a_i) -
    sqrt(b_i))^2 to 1e-9, by Cholesky and eigenvalues only.
    """
    a, b = torch.logspace(0, exponent, WIDE, dtype=F64), torch.logspace(1, exponent, WIDE, dtype=F64)
    cases = [
        (rotated(a), rotated(other), float((a.sqrt() - other.sqrt()).square().sum()))
        for other in (b, b.flip(0))
    ]
    forbid(monkeypatch, "svdvals")
    forbid(monkeypatch, "eigh")
    for one, other, expected in cases:
        assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [20, 60])
def test_few_samples_need_no_decomposition_of_the_whole(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """N well below D: the range of either covariance is enough, to 1e-9 of the distance from singular values
    of the data."""
    x, y = normal(20, n, WIDE), 1 + normal(21, n + 7, WIDE)
    whole = torch.linalg.eigh

    def small(matrix: Tensor) -> tuple[Tensor, Tensor]:
        assert len(matrix) < WIDE
        return whole(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", small)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(from_data(x, y), rel=1e-9)


def test_a_rank_that_is_not_true_is_noticed() -> None:
    """Moments that say to be of 3 samples, and have full rank, are decomposed whole."""
    a, b = rotated(torch.logspace(0, -2, WIDE, dtype=F64)), rotated(torch.logspace(1, -2, WIDE, dtype=F64))
    expected = frechet_distance(a, b)
    few = Moments.from_state({"n": torch.tensor(3), "mean": a.mean, "scatter": 2 * a.covariance})
    assert frechet_distance(few, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, few) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "ranks", [(40, 40), (40, 90), (90, 40), (40, WIDE), (WIDE, 40), (0, 40), (40, 0), (0, 0)], ids=str
)
def test_rank_deficient_closed_form(ranks: tuple[int, int]) -> None:
    """The same with eigenvalues of 0 on one side or both, in the same directions and in others, to 1e-9."""
    a, b = (
        torch.where(torch.arange(WIDE) < rank, torch.logspace(1, -2, WIDE, dtype=F64), 0) for rank in ranks
    )
    for other in (b, b.flip(0), b.roll(20)):
        expected = float((a.sqrt() - other.sqrt()).square().sum())
        assert frechet_distance(rotated(a), rotated(other)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [(2, 2), (20, 200), (200, 20), (299, 299), (300, 301), (50, 2000)], ids=str)
def test_fewer_samples_than_features(sizes: tuple[int, int]) -> None:
    """Draws of N < D, N = D and N > D: what singular values of the features themselves give, to 1e-9."""
    x, y = normal(0, sizes[0], WIDE), 0.3 + 1.5 * normal(1, sizes[1], WIDE)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(from_data(x, y), rel=1e-9)


@pytest.mark.parametrize("n", [100, 2000])
def test_features_far_from_zero(n: int) -> None:
    """float32 features of 10 +- 0.01, N < D and N > D: within 1e-6 of the float64 truth."""
    x, y = (10 + 0.01 * normal(0, n, WIDE)).float(), (10.001 + 0.012 * normal(1, n, WIDE)).float()
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(from_data(x, y), rel=1e-6)


@pytest.mark.parametrize("n", [100, 2000])
def test_torchmetrics_is_off_far_from_zero(n: int) -> None:
    """Features of 10 +- 0.01: its sums of x x^T less n mean mean^T are off by over 10 % where it is set to
    float32, and by over 1e-8 as it comes (N < D, or the result in float32); ours by less than 1e-12 of the
    same float32 features.
    """
    x, y = (10 + 0.01 * normal(0, n, 200)).float(), (10.001 + 0.012 * normal(1, n, 200)).float()
    truth = from_data(x, y)
    default, low = (
        torchmetrics.image.fid.FrechetInceptionDistance(nn.Identity(), input_img_size=(200,))
        for _ in range(2)
    )
    for metric, bound in ((default, 1e-8), (low.set_dtype(torch.float32), 0.1)):
        for features, real in ((x, True), (y, False)):
            metric.update(features, real=real)
        assert abs(float(metric.compute()) - truth) > bound * truth
    assert abs(frechet_distance(Moments.of(x), Moments.of(y)) - truth) < 1e-12 * truth


def test_peers_are_off_below_full_rank() -> None:
    """N < D: roots of the rounding noise around eigenvalues of 0. scipy's matrix root and torchmetrics'
    eigenvalues of the product, which is not symmetric, are off by over 1e-8 of the truth in float64; ours by
    less than 1e-10.
    """
    x, y = normal(0, 40, 200), normal(1, 60, 200)
    truth = from_data(x, y)
    scipys, theirs = peer_scipy(x, y), peer_torchmetrics(x, y)
    assert min(abs(scipys - truth), abs(theirs - truth)) > 1e-8 * truth
    assert abs(frechet_distance(Moments.of(x), Moments.of(y)) - truth) < 1e-10 * truth


@pytest.mark.parametrize("n", [30, 500])
def test_a_reference_changes_nothing(n: int) -> None:
    """Its root is that of its covariance, to 1e-13; the distance is bitwise that of its moments, and
    symmetric to 1e-10."""
    x, y = Moments.of(normal(0, n, WIDE)), Moments.of(0.2 + normal(1, 2 * n, WIDE))
    reference = Reference(y)
    torch.testing.assert_close(reference.root @ reference.root.T, y.covariance, rtol=1e-13, atol=1e-13)
    assert torch.equal(reference.root, reference.root.tril())
    assert reference.root.shape == (WIDE, min(WIDE, 2 * n - 1))
    assert frechet_distance(x, reference) == frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-10)


def test_infinity_is_where_the_bias_ends() -> None:
    """Normal samples whose distance to a reference is known, 200 in 8 dimensions: over 100 draws the mean of
    FID-infinity is within three standard errors of the truth, and that of the distance of all samples is not.
    """
    scale = torch.linspace(0.5, 1.5, 8, dtype=F64)
    reference = Reference(exact(torch.zeros(8, dtype=F64), torch.eye(8, dtype=F64)))
    truth = float((scale - 1).square().sum())
    found = [frechet_infinity(scale * normal(i, 200, 8), reference) for i in range(100)]
    for values, close in (([f.value for f in found], True), ([f.extra["all"] for f in found], False)):
        error = float(np.std(values, ddof=1)) / 10
        assert (abs(float(np.mean(values)) - truth) < 3 * error) == close


def test_infinity_is_the_intercept_of_its_points() -> None:
    """15 subsets from half to all of few samples, from 5,000 to all of many: numpy's line through the
    distances; the same for a seed."""
    x, reference = normal(0, 12000, 2), Moments.of(0.1 + normal(1, 900, 2))
    random, values = np.random.RandomState(3), []
    sizes = np.linspace(5000, 12000, 15).astype(int)
    for n in sizes:
        values.append(frechet_distance(Moments.of(x[random.permutation(12000)[:n]]), reference))
    slope, intercept = np.polyfit(1 / sizes, values, 1)
    found = frechet_infinity(x, reference, seed=3)
    assert (found.value, found.extra["slope"]) == pytest.approx((intercept, slope), rel=1e-6)
    assert found.extra["all"] == pytest.approx(frechet_distance(Moments.of(x), reference), rel=1e-12)
    assert found.extra["smallest"] == 5000
    assert frechet_infinity(x[:100], reference).extra["smallest"] == 50
    assert frechet_infinity(x[:100], reference) == frechet_infinity(x[:100], reference)


def test_infinity_of_groups() -> None:
    """Of grouped moments subsets are groups: of 16, half to all of few samples make 9 points. Too few samples
    or groups raise."""
    x, grouped = normal(0, 400, 3), GroupedMoments(3, 16, 8)
    grouped.update(torch.arange(400), x)
    found = frechet_infinity(grouped, Moments.of(normal(1, 400, 3)))
    assert (found.extra["points"], found.extra["smallest"]) == (9, 200)
    assert found.extra["all"] == pytest.approx(
        frechet_distance(Moments.of(x), Moments.of(normal(1, 400, 3))), rel=1e-9
    )
    with pytest.raises(ValueError, match="needs at least 30 samples, in at least 3 groups, not 29 in 29"):
        frechet_infinity(x[:29], Moments.of(x))
    with pytest.raises(ValueError, match="not 0 in 17"):
        frechet_infinity(GroupedMoments(3), Moments.of(x))


def test_infinity_of_an_exact_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances of 2 + 30/n give 2, to 1e-12."""
    monkeypatch.setattr(frechet, "frechet_distance", lambda part, reference: 2 + 30 / part.n)
    assert frechet_infinity(normal(0, 60, 3), Moments.of(normal(1, 9, 3))).value == pytest.approx(
        2, rel=1e-12
    )
