"""Shares of samples: labels met, and training images copied."""

from __future__ import annotations

import pytest
import torch

from eval.metrics.accuracy import label_accuracy, share
from eval.metrics.neighbours import memorised, nearest_distance
from tests.eval.test_metrics import normal
from tests.peers import scipy, torchmetrics


@pytest.mark.parametrize(("met", "n"), [(0, 10), (3, 10), (10, 10), (49000, 50000), (1, 1)])
def test_the_interval_is_wilsons(met: int, n: int) -> None:
    """scipy's, to 1e-9, at 0 and at all, too."""
    theirs = scipy.stats.binomtest(met, n).proportion_ci(0.95, "wilson")
    found = share(met, n)
    assert (found.value, found.low, found.high) == pytest.approx(
        (met / n, theirs.low, theirs.high), rel=1e-9, abs=1e-12
    )


def test_accuracy_is_that_of_torchmetrics() -> None:
    """Ties included: the first of several highest logits counts."""
    logits, labels = normal(0, 700, 12).round(), torch.arange(700) % 12
    theirs = torchmetrics.functional.classification.multiclass_accuracy(
        logits, labels, num_classes=12, average="micro"
    )
    assert label_accuracy(logits, labels) == share(round(float(theirs) * 700), 700)
    assert int((logits == logits.amax(1, keepdim=True)).sum()) > 800


def test_accuracy_refuses_what_it_cannot_count() -> None:
    """Labels beyond the classes, other shapes, more places than classes, and no samples."""
    logits = normal(0, 4, 3)
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 2, not in 1 \.\.\. 3"):
        label_accuracy(logits, torch.tensor([1, 2, 3, 1]))
    for args in ((logits, torch.zeros(5)), (logits[:0], torch.zeros(0))):
        with pytest.raises(ValueError, match="accuracy needs logits"):
            label_accuracy(*args)
    with pytest.raises(ValueError, match="not 4 of 3"):
        share(4, 3)


def test_copies_are_found_with_what_they_copy() -> None:
    """Of 50 samples 20 are training images with a little noise, in known places: their share, and the index
    of each."""
    training, held_out = normal(0, 400, 1, 4, 4), normal(1, 300, 1, 4, 4)
    chosen = torch.arange(20) * 7
    samples = torch.cat([training[chosen] + 1e-3 * normal(2, 20, 1, 4, 4), normal(3, 30, 1, 4, 4)])
    found = memorised(samples, training, held_out)
    fresh = int((nearest_distance(samples[20:], training) < found.threshold).sum())
    assert found.threshold == float(nearest_distance(held_out, training).quantile(0.01))
    assert found.share == share(20 + fresh, 50)
    assert fresh <= 2
    assert torch.equal(found.index[:20], chosen)
    assert torch.equal(found.distance, nearest_distance(samples, training))


def test_life_itself_copies_one_in_a_hundred() -> None:
    """Samples of the same distribution: 1 %, within the interval."""
    found = memorised(normal(0, 2000, 3), normal(1, 500, 3), normal(2, 2000, 3)).share
    assert found.low < 0.01 < found.high
