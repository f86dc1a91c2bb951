"""Data sets and the order in which training sees them."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from train.data import TensorData, digits, shuffled_batches


def test_digits_are_split_once_and_for_all() -> None:
    """1,258 to train on and 539 held out, together all digits, none in both by index, 30 % of each class, the
    same every time."""
    train, held_out, everything = digits(), digits("held_out"), digits("all")
    assert (len(train), len(held_out), len(everything)) == (1258, 539, 1797)
    rows = [sorted(map(tuple, data.images.flatten(1).tolist())) for data in (train, held_out, everything)]
    assert sorted(rows[0] + rows[1]) == rows[2]
    assert not {*rows[0]} & {*rows[1]}  # no two of the images are equal, so that this says all
    assert train.labels is not None
    assert held_out.labels is not None
    assert everything.labels is not None
    counts = [torch.bincount(labels, minlength=10) for labels in (held_out.labels, everything.labels)]
    assert counts[0].tolist() == [round(0.3 * n) for n in counts[1].tolist()]
    assert torch.equal(digits("held_out").images, held_out.images)
    assert not torch.equal(digits("held_out", seed=1).images, held_out.images)
    assert (train.shape, train.num_classes) == ((1, 8, 8), 10)


def test_digits_are_pixels_in_range() -> None:
    """17 grey levels from -1 to 1, float32."""
    images = digits("all").images
    assert images.dtype == torch.float32
    assert torch.equal(images.unique(), torch.arange(17) / 8 - 1)


def test_a_batch_holds_images_and_their_labels() -> None:
    """By index, in the order asked for; without labels there are none."""
    images = torch.arange(5.0).view(5, 1, 1, 1)
    batch = TensorData(images, torch.tensor([4, 3, 2, 1, 0])).__getitems__([3, 0, 3])
    assert batch["x0"].flatten().tolist() == [3, 0, 3]
    assert batch["label"].tolist() == [1, 4, 1]
    assert list(TensorData(images).__getitems__([0])) == ["x0"]
    assert TensorData(images).num_classes is None
    assert TensorData(images, torch.tensor([0, 1, 2, 0, 0])).num_classes == 3


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 3], r"0 \.\.\. 2; found 0 to 3"), ([-1, 2], r"0 \.\.\. 2; found -1 to 2")]
)
def test_labels_out_of_range_are_refused(labels: list[int], message: str) -> None:
    """Both the range and what was found are named."""
    with pytest.raises(ValueError, match=message):
        TensorData(torch.zeros(2, 1, 1, 1), torch.tensor(labels), 3)


@pytest.mark.parametrize("split", ["test", "held-out", ""])
def test_an_unknown_split_is_refused(split: str) -> None:
    """The three splits are named; no data is no data set."""
    with pytest.raises(ValueError, match="'train', 'held_out' or 'all'"):
        digits(split)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one image"):
        TensorData(torch.zeros(0, 1, 8, 8))


@pytest.mark.parametrize(("n", "size"), [(10, 4), (10, 10), (7, 3), (3, 8)])
def test_each_epoch_is_a_permutation(n: int, size: int) -> None:
    """Laid end to end, batches are one permutation after another, of one size also where two epochs meet, in
    an order of their own."""
    batches = list(islice(shuffled_batches(n, size, seed=0), 5 * n))
    assert {len(batch) for batch in batches} == {size}
    flat = [index for batch in batches for index in batch]
    epochs = [flat[i : i + n] for i in range(0, len(flat) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:4]}) > 1
    assert list(islice(shuffled_batches(n, size, seed=1), 5 * n)) != batches


@pytest.mark.parametrize("start", [1, 2, 5, 13])
def test_starting_later_is_skipping(start: int) -> None:
    """Batch number `start` and those after it do not depend on having drawn the ones before."""
    whole = list(islice(shuffled_batches(10, 4, seed=3), 30))
    assert list(islice(shuffled_batches(10, 4, seed=3, start=start), 30 - start)) == whole[start:]
