"""The Inception Score against what it is for known logits, torch-fidelity's, torchmetrics', and ADM's
rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eval.metrics import inception_score as module
from eval.metrics.inception_score import inception_score, ordered_splits, shuffled_splits
from tests.eval.test_metrics import normal
from tests.peers import torch_fidelity, torchmetrics


def test_scores_that_are_known() -> None:
    """Certain and evenly spread over C classes: C. Never certain, or always the same class: 1. Half the
    pictures in each of two: 2."""
    one = torch.zeros(40, dtype=torch.long)
    certain = 2000 * torch.eye(10, dtype=torch.float64)
    cases = [
        (certain.repeat(4, 1), 10),
        (torch.zeros(40, 10), 1),
        (certain[:1].expand(40, 10), 1),
        (certain[:2].repeat(20, 1), 2),
    ]
    for logits, expected in cases:
        found = inception_score(logits, one)
        assert (found.value, found.extra["std"], found.extra["splits"]) == pytest.approx(
            (expected, 0, 1), rel=1e-12
        )
        assert math.isnan(found.low)


@pytest.mark.parametrize(("n", "splits"), [(200, 10), (203, 10), (57, 1)])
def test_shuffled_splits_are_torch_fidelitys(n: int, splits: int) -> None:
    """The same mean and standard deviation over the same splits, to 1e-10, of float32 logits, too."""
    logits = 3 * normal(0, n, 20, dtype=torch.float32)
    theirs = torch_fidelity.metric_isc.isc_features_to_metric(logits, splits, shuffle=True, rng_seed=2020)
    found = inception_score(logits, shuffled_splits(n, splits))
    assert found.value == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert found.extra["std"] == pytest.approx(theirs["inception_score_std"], rel=1e-10, abs=1e-12)


def test_torchmetrics_has_the_same_score_and_another_deviation() -> None:
    """One split: its score, to 1e-10. Of several it draws its own, and takes the deviation with one degree of
    freedom less."""
    logits = 3 * normal(0, 90, 20)
    metric = torchmetrics.image.inception.InceptionScore(torch.nn.Identity(), splits=1).set_dtype(
        torch.float64
    )
    metric.update(logits)
    assert inception_score(logits, shuffled_splits(90, 1)).value == pytest.approx(
        float(metric.compute()[0]), rel=1e-10
    )


def test_ordered_splits_are_adms() -> None:
    """Runs as they come, a shorter one last; the score written out, to 1e-10."""
    logits = 3 * normal(0, 110, 20)
    p = logits.softmax(1).numpy()
    scores = [
        np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), 1)))
        for part in (p[:50], p[50:100], p[100:])
    ]
    found = inception_score(logits, ordered_splits(110, 50))
    assert (found.value, found.extra["splits"]) == pytest.approx((np.mean(scores), 3), rel=1e-10)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, to 1e-13."""
    logits, splits = 3 * normal(0, 110, 20), shuffled_splits(110, 7)
    expected = inception_score(logits, splits)
    monkeypatch.setattr(module, "ROWS", 9)
    assert inception_score(logits, splits).value == pytest.approx(expected.value, rel=1e-13)


def test_what_cannot_be_scored_is_refused() -> None:
    """Empty splits, other shapes, and logits that are not finite."""
    with pytest.raises(ValueError, match="split 0 of 10 has no picture"):
        inception_score(normal(0, 5, 4), shuffled_splits(5, 10))
    with pytest.raises(ValueError, match=r"not \(5, 4\) and \(6,\)"):
        inception_score(normal(0, 5, 4), ordered_splits(6))
    with pytest.raises(ValueError, match="1 of 5 feature vectors are not finite"):
        inception_score(normal(0, 5, 4).index_fill(0, torch.tensor([2]), math.nan), ordered_splits(5))
