"""Embeddings of time, class label, vector and guidance scale, and the check of a network's conditions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.condition import Condition
from diffusion.messages import brief


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, dim) in float32: cosines, then sines, at geometric frequencies from 1 to 1/max_period.

    ValueError for another shape.
    """
    if t.ndim != 1:
        shape = tuple(t.shape)
        raise ValueError(f"times are a tensor (B,), one per sample, not of shape {shape}: use t.expand(B)")
    half = dim // 2
    number = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(max_period) * number / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """The sinusoid of t through an MLP. `factor` scales t to 0 ... 1000, the range of the frequencies."""

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
    """A distilled network's guidance scale, added to the sinusoid of t (Meng et al. 2023; Luo et al. 2023).

    forward(scale (B,)) -> (B, dim). It embeds (scale - 1) * 1000, so that scale 1 (no guidance) is zero.
    Unlike the sinusoid of t it has sines first, and its last frequency is exactly 1/10000.
    """

    def __init__(self, frequencies: int, dim: int) -> None:
        if frequencies % 2 or frequencies < 4:
            raise ValueError(f"guidance embeddings need an even number >= 4, not {frequencies} frequencies")
        super().__init__(frequencies, dim, bias=False)

    def forward(self, scale: Tensor) -> Tensor:
        half = self.in_features // 2
        # In float32 and the published order: a rounded frequency times 1000 moves the angle by 1e-3.
        step = torch.full((), 10_000.0, device=scale.device).log() / (half - 1)
        frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=scale.device) * -step)
        angle = ((scale.float() - 1) * 1000)[:, None] * frequency
        dtype = next(self.parameters(), scale).dtype  # a packed weight is not a parameter
        return super().forward(torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype))


class LabelEmbedding(nn.Module):
    """One vector per class, and one for the null label `num_classes` ("no class"), which guidance needs."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label: Tensor) -> Tensor:
        # On a GPU the check would wait for the device, and the kernel itself stops at an index out of range.
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(label, self.num_classes)
        return self.table(label)


class VectorEmbedding(nn.Module):
    """A vector (pooled text, sizes, ...) through a small MLP, to be added to the time embedding."""

    def __init__(self, vector_dim: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(vector_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, vector: Tensor) -> Tensor:
        return self.mlp(vector)


def check_labels(label: Tensor, num_classes: int) -> None:
    """ValueError unless every label is a class 0 ... num_classes-1 or the null label num_classes."""
    if label.ndim != 1 or label.is_floating_point():
        shape = tuple(label.shape)
        raise ValueError(f"labels are whole numbers (B,), one per sample, not {label.dtype} of shape {shape}")
    wrong = label[(label < 0) | (label > num_classes)]
    if len(wrong):
        classes = f"classes are 0 to {num_classes - 1}, and {num_classes} means no class"
        raise ValueError(f"label {int(wrong[0])} is out of range: {classes}")


class NetworkParams:
    """Base class of the parameters of denoising networks: it describes the network's inputs.

    Subclasses have in_channels and out_channels, and num_classes, context_dim, vector_dim and guidance_dim
    for the conditions that the network takes.
    """

    @property
    def sample_channels(self) -> int:
        """Channels of x. The input has more with an image, the output twice as many with a variance."""
        own: Any = self
        return min(own.in_channels, own.out_channels)

    @property
    def takes(self) -> tuple[str, ...]:
        """The conditions that the network needs, and the only ones that it accepts."""
        own: Any = self
        names = [name for name, size in SIZES.items() if getattr(self, size, None) is not None]
        return (*names, "image") if own.in_channels > self.sample_channels else tuple(names)


SIZES = {"label": "num_classes", "context": "context_dim", "vector": "vector_dim", "guidance": "guidance_dim"}


def network_input(x: Tensor, condition: Condition, params: Any) -> Tensor:
    """The input (B, in_channels, H, W) of a network's first layer: x, and the image condition behind it.

    params  of the network: `NetworkParams`, or an object with the same three properties
    This is the one place that checks conditions. ValueError unless x has the network's channels, and the
    condition has exactly what the network takes, in its widths and for as many samples.
    """
    if not isinstance(condition, Condition):
        raise ValueError(f"networks are called as network(x, t, Condition(...)), not with {brief(condition)}")
    if x.shape[1] != params.sample_channels:
        raise ValueError(f"this network takes samples of {params.sample_channels} channels, not {x.shape[1]}")
    condition.require(params.takes)
    for name in ("context", "vector"):
        value, width = getattr(condition, name), getattr(params, SIZES[name], None)
        if value is not None and width not in (None, value.shape[-1]):
            raise ValueError(f"this network takes a {name} of width {width}, not {value.shape[-1]}")
    if condition and len(condition) != len(x):
        n = len(x)
        raise ValueError(f"{len(condition)} conditions for {n} samples: condition.expand({n}) repeats one")
    if condition.image is None:
        return x
    expected, shape = (params.in_channels - params.sample_channels, *x.shape[2:]), condition.image.shape[1:]
    if shape != expected:
        raise ValueError(f"this network takes an image of shape {expected} besides x, not {tuple(shape)}")
    return torch.cat([x, condition.image.to(x.dtype)], dim=1)
