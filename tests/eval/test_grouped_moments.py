"""Moments by groups: what is left when a group is taken away, and the same bits however samples came."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import GroupedMoments, Moments
from tests.eval.test_metrics import F64, assert_moments, normal


def same(a: Moments, b: Moments) -> bool:
    """Every bit."""
    return a.n == b.n and torch.equal(a.mean, b.mean) and torch.equal(a._scatter, b._scatter)


def grouped(x: Tensor, sizes: list[int], groups: int = 4, block: int = 8) -> GroupedMoments:
    """All rows of x in batches of these sizes, over and over."""
    moments, start, turn = GroupedMoments(x.shape[1], groups, block), 0, 0
    while start < len(x):
        rows = torch.arange(start, min(len(x), start + sizes[turn % len(sizes)]))
        moments.update(rows, x[rows])
        start, turn = start + len(rows), turn + 1
    return moments


@pytest.mark.parametrize("sizes", [(60, 40), (1, 99), (50, 50)], ids=str)
def test_merging_prefers_neither_side(sizes: tuple[int, int]) -> None:
    """a.merge(b) and b.merge(a) end in the same bits, also where values are 10 +- 0.01; numpy's to 1e-12."""
    x = 10 + 0.01 * normal(0, 100, 6)
    a, b = (Moments.of(part) for part in x.split(list(sizes)))
    b_first = Moments.of(x[sizes[0] :])
    b_first.merge(a)
    a.merge(b)
    assert same(a, b_first)
    assert_moments(a, torch.from_numpy(x.numpy().mean(0)), torch.from_numpy(np.cov(x.numpy().T)), 1e-12)


def test_merging_equal_means_keeps_them() -> None:
    """Features that never change have no variance at all, however they are merged."""
    x = torch.full((1, 3), 0.1, dtype=F64)
    moments = Moments(3)
    for n in (1, 4, 8, 2):
        moments.merge(Moments.of(x.expand(n, 3)))
    assert torch.equal(moments.mean, x[0])
    assert not moments.covariance.any()


@pytest.mark.parametrize("n", [2, 30, 99])
def test_without_is_the_inverse_of_merge(n: int) -> None:
    """What is left of 100 samples around 10 +- 0.01 without n of them is the moments of the others, to 1e-12
    of the covariance."""
    x = 10 + 0.01 * normal(0, 100, 6)
    rest = Moments.of(x).without(Moments.of(x[:n]))
    truth = Moments.of(x[n:])
    assert rest.n == 100 - n
    assert float((rest.mean - truth.mean).abs().max()) < 1e-12 * (100 / (100 - n))
    assert float((rest._scatter - truth._scatter).abs().max()) < 1e-11 * float(
        Moments.of(x)._scatter.abs().max()
    )
    assert Moments.of(x).without(Moments.of(x)).n == 0
    with pytest.raises(ValueError, match="moments of 100 samples cannot be a part of 50"):
        Moments.of(x[:50]).without(Moments.of(x))


def test_states_keep_every_bit() -> None:
    """Moments are plain float64 tensors in between, and the state is no window on them."""
    moments = Moments.of(normal(0, 9, 5))
    state = moments.state_dict()
    back = Moments.from_state(state)
    moments.update(normal(1, 9, 5))
    assert same(back, Moments.of(normal(0, 9, 5)))
    back.update(normal(1, 9, 5))
    assert same(back, moments)
    assert all(type(value) is Tensor for value in state.values())


@pytest.mark.parametrize("sizes", [[1], [7], [8, 3, 50], [64], [1000]], ids=str)
def test_batches_do_not_change_a_bit(sizes: list[int]) -> None:
    """Any batches; numpy's moments to 1e-12 of everything, of each group, and of everything but it."""
    x = 3 + normal(0, 150, 5)
    found = grouped(x, sizes)
    assert found.n == 150
    assert same(found.whole(), grouped(x, [13]).whole())
    for which, moments in [(torch.ones(150, dtype=torch.bool), found.whole())] + [
        case
        for g in range(4)
        for case in (
            (torch.arange(150) % 4 == g, found.group(g)),
            (torch.arange(150) % 4 != g, found.without(g)),
        )
    ]:
        assert moments.n == int(which.sum())
        assert_moments(
            moments,
            torch.from_numpy(x[which].numpy().mean(0)),
            torch.from_numpy(np.cov(x[which].numpy().T)),
            1e-12,
        )


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_sharing_groups_among_processes_does_not_change_a_bit(processes: int) -> None:
    """Group g with process g % processes, batches of other sizes in each, merged in either order, through
    their states."""
    x = 3 + normal(0, 150, 5)
    shares = []
    for p in range(processes):
        share = GroupedMoments(5, 6, 8)
        mine = torch.tensor([i for i in range(150) if i % 6 % processes == p], dtype=torch.long)
        for rows in mine.split(3 + p):
            share.update(rows, x[rows])
        shares.append(share.state_dict())
    for order in (shares, shares[::-1]):
        merged = GroupedMoments(5, 6, 8)
        for state in order:
            merged.merge(GroupedMoments.from_state(state))
        assert same(merged.whole(), grouped(x, [32], groups=6).whole())
        assert same(merged.without(2), grouped(x, [32], groups=6).without(2))


@pytest.mark.parametrize("at", [0, 1, 31, 64, 77])
def test_saving_and_resuming_does_not_change_a_bit(at: int) -> None:
    """Rows that await a full block are saved, too; looking at the result on the way changes nothing."""
    x = 3 + normal(0, 150, 5)
    first = GroupedMoments(5, 4, 8)
    first.update(torch.arange(at), x[:at])
    resumed = GroupedMoments.from_state(first.state_dict())
    resumed.whole()
    for moments in (first, resumed):
        moments.update(torch.arange(at, 150), x[at:])
        assert same(moments.whole(), grouped(x, [32]).whole())


def test_merging_equal_groups_of_other_samples() -> None:
    """The moments of both, group by group, to 1e-12; either order gives the same bits; and counting goes on
    behind both."""
    x = 3 + normal(0, 150, 5)
    a, b, b_first = GroupedMoments(5, 4, 8), GroupedMoments(5, 4, 8), GroupedMoments(5, 4, 8)
    a.update(torch.arange(70), x[:70])
    b.update(torch.arange(70, 150), x[70:])
    b_first.merge(b)
    b_first.merge(a)
    a.merge(b)
    assert same(a.whole(), b_first.whole())
    assert_moments(
        a.group(1),
        torch.from_numpy(x[1::4].numpy().mean(0)),
        torch.from_numpy(np.cov(x[1::4].numpy().T)),
        1e-12,
    )
    with pytest.raises(ValueError, match="sample 101 came after sample 149 of its group"):
        a.update(torch.tensor([101]), x[:1])
    with pytest.raises(ValueError, match=r"different dim, groups, block: \(5, 4, 8\) and \(5, 4, 9\)"):
        a.merge(GroupedMoments(5, 4, 9))


@pytest.mark.parametrize("indices", [[0, 1, 8, 4], [3, 3], [5], [-1]], ids=str)
def test_samples_out_of_order_or_repeated_are_refused(indices: list[int]) -> None:
    """Within a group; and then nothing has been taken in."""
    moments = GroupedMoments(3, 4, 8)
    moments.update(torch.tensor([9]), normal(0, 1, 3))
    with pytest.raises(ValueError, match="each must come once, in order"):
        moments.update(torch.tensor(indices), normal(1, len(indices), 3))
    assert moments.n == 1
    moments.update(torch.tensor([6, 13, 3, 7]), normal(1, 4, 3))  # across groups any order will do


def test_features_that_cannot_be_used_are_refused() -> None:
    """NaN says how many vectors have one; other shapes say what would be right; nothing is taken in."""
    moments, bad = GroupedMoments(3, 4, 8), normal(0, 5, 3)
    bad[1, :2], bad[3, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 5 feature vectors are not finite"):
        moments.update(torch.arange(5), bad)
    with pytest.raises(ValueError, match=r"\(4,\) indices for 5 feature vectors"):
        moments.update(torch.arange(4), normal(0, 5, 3))
    with pytest.raises(ValueError, match=r"must have shape \(N, 3\)"):
        moments.update(torch.arange(5), normal(0, 5, 4))
    with pytest.raises(ValueError, match="must be at least 1, not 3, 0 and 8"):
        GroupedMoments(3, 0, 8)
    assert moments.n == 0
    assert GroupedMoments.from_state(moments.state_dict()).n == 0


def test_memory_does_not_grow_with_samples() -> None:
    """At most a block less one row waits in a group."""
    moments = GroupedMoments(3, 2, 4)
    for i in range(100):
        moments.update(torch.tensor([i]), normal(i, 1, 3))
        assert len(moments.state_dict()["pending"]) <= 2 * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_wide_features_are_bitwise_too(threads: int) -> None:
    """512 features in batches of other sizes, on one thread and on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = normal(0, 300, 512, dtype=torch.float32)
        assert same(grouped(x, [7], 2, 64).whole(), grouped(x, [300], 2, 64).whole())
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_cuda_features_stay_there() -> None:
    """Sums are made where features are, bitwise the same in other batches and resumed from a state on the
    CPU; numpy's to 1e-12."""
    x = 3 + normal(0, 150, 5)
    first, second = GroupedMoments(5, 4, 8), GroupedMoments(5, 4, 8)
    first.update(torch.arange(150), x.cuda())
    second.update(torch.arange(77), x[:77].cuda())
    second = GroupedMoments.from_state(second.state_dict())
    second.update(torch.arange(77, 150), x[77:].cuda())
    assert first.whole().mean.is_cuda
    assert same(first.whole(), second.whole())
    on_cpu = Moments.from_state({name: value.cpu() for name, value in first.whole().state_dict().items()})
    assert_moments(on_cpu, torch.from_numpy(x.numpy().mean(0)), torch.from_numpy(np.cov(x.numpy().T)), 1e-12)
    assert frechet_distance(first.whole(), Moments.of(x)) < 1e-12
