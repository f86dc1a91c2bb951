"""Inception Score (Salimans et al. 2016): pictures of clear classes, and many classes in all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from eval.metrics.figure import Figure
from eval.metrics.moments import checked

ROWS = 4096


def inception_score(logits: Tensor, splits: Tensor) -> Figure:
    """exp of the mean of KL(p(y|x) || p(y)) within each split, averaged over splits; from 1 to C.

    logits  (N, C), any float dtype; the softmax is computed in float64
    splits  (N,): each picture's split, 0 ... S - 1, none empty: `shuffled_splits` or `ordered_splits`

    extra: std, the standard deviation over splits as papers cite it (without correction), and splits.
    """
    if logits.ndim != 2 or splits.shape != logits.shape[:1] or len(splits) == 0:
        raise ValueError(
            f"an inception score needs logits (N, C) and splits (N,), not {tuple(logits.shape)} and "
            f"{tuple(splits.shape)}"
        )
    splits = splits.to(logits.device)
    counts = splits.bincount()
    if not counts.all():
        raise ValueError(
            f"split {int((counts == 0).nonzero()[0])} of {len(counts)} has no picture: take fewer splits or "
            "more pictures"
        )
    # Sums over each split of sum_y p log p.
    negentropy = torch.zeros(len(counts), dtype=torch.float64, device=logits.device)
    total = negentropy.new_zeros(len(counts), logits.shape[1])
    for rows, split in zip(logits.split(ROWS), splits.split(ROWS), strict=True):
        log_p = checked(rows, logits.shape[1]).to(logits.device).log_softmax(1)
        negentropy.index_add_(0, split, (log_p.exp() * log_p).sum(1))
        total.index_add_(0, split, log_p.exp())
    marginal = total / counts[:, None]
    scores = (negentropy / counts - torch.xlogy(marginal, marginal).sum(1)).exp()
    extra = {"std": float(scores.std(correction=0)), "splits": float(len(scores))}
    return Figure(float(scores.mean()), extra=extra)


def shuffled_splits(n: int, splits: int = 10, seed: int = 2020) -> Tensor:
    """(n,): equal splits of a random order, those of torch-fidelity for the same seed."""
    assignment = torch.empty(n, dtype=torch.long)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n))
    for i in range(splits):
        assignment[order[i * n // splits : (i + 1) * n // splits]] = i
    return assignment


def ordered_splits(n: int, size: int = 5000) -> Tensor:
    """(n,): runs of `size` pictures in their order, as in ADM's evaluator (Dhariwal & Nichol 2021)."""
    return torch.arange(n) // size
