"""What a network is told besides x: time, class label, vector, guidance scale. And the refusal of what it has no use for."""

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

    def forward(self, t: Tensor, guidance: Tensor | None = None) -> Tensor:
        wave = sinusoid(t * self.factor, self.frequencies)
        wave = wave if guidance is None else wave + guidance
        return self.fc2(F.silu(self.fc1(wave.to(self.fc1.bias.dtype))))


class GuidanceEmbedding(nn.Linear):
    """The guidance scale a distilled network imitates, to be added to the sinusoid of t (Luo et al. 2023, LCM; Meng et al. 2023).

    forward(scale (B,)) -> (B, dim). Embedded is (scale - 1) * 1000, so that scale 1, guidance off, is zero. Unlike those of t
    its waves are sines first, and the last frequency is 1/10000 itself.
    """

    def __init__(self, frequencies: int, dim: int) -> None:
        if frequencies % 2 or frequencies < 4:
            raise ValueError(f"the guidance embedding needs an even number of frequencies, at least 4, not {frequencies}")
        super().__init__(frequencies, dim, bias=False)

    def forward(self, scale: Tensor) -> Tensor:
        half = self.in_features // 2
        # In float32 and in the order of the published code: at (scale - 1) * 1000, rounding of a frequency moves the angle by 1e-3.
        step = torch.full((), 10_000.0, device=scale.device).log() / (half - 1)
        frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=scale.device) * -step)
        angle = ((scale.float() - 1) * 1000)[:, None] * frequency
        dtype = next(self.parameters(), scale).dtype  # a packed weight is none
        return super().forward(torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype))


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


Condition = tuple[nn.Module | None, Tensor | None]  # what embeds it, and its value; one is None if and only if the other is


def embed(t: Tensor, time: TimeEmbedding, *conditions: Condition, guidance: Condition = (None, None)) -> Tensor:
    """The embedding of t, and of the guidance scale within it, plus that of every condition there is, (B, dim)."""
    emb = time(t, _embedded(guidance, len(t)))
    for condition in conditions:
        added = _embedded(condition, len(t))
        emb = emb if added is None else emb + added
    return emb


def _embedded(condition: Condition, batch: int) -> Tensor | None:
    embedding, value = condition
    if embedding is None or value is None:
        return None
    if len(value) != batch:
        raise ValueError(f"{len(value)} conditions for a batch of {batch}: one per sample is needed")
    return embedding(value)


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
    sizes["guidance"] = getattr(params, "guidance_dim", None)  # which only distilled networks have
    expected = [name for name, size in sizes.items() if size is not None]
    for name, value in given.items():
        if value is None and name in expected:
            raise ValueError(f"this network needs the condition {name!r}: {name}=None was given")
        if value is not None and name not in expected:
            raise ValueError(f"this network has no use for the condition {name!r}; it takes: {', '.join(expected) or 'none'}")


class WithImage(nn.Module):
    """A network that sees an image of several channels beside x (inpainting: mask and masked latents; pix2pix: the latents to edit).

    forward(x, t, *, image (B, C', H, W), **conditions): the channels of x first.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, *, image: Tensor | None = None, **conditions: Tensor) -> Tensor:
        if image is None:
            raise ValueError("this network needs the condition 'image' beside x: for inpainting the mask and the masked latents")
        return self.network(torch.cat([x, image.to(x.dtype)], dim=1), t, **conditions)
