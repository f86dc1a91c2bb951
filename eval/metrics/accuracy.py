"""The share of samples that a classifier assigns to the class they were drawn for."""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

from eval.metrics.figure import Figure


def label_accuracy(logits: Tensor, labels: Tensor) -> Figure:
    """Share of logits (N, C) that are highest at the label (N,), 0 ... C - 1, with Wilson's 95 % interval."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"accuracy needs logits (N, C) and labels (N,), not {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    lowest, highest, classes = int(labels.min()), int(labels.max()), logits.shape[1]
    if not 0 <= lowest <= highest < classes:
        raise ValueError(f"labels must lie in 0 ... {classes - 1}, not in {lowest} ... {highest}")
    return share(int((logits.argmax(1) == labels).sum()), len(labels))


def share(met: int, n: int) -> Figure:
    """met / n with Wilson's 95 % interval (1927), within 0 ... 1, with a width at 0 and 1 too."""
    if not 0 <= met <= n or n == 0:
        raise ValueError(f"a share needs 0 <= met <= n and n >= 1, not {met} of {n}")
    p, z = met / n, NormalDist().inv_cdf(0.975)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Figure(p, max(0.0, centre - half), min(1.0, centre + half))
