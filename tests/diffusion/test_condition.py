"""Conditions: a batch of them is cut, joined, moved and dropped as its samples would be alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion import NONE, Condition


def some(n: int = 3, length: int = 4, mask: bool = False) -> Condition:
    there = torch.arange(length) < torch.arange(1, n + 1)[:, None] if mask else None
    return Condition(context=torch.randn(n, length, 5), mask=there, label=torch.arange(n))


def same(a: Condition, b: Condition) -> None:
    assert type(a) is type(b)
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items():
        assert torch.equal(value, b.tensors[name])


def test_rows_are_cut_and_joined_again() -> None:
    """By slice, by list and by mask; and one row is expanded to several."""
    whole = some(mask=True)
    same(Condition.cat([whole[:1], whole[[1, 2]]]), whole)
    same(whole[torch.tensor([True, False, True])], whole[[0, 2]])
    same(whole[:1].expand(2), whole[[0, 0]])
    assert len(whole) == 3
    assert whole
    assert not NONE


def test_contexts_of_different_lengths_are_joined_with_a_mask() -> None:
    """What is filled up is not there: each sample's own tokens are those that its mask shows."""
    long, short = some(2, 6), some(1, 4)
    both = Condition.cat([long, short])
    assert both.context is not None
    assert both.mask is not None
    assert both.mask.sum(1).tolist() == [6, 6, 4]
    assert torch.equal(both.context[2][both.mask[2]], short.tensors["context"][0])
    masked = Condition.cat([some(2, 4, mask=True), some(1, 4)])
    assert masked.mask is not None
    assert masked.mask.sum(1).tolist() == [1, 2, 4]


def test_a_null_takes_the_place_of_what_it_names() -> None:
    """In the dtype that was there; what it does not name stays; a context without a mask takes the mask
    away."""
    whole = Condition(
        context=torch.randn(2, 4, 5).half(),
        mask=torch.ones(2, 4, dtype=torch.bool),
        label=torch.tensor([3, 4]),
    )
    null = whole.updated(Condition(context=torch.zeros(1, 6, 5)))
    same(null, Condition(context=torch.zeros(2, 6, 5).half(), label=whole.label))
    with pytest.raises(ValueError, match="no condition 'vector' to replace"):
        whole.updated(Condition(vector=torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="'label' has 3 rows for 2 samples"):
        whole.updated(Condition(label=torch.zeros(3, dtype=torch.long)))


def test_some_samples_lose_their_condition() -> None:
    """Row by row this condition or the other, also where their contexts have different lengths."""
    whole, null = some(3, 4), Condition(context=torch.zeros(1, 2, 5), label=torch.tensor([9]))
    keep = torch.tensor([True, False, True])
    dropped = whole.where(keep, null)
    same(dropped[[0, 2]], Condition.cat([whole[[0, 2]], null])[:2])
    assert dropped.label is not None
    assert dropped.label.tolist() == [0, 9, 2]
    assert dropped.mask is not None
    assert dropped.mask.sum(1).tolist() == [4, 2, 4]


def test_rows_and_masks_have_to_fit() -> None:
    """One line that names what does not."""
    with pytest.raises(ValueError, match="differ in their rows: context 2, label 3"):
        Condition(context=torch.zeros(2, 4, 5), label=torch.arange(3))
    with pytest.raises(ValueError, match=r"same size: mask \(2, 3\), context \(2, 4, 5\)"):
        Condition(context=torch.zeros(2, 4, 5), mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="only some samples have 'label'"):
        Condition.cat([some(), Condition(context=torch.zeros(1, 4, 5))])
    with pytest.raises(ValueError, match="no number of rows"):
        len(NONE)
    with pytest.raises(ValueError, match=r"'context' \(1, 3, 6\) cannot replace \(3, 4, 5\)"):
        some().updated(Condition(context=torch.zeros(1, 3, 6)))
    for keep in (torch.ones(3), torch.ones(3, 1, dtype=torch.bool), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"one flag per sample is needed, bool \(3,\)"):
            some().where(keep, NONE)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"image": torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)},
            "'image' must be floating point, not torch.uint8",
        ),
        ({"context": torch.ones(1, 2, 3, dtype=torch.long)}, "'context' must be floating point"),
        ({"guidance": torch.tensor([3])}, "'guidance' must be floating point"),
        ({"label": torch.tensor([1.0])}, "'label' must be whole numbers, not torch.float32"),
        ({"label": torch.tensor([True])}, "'label' must be whole numbers"),
        (
            {"context": torch.ones(1, 2, 3), "mask": torch.ones(1, 2)},
            "'mask' must be bool, not torch.float32",
        ),
    ],
)
def test_numbers_of_another_kind_are_refused(told: dict[str, Tensor], message: str) -> None:
    """Pixels of 0 to 255 would make another picture in silence."""
    with pytest.raises(ValueError, match=message):
        Condition(**told)


@pytest.mark.parametrize(
    ("takes", "wrong"),
    [(("label", "vector"), "needs the condition 'vector'"), (("label",), "does not take .* 'context'")],
)
def test_a_network_refuses_what_it_does_not_take(takes: tuple[str, ...], wrong: str) -> None:
    """And what it lacks; a mask goes with every context."""
    some(mask=True).require(("context", "label"))
    with pytest.raises(ValueError, match=wrong):
        some().require(takes)


@dataclass(frozen=True, eq=False)
class WithDepth(Condition):
    """One of a user's own."""

    depth: Tensor | None = None


def test_a_condition_of_ones_own_goes_through_all_operations() -> None:
    """A subclass keeps its fields and its class."""
    whole = WithDepth(label=torch.arange(2), depth=torch.randn(2, 3))
    same(Condition.cat([whole[:1], whole[1:]]), whole)
    assert whole.to(dtype=torch.float64).tensors["depth"].dtype == torch.float64
    assert (
        whole.where(torch.tensor([True, False]), WithDepth(depth=torch.zeros(1, 3)))
        .tensors["depth"][1]
        .abs()
        .sum()
        == 0
    )
    with pytest.raises(ValueError, match="does not take the condition 'depth'"):
        whole.require(("label",))
