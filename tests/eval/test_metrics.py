"""Metrics against closed forms, brute force and the implementations that people cite, on the same
features."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from eval import Moments, frechet_distance, kernel_distance, nearest_distance
from tests.peers import scipy, torch_fidelity, torchmetrics

F64 = torch.float64


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def exact(mean: Tensor, covariance: Tensor) -> Moments:
    """Moments with exactly this mean and covariance."""
    return Moments.exactly(mean, covariance)


def assert_moments(a: Moments, mean: Tensor, covariance: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a.mean, mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.covariance, covariance, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [[1] * 100, [99, 1], [7, 0, 50, 43], [100]], ids=str)
def test_batches_and_merging_change_nothing(sizes: list[int]) -> None:
    """One pass, updates of any sizes, and merged parts give numpy's mean and covariance to 1e-12."""
    x = 3 + normal(0, 100, 5)
    updated, merged = Moments(5), Moments(5)
    for part in x.split(sizes):
        updated.update(part)
        merged.merge(Moments.of(part))
    for moments in (updated, merged, Moments.of(x)):
        assert moments.n == 100
        assert_moments(
            moments, torch.from_numpy(x.numpy().mean(0)), torch.from_numpy(np.cov(x.numpy().T)), 1e-12
        )


def test_merging_leaves_the_other_alone() -> None:
    """a.merge(b) changes a only; merging nothing changes nothing."""
    a, b = Moments.of(normal(0, 9, 3)), Moments.of(normal(1, 8, 3))
    mean, covariance = b.mean.clone(), b.covariance.clone()
    a.merge(b)
    b.merge(Moments(3))
    assert (a.n, b.n) == (17, 8)
    assert torch.equal(b.mean, mean)
    assert torch.equal(b.covariance, covariance)


def test_float32_features_far_from_zero_keep_their_covariance() -> None:
    """Features around 10 +- 0.01 in float32, in batches: within 1e-6 of the float64 truth, where E[x^2] -
    E[x]^2 in float32 is lost."""
    x = (10 + 0.01 * normal(0, 4000, 6)).float()
    truth = np.cov(x.double().numpy().T)
    moments = Moments(6)
    for part in x.split(64):
        moments.update(part)
    assert np.abs(moments.covariance.numpy() - truth).max() < 1e-6 * np.diag(truth).min()
    naive = (x.square().mean(0) - x.mean(0).square()).double().numpy()
    assert np.abs(naive - np.diag(truth)).max() > 1e-2 * np.diag(truth).min()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    """One NaN or infinity raises, says how many vectors are spoilt, and adds nothing."""
    moments, x = Moments.of(normal(0, 10, 4)), normal(1, 10, 4)
    x[[2, 2, 7], [0, 1, 3]] = bad
    with pytest.raises(ValueError, match="2 of 10 feature vectors are not finite"):
        moments.update(x)
    assert moments.n == 10


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 4, 1)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """Features of another width, or without a batch, raise and name both shapes."""
    with pytest.raises(ValueError, match=r"features must have shape \(N, 4\), not "):
        Moments(4).update(torch.zeros(shape))


def test_moments_of_different_width_are_refused() -> None:
    """Two extractors cannot be compared, and one sample has no covariance."""
    with pytest.raises(ValueError, match="different width, 4 and 5"):
        frechet_distance(Moments.of(normal(0, 9, 4)), Moments.of(normal(0, 9, 5)))
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        _ = Moments.of(normal(0, 1, 4)).covariance


def test_frechet_distance_of_commuting_covariances() -> None:
    """In a common eigenbasis it is |m_a - m_b|^2 + sum (sqrt(a_i) - sqrt(b_i))^2, zero and tiny ones
    included."""
    basis, _ = torch.linalg.qr(normal(0, 5, 5))
    a, b = (
        torch.tensor([4.0, 1e-6, 9.0, 0.0, 2.0], dtype=F64),
        torch.tensor([1.0, 3.0, 16.0, 3.0, 0.0], dtype=F64),
    )
    mean = normal(1, 2, 5)
    expected = float((mean[0] - mean[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = frechet_distance(
        *(exact(m, basis @ values.diag() @ basis.T) for m, values in zip(mean, (a, b), strict=True))
    )
    assert found == pytest.approx(expected, rel=1e-7)


def peer_scipy(x: Tensor, y: Tensor) -> float:
    (mx, cx), (my, cy) = ((z.numpy().mean(0), np.cov(z.numpy().T)) for z in (x, y))
    root = scipy.linalg.sqrtm(cx @ cy)
    return float((mx - my) @ (mx - my) + np.trace(cx + cy - 2 * root.real))


def peer_torch_fidelity(x: Tensor, y: Tensor) -> float:
    statistics = [torch_fidelity.metric_fid.fid_features_to_statistics(z) for z in (x, y)]
    return float(
        torch_fidelity.metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    )


def peer_torchmetrics(x: Tensor, y: Tensor) -> float:
    return float(torchmetrics.image.fid._compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()))


@pytest.mark.parametrize("peer", [peer_scipy, peer_torch_fidelity, peer_torchmetrics])
def test_frechet_distance_agrees_with_its_peers(peer: Callable[[Tensor, Tensor], float]) -> None:
    """Full-rank correlated features: scipy's matrix root, torch-fidelity and torchmetrics to 1e-8."""
    x, y = normal(0, 200, 16) @ normal(1, 16, 16), 0.5 + normal(2, 150, 16) @ normal(3, 16, 16)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(peer(x, y), rel=1e-8)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_frechet_distance_is_exact_below_full_rank(n: int) -> None:
    """N < D: tr (C_a C_b)^(1/2) is the nuclear norm of the centred sets' product, which needs no root of a
    singular matrix."""
    x, y = normal(0, n, 32), 1 + normal(1, n + 1, 32)
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    expected = (
        (x.mean(0) - y.mean(0)).square().sum()
        + a.square().sum()
        + b.square().sum()
        - 2 * torch.linalg.svdvals(a @ b.T).sum()
    )
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("n", [5, 500])
def test_frechet_distance_of_equal_sets_is_zero(n: int) -> None:
    """A set against itself, in any order, full rank or not: 0 to rounding, and never below it."""
    x = 3 + normal(0, n, 16)
    assert 0 <= frechet_distance(Moments.of(x), Moments.of(x.flip(0))) < 1e-9


def brute_force(x: Tensor, y: Tensor) -> float:
    """The unbiased MMD^2 by its definition, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def within(z: Tensor) -> float:
        return sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (
            len(z) * (len(z) - 1)
        )

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def peer_torch_fidelity_kid(x: Tensor, y: Tensor) -> float:
    return float(
        torch_fidelity.metric_kid.kernel_mmd(
            x.numpy(), y.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1
        )
    )


def peer_torchmetrics_kid(x: Tensor, y: Tensor) -> float:
    kid = torchmetrics.image.kid
    kernels = (kid.poly_kernel(a, b) for a, b in ((x, x), (x, y), (y, y)))
    return float(kid.maximum_mean_discrepancy(*kernels))


@pytest.mark.parametrize("sizes", [(3, 3), (20, 20), (25, 8)], ids=str)
def test_kernel_distance_is_its_definition(sizes: tuple[int, int]) -> None:
    """All pairs one by one, for sets of any sizes; and the jackknife by leaving out each sample in turn."""
    x, y = normal(0, sizes[0], 6), 0.3 + normal(1, sizes[1], 6)
    value, error = kernel_distance(x, y)
    assert value == pytest.approx(brute_force(x, y), rel=1e-10)
    if min(sizes) > 3:  # leaving one out of three leaves too few for the function itself
        without = (
            torch.tensor(
                [kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y).value for i in range(len(x))], dtype=F64
            ),
            torch.tensor(
                [kernel_distance(x, torch.cat([y[:i], y[i + 1 :]])).value for i in range(len(y))], dtype=F64
            ),
        )
        assert error == pytest.approx(
            math.sqrt(sum((len(w) - 1) * float(w.var(correction=0)) for w in without)), rel=1e-8
        )


@pytest.mark.parametrize("peer", [peer_torch_fidelity_kid, peer_torchmetrics_kid])
def test_kernel_distance_agrees_with_its_peers(peer: Callable[[Tensor, Tensor], float]) -> None:
    """torch-fidelity's and torchmetrics' polynomial MMD on one subset of all samples."""
    x, y = normal(0, 60, 16), 0.2 + normal(1, 60, 16)
    assert kernel_distance(x, y).value == pytest.approx(peer(x, y), rel=1e-9)


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_the_standard_error_is_the_spread_over_draws(shift: float) -> None:
    """Over 300 draws of two sets the mean jackknife error is the standard deviation of the value, within a
    factor of 1.3."""
    draws = [kernel_distance(normal(2 * i, 60, 4), shift + normal(2 * i + 1, 40, 4)) for i in range(300)]
    spread = float(torch.tensor([draw.value for draw in draws]).std())
    stated = float(torch.tensor([draw.error for draw in draws]).square().mean().sqrt())
    assert 1 / 1.3 < stated / spread < 1.3


def test_kernel_distance_is_unbiased() -> None:
    """Equal distributions: the mean over 300 draws is 0 within three of its standard errors."""
    values = torch.tensor(
        [kernel_distance(normal(2 * i, 20, 4), normal(2 * i + 1, 20, 4)).value for i in range(300)]
    )
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(300)


def classes(seed: int, n: int, fixed: bool) -> tuple[Tensor, Tensor]:
    """Features and labels of four classes far apart, with n/4 of each, or as many as chance gives."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4 if fixed else torch.randint(4, (n,), generator=generator)
    centre = 2 * normal(99, 4, 6)
    return centre[labels] + 0.3 * torch.randn(n, 6, generator=generator, dtype=torch.float64), labels


def test_kernel_distance_of_a_fixed_number_per_class_is_unbiased() -> None:
    """Equal distributions: 0 within three standard errors with labels, below 0 without. The jackknife's error
    is the true spread where distributions differ, and up to sqrt(2) of it where they are equal (there a
    U-statistic has no linear part).
    """
    found, plain, apart = [], [], []
    for i in range(100):
        (x, x_labels), (y, y_labels) = classes(2 * i, 40, True), classes(2 * i + 1, 60, True)
        found.append(kernel_distance(x, y, x_labels, y_labels))
        plain.append(kernel_distance(x, y).value)
        apart.append(kernel_distance(x, y + 1, x_labels, y_labels))
    values = torch.tensor([k.value for k in found])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(100)
    assert max(plain) < -10 * float(values.std())
    for kernels, factor in ((apart, 1.0), (found, math.sqrt(2))):
        spread = float(torch.tensor([k.value for k in kernels]).std())
        assert sum(k.error for k in kernels) / 100 == pytest.approx(factor * spread, rel=0.2)


def test_kernel_distance_by_class_is_that_of_the_mixture() -> None:
    """By its definition: mean kernels of every pair of classes, weighted by the classes' shares; the error by
    leaving out each sample."""
    (x, x_labels), (y, y_labels) = classes(0, 16, True), classes(1, 30, False)
    got = kernel_distance(x, y + 0.5, x_labels, y_labels)

    def value(x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor) -> float:
        def mean(a: Tensor, b: Tensor, same: bool) -> float:
            k = (a @ b.T / 6 + 1) ** 3
            return float((k.sum() - k.trace()) / (len(a) * (len(a) - 1)) if same else k.mean())

        total = 0.0
        one, other = (x, x_labels, share_x), (y, y_labels, share_y)
        for (a, la, sa), (b, lb, sb), factor in ((one, one, 1), (other, other, 1), (one, other, -2)):
            for c in range(4):
                for d in range(4):
                    total += factor * sa[c] * sb[d] * mean(a[la == c], b[lb == d], a is b and c == d)
        return total

    share_x, share_y = [0.25] * 4, [float((y_labels == c).double().mean()) for c in range(4)]
    y = y + 0.5
    assert got.value == pytest.approx(value(x, y, x_labels, y_labels), rel=1e-12)
    variance = 0.0
    for one in (True, False):
        z, labels = (x, x_labels) if one else (y, y_labels)
        for c in range(4):
            leave = []
            for i in (labels == c).nonzero()[:, 0].tolist():
                rest = torch.arange(len(z)) != i
                leave.append(
                    value(x[rest], y, x_labels[rest], y_labels)
                    if one
                    else value(x, y[rest], x_labels, y_labels[rest])
                )
            mean = sum(leave) / len(leave)
            variance += (len(leave) - 1) / len(leave) * sum((v - mean) ** 2 for v in leave)
    assert got.error == pytest.approx(math.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize("shapes", [((2, 4), (9, 4)), ((9, 4), (9, 5)), ((9,), (9,))], ids=str)
def test_kernel_distance_refuses_sets_it_cannot_compare(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Fewer than three samples, in all or in a class, or other widths, raise."""
    with pytest.raises(ValueError, match="kernel distance needs"):
        kernel_distance(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match="at least 3 samples in every set and class, not 2"):
        kernel_distance(torch.zeros(9, 4), torch.zeros(9, 4), torch.tensor([0] * 7 + [1] * 2), torch.zeros(9))
    with pytest.raises(ValueError, match="8 labels for 9 features"):
        kernel_distance(torch.zeros(9, 4), torch.zeros(9, 4), torch.zeros(8), torch.zeros(9))


@pytest.mark.parametrize("shape", [(5,), (1, 8, 8)], ids=str)
def test_nearest_distance_is_the_smallest(shape: tuple[int, ...]) -> None:
    """Pair by pair; a copy of a training image has distance 0."""
    x, reference = normal(0, 7, *shape), normal(1, 11, *shape)
    expected = torch.stack([torch.stack([(a - b).square().sum().sqrt() for b in reference]).min() for a in x])
    torch.testing.assert_close(nearest_distance(x, reference), expected)
    assert torch.all(nearest_distance(reference[3:5], reference) < 1e-6)


def test_nearest_distance_of_a_copy_in_float32() -> None:
    """Among many images of float32 a copy still has distance 0, to rounding."""
    data = normal(0, 600, 1, 8, 8, dtype=torch.float32)
    assert float(nearest_distance(data[:100], data).max()) < 1e-2
