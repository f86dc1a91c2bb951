"""Kernel distances in blocks, over subsets as papers cite them, and with a Gaussian kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eval.metrics import kernel
from eval.metrics.kernel import gaussian_distance, kernel_distance, subset_kernel_distance
from tests.eval.test_metrics import classes, normal
from tests.peers import torch_fidelity, torchmetrics


@pytest.mark.parametrize("rows", [1, 7, 60])
def test_blocks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without labels, any number of rows of the kernel at a time: value, error and CMMD to 1e-12."""
    (x, x_labels), (y, y_labels) = classes(0, 40, True), classes(1, 60, False)
    whole = kernel_distance(x, y), kernel_distance(x, y, x_labels, y_labels)
    gaussian = gaussian_distance(x, y)
    monkeypatch.setattr(kernel, "ROWS", rows)
    for found, expected in zip(
        (kernel_distance(x, y), kernel_distance(x, y, x_labels, y_labels)), whole, strict=True
    ):
        assert tuple(found) == pytest.approx(tuple(expected), rel=1e-12)
    assert tuple(gaussian_distance(x, y)) == pytest.approx(tuple(gaussian), rel=1e-12)


@pytest.mark.parametrize("sizes", [(60, 90), (200, 50)], ids=str)
def test_subsets_are_torch_fidelitys(sizes: tuple[int, int]) -> None:
    """Mean and standard deviation over 20 subsets of 50, from the same numbers for a seed: to 1e-10."""
    x, y = normal(0, sizes[0], 16), 0.2 + normal(1, sizes[1], 16)
    theirs = torch_fidelity.metric_kid.kid_features_to_metric(
        x, y, kid_subsets=20, kid_subset_size=50, rng_seed=2020, verbose=False, kid_kernel="poly"
    )
    found = subset_kernel_distance(x, y, 20, 50)
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    assert found.error == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-10)
    assert found != subset_kernel_distance(x, y, 20, 50, seed=1)


def test_a_subset_is_torchmetrics_polynomial_mmd() -> None:
    """One subset of all samples, to 1e-10; and the unbiased distance on all pairs is the same."""
    x, y = normal(0, 60, 16), 0.2 + normal(1, 60, 16)
    kid = torchmetrics.image.kid
    kernels = (kid.poly_kernel(a, b) for a, b in ((x, x), (x, y), (y, y)))
    expected = float(kid.maximum_mean_discrepancy(*kernels))
    found = subset_kernel_distance(x, y, 1, 60)
    assert found == pytest.approx((expected, 0), rel=1e-10)
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-10)


def test_torch_fidelity_loses_float32_features() -> None:
    """On float32 features, as networks give them, its kernel is in float32, too: off by over 1e-5 where
    features are like Inception's (0.4 +- 0.4) and distances small; ours is that of float64.
    """
    x, y = (0.4 + 0.4 * normal(0, 300, 256)).abs().float(), (0.4 + 0.4 * normal(1, 300, 256)).abs().float()
    settings = dict(kid_subsets=5, kid_subset_size=200, rng_seed=2020, verbose=False, kid_kernel="poly")
    truth = torch_fidelity.metric_kid.kid_features_to_metric(x.double(), y.double(), **settings)[
        "kernel_inception_distance_mean"
    ]
    theirs = torch_fidelity.metric_kid.kid_features_to_metric(x, y, **settings)[
        "kernel_inception_distance_mean"
    ]
    assert abs(theirs - truth) > 1e-5 * abs(truth)
    assert subset_kernel_distance(x, y, 5, 200).value == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize(("subsets", "size"), [(100, 1000), (0, 10), (5, 1)])
def test_subsets_that_cannot_be_drawn_are_refused(subsets: int, size: int) -> None:
    """More than there are samples; none; or of one sample. One line says what there is."""
    with pytest.raises(
        ValueError, match=f"{subsets} subsets of {size} samples cannot be drawn from 20 and 30"
    ):
        subset_kernel_distance(normal(0, 20, 4), normal(1, 30, 4), subsets, size)


def cmmd(x: Tensor, y: Tensor) -> float:
    """Pair by pair, the diagonal included."""

    def mean(a: Tensor, b: Tensor) -> float:
        return float(np.mean([np.exp(-float((p - q).square().sum()) / (2 * 10**2)) for p in a for q in b]))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("unit", [True, False])
def test_gaussian_distance_is_its_definition(unit: bool) -> None:
    """Pair by pair to 1e-9 of the biased squared distance times 1000; on embeddings of length 1, where it is
    small, too."""
    x, y = normal(0, 12, 8), 0.5 + normal(1, 15, 8)
    if unit:
        x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    assert gaussian_distance(x, y).value == pytest.approx(cmmd(x, y), rel=1e-9)
    assert gaussian_distance(x, x.flip(0)).value == pytest.approx(0, abs=1e-11)


def test_error_of_the_gaussian_distance_is_that_of_a_jackknife() -> None:
    """Each sample of either set left out in turn, by brute force, to 1e-9; and it is the spread of many draws
    within a third."""
    x, y = normal(0, 12, 8), 3 + normal(1, 15, 8)

    def without(z: Tensor, i: int) -> Tensor:
        return torch.cat([z[:i], z[i + 1 :]])

    left = [
        torch.tensor(values, dtype=torch.float64)
        for values in (
            [cmmd(without(x, i), y) for i in range(12)],
            [cmmd(x, without(y, i)) for i in range(15)],
        )
    ]
    expected = sum(float((len(v) - 1) / len(v) * (v - v.mean()).square().sum()) for v in left) ** 0.5
    assert gaussian_distance(x, y).error == pytest.approx(expected, rel=1e-9)
    draws = [gaussian_distance(normal(2 * k, 40, 8), 3 + normal(2 * k + 1, 40, 8)) for k in range(200)]
    spread = float(torch.tensor([draw.value for draw in draws]).std())
    assert 0.75 < sum(draw.error for draw in draws) / len(draws) / spread < 1.33


def test_gaussian_distance_of_two_points() -> None:
    """One sample each at a distance of 10 sqrt(2): 2000 (1 - 1/e)."""
    x, y = torch.zeros(1, 2), torch.tensor([[10.0, 10.0]])
    assert gaussian_distance(x, y).value == pytest.approx(2000 * (1 - np.exp(-1)), rel=1e-13)
    with pytest.raises(ValueError, match="two \\(N, D\\) sets of equal width"):
        gaussian_distance(x[:0], y)


def test_a_thousand_classes_cost_no_more_than_one() -> None:
    """3 samples in each of 1,000 classes, by the whole matrix of the kernel: value to 1e-10, no tensor larger
    than a block of it."""
    x, y, labels = normal(0, 3000, 4), 0.3 + normal(1, 3000, 4), torch.arange(3000) % 1000
    same = labels[:, None] == labels

    def within(z: Tensor) -> float:
        k = ((z @ z.T / 4 + 1) ** 3).fill_diagonal_(0)
        return float((k * (~same + same * 3 / 2)).sum() / 3000**2)

    with Largest() as largest:  # type: ignore[no-untyped-call]
        found = kernel_distance(x, y, labels, labels)
    assert found.value == pytest.approx(
        within(x) + within(y) - 2 * float(((x @ y.T / 4 + 1) ** 3).mean()), rel=1e-10
    )
    assert largest.numel <= kernel.ROWS * 3000


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made meanwhile."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result
