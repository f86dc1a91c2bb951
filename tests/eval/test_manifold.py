"""Precision, recall, density and coverage: equal counts by brute force and by their peers, copies and ties
included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval.metrics import distances, manifold
from eval.metrics.distances import nearest, nearest_others, squared_distances
from eval.metrics.manifold import density_coverage, precision_recall
from tests.eval.test_metrics import F64, normal
from tests.peers import prdc, torch_fidelity


def brute_force(x: Tensor, y: Tensor, k: int) -> tuple[float, float, float, float]:
    """By differences of all pairs at once: precision, recall, density, coverage of x against y."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] - b).square().sum(-1).sqrt()

    to_x, to_y = (distance(z, z).sort(1).values[:, k] for z in (x, y))  # column 0 is the row itself
    d = distance(x, y)
    precision, recall = (
        float((d <= to_y).any(1).double().mean()),
        float((d <= to_x[:, None]).any(0).double().mean()),
    )
    return (
        precision,
        recall,
        float((d < to_y).double().sum()) / (k * len(x)),
        float((d < to_y).any(0).double().mean()),
    )


def grid(seed: int, n: int) -> Tensor:
    """Points with whole coordinates around 1000: many at equal distances, many the same."""
    return (1000 + 2 * normal(seed, n, 2)).round()


def with_copies(seed: int, n: int) -> Tensor:
    """Rows of which every third is a copy of another set's row, far from zero."""
    return torch.where(
        torch.arange(n)[:, None] % 3 == 0, 10 + 0.01 * normal(0, 400, 5)[:n], 10 + 0.01 * normal(seed, n, 5)
    )


CASES = {
    "normal": (normal(0, 120, 6), 0.8 + normal(1, 90, 6)),
    "apart": (normal(0, 40, 6), 50 + normal(1, 40, 6)),
    "copies far from zero": (with_copies(1, 120), with_copies(2, 100)),
    "grid": (grid(0, 100), grid(1, 80)),
    "all the same": (torch.ones(20, 3, dtype=F64), torch.ones(30, 3, dtype=F64)),
    "the same set": (normal(0, 60, 4), normal(0, 60, 4)),
}


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_counts_are_exact(case: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to brute force, in blocks of 16 rows."""
    monkeypatch.setattr(distances, "ROWS", 16)
    monkeypatch.setattr(manifold, "ROWS", 16)
    x, y = CASES[case]
    found = (*precision_recall(x, y, k), *density_coverage(x, y, k)[:2])
    assert found == pytest.approx(brute_force(x, y, k), rel=1e-15)


def test_torch_fidelity_counts_the_same() -> None:
    """Precision and recall with 3 neighbours: its figures, which it keeps in float32."""
    x, y = CASES["normal"]
    theirs = torch_fidelity.metric_prc.prc_features_to_metric(
        x, y, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=False, verbose=False
    )
    assert tuple(precision_recall(x, y)) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


def test_prdc_counts_the_same() -> None:
    """All four with 5 neighbours, where nothing lies on a border, of which it keeps points out for precision
    and recall as well."""
    x, y = CASES["normal"]
    theirs = prdc.compute_prdc(y.numpy(), x.numpy(), nearest_k=5)
    assert tuple(precision_recall(x, y, 5)) == pytest.approx(
        (theirs["precision"], theirs["recall"]), rel=1e-15
    )
    assert density_coverage(x, y)[:2] == pytest.approx((theirs["density"], theirs["coverage"]), rel=1e-15)


def test_torch_fidelity_miscounts_far_from_zero() -> None:
    """float32 features of 10 +- 0.01: its distances, through a matrix product in float32, put over a tenth of
    the samples on the wrong side of a border; ours are counted as by brute force.
    """
    x, y = (10.001 + 0.01 * normal(0, 200, 32)).float(), (10 + 0.01 * normal(1, 200, 32)).float()
    theirs = torch_fidelity.metric_prc.prc_features_to_metric(
        x, y, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=False, verbose=False
    )
    truth = brute_force(x.double(), y.double(), 3)
    assert tuple(precision_recall(x, y)) == pytest.approx(truth[:2], rel=1e-15)
    assert abs(theirs["precision"] - truth[0]) > 0.1


def test_nearest_is_exact_where_products_are_not() -> None:
    """Rows that differ by 1e-9 around 1000: right neighbours and distances to 1e-4 (of what float64 holds
    there), copies at exactly 0."""
    base = 1000 + normal(0, 300, 8)
    x = base + 1e-9 * normal(1, 300, 8)
    found = nearest(x, base)
    expected = (x - base).square().sum(1).sqrt()
    assert torch.equal(found.index[:, 0], torch.arange(300))
    assert torch.equal(found.distance[:, 0], expected)
    rounded = squared_distances(x, base).diagonal().sqrt()
    assert float((rounded / expected - 1).abs().max()) > 1
    assert not nearest(base, base).distance.any()
    assert torch.equal(nearest_others(torch.cat([base, base])).index[:, 0], torch.arange(600).roll(300))


@pytest.mark.parametrize(
    "sets",
    [(torch.zeros(0, 4), torch.zeros(9, 4)), (torch.zeros(9, 3), torch.zeros(9, 4))],
    ids=["empty", "widths"],
)
def test_sets_that_cannot_be_compared_are_refused(sets: tuple[Tensor, Tensor]) -> None:
    """Empty ones and other widths; and too few for k neighbours."""
    for measure in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="equal width are needed"):
            measure(*sets)
        with pytest.raises(ValueError, match="3 nearest neighbours need 3 candidates, not 2"):
            measure(torch.zeros(9, 4), torch.zeros(3, 4), 3)
