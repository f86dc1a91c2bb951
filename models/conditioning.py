"""What a network is told besides x: time, class label, vector. And the refusal of what it has no use for."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, at geometrically falling frequencies from 1 to 1/max_period. In float32."""
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """The sinusoid of t through a small MLP. `factor` brings t to the range 0 ... 1000 that the frequencies are made for."""

    def __init__(self, frequencies: int, dim: int, factor: float = 1.0) -> None:
        super().__init__()
        if frequencies % 2:
            raise ValueError(f"the time embedding needs an even number of frequencies, not {frequencies}")
        self.frequencies, self.factor = frequencies, factor
        self.fc1, self.fc2 = nn.Linear(frequencies, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        wave = sinusoid(t * self.factor, self.frequencies).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(wave)))


class LabelEmbedding(nn.Module):
    """A vector per class, and one more for "no class": the null label `num_classes` that guidance needs."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label: Tensor) -> Tensor:
        # Not on a GPU, where looking would wait for the device: an index out of range stops the kernel there.
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(label, self.num_classes)
        return self.table(label)


class VectorEmbedding(nn.Module):
    """A vector condition (pooled text, sizes, ...) through a small MLP, to be added to the time embedding."""

    def __init__(self, vector_dim: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(vector_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, vector: Tensor) -> Tensor:
        return self.mlp(vector)


def embed(t: Tensor, time: TimeEmbedding, *conditions: tuple[nn.Module | None, Tensor | None]) -> Tensor:
    """The embedding of t plus that of every condition there is, (B, dim)."""
    emb = time(t)
    for embedding, condition in conditions:
        if embedding is not None and condition is not None:
            if len(condition) != len(emb):
                raise ValueError(f"{len(condition)} conditions for a batch of {len(emb)}: one per sample is needed")
            emb = emb + embedding(condition)
    return emb


def check_labels(label: Tensor, num_classes: int) -> None:
    """Raise unless every label is a class 0 ... num_classes-1 or the null label num_classes."""
    if label.ndim != 1 or label.is_floating_point():
        raise ValueError(f"labels are whole numbers (B,), one per sample, not {label.dtype} of shape {tuple(label.shape)}")
    wrong = label[(label < 0) | (label > num_classes)]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is out of range: classes are 0 to {num_classes - 1}, and {num_classes} means no class")


def check_conditions(params: Any, **given: Any) -> None:
    """Raise unless exactly the conditions that the parameters ask for are given: an ignored one is as wrong as a missing one."""
    sizes = {"label": params.num_classes, "context": params.context_dim, "vector": params.vector_dim}
    expected = [name for name, size in sizes.items() if size is not None]
    for name, value in given.items():
        if value is None and name in expected:
            raise ValueError(f"this network needs the condition {name!r}: {name}=None was given")
        if value is not None and name not in expected:
            raise ValueError(f"this network has no use for the condition {name!r}; it takes: {', '.join(expected) or 'none'}")
