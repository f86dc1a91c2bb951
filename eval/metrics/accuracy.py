"""Whether samples show what they were asked to, in the eyes of a classifier."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

from eval.metrics.figure import Figure


def label_accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> Figure:
    """Share of logits (N, C) in which the label (N,), 0 ... C - 1, is among the `top` highest, with Wilson's
    95 % interval."""
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
    )  # imports transformers, too, which takes seconds

    if (
        logits.ndim != 2
        or labels.shape != logits.shape[:1]
        or len(labels) == 0
        or not 1 <= top <= logits.shape[1]
    ):
        raise ValueError(
            f"top-{top} accuracy needs logits (N, C) and labels (N,), not {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels must lie in 0 ... {logits.shape[1] - 1}, not in {int(labels.min())} ... "
            f"{int(labels.max())}"
        )
    met = multiclass_accuracy(logits, labels.long(), num_classes=logits.shape[1], average="micro", top_k=top)
    return share(round(float(met) * len(labels)), len(labels))


def share(met: int, n: int) -> Figure:
    """met / n with Wilson's 95 % interval for a share (1927), which lies within 0 ... 1 and has a width at 0
    and at 1, too."""
    if not 0 <= met <= n or n == 0:
        raise ValueError(f"a share needs 0 <= met <= n and n >= 1, not {met} of {n}")
    p, z = met / n, NormalDist().inv_cdf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Figure(p, max(0.0, centre - half), min(1.0, centre + half))
