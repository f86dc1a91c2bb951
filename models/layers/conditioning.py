"""What a network is told besides x: time, class label, vector, guidance scale. And the refusal of what it has
no use for."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.condition import Condition
from diffusion.messages import brief


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) -> (B, dim): cosines, then sines, at geometrically falling frequencies from 1 to 1/max_period. In
    float32.

    ValueError for another shape.
    """
    if t.ndim != 1:
        raise ValueError(
            f"times are a tensor (B,), one per sample, not of shape {tuple(t.shape)}: t.expand(B) repeats one"
        )
    half = dim // 2
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """The sinusoid of t through a small MLP. `factor` brings t to the range 0 ... 1000 that the frequencies
    are made for."""

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
    """The guidance scale a distilled network imitates, to be added to the sinusoid of t (Luo et al. 2023,
    LCM; Meng et al. 2023).

    forward(scale (B,)) -> (B, dim). Embedded is (scale - 1) * 1000, so that scale 1, guidance off, is zero.
    Unlike those of t its waves are sines first, and the last frequency is 1/10000 itself.
    """

    def __init__(self, frequencies: int, dim: int) -> None:
        if frequencies % 2 or frequencies < 4:
            raise ValueError(
                f"the guidance embedding needs an even number of frequencies, at least 4, not {frequencies}"
            )
        super().__init__(frequencies, dim, bias=False)

    def forward(self, scale: Tensor) -> Tensor:
        half = self.in_features // 2
        # In float32 and in the order of the published code: at (scale - 1) * 1000, rounding of a frequency
        # moves the angle by 1e-3.
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


def check_labels(label: Tensor, num_classes: int) -> None:
    """Raise unless every label is a class 0 ... num_classes-1 or the null label num_classes."""
    if label.ndim != 1 or label.is_floating_point():
        raise ValueError(
            f"labels are whole numbers (B,), one per sample, not {label.dtype} of shape {tuple(label.shape)}"
        )
    wrong = label[(label < 0) | (label > num_classes)]
    if len(wrong):
        raise ValueError(
            f"label {int(wrong[0])} is out of range: classes are 0 to {num_classes - 1}, and {num_classes} "
            "means no class"
        )


class NetworkParams:
    """Base of the parameters of networks that denoise: what they say of the network's input.

    They have in_channels and out_channels, and of num_classes, context_dim, vector_dim and guidance_dim those
    that it is told.
    """

    @property
    def sample_channels(self) -> int:
        """Channels of x. A first layer with more of them sees an image beside x; twice as many come out with
        a learned variance."""
        own: Any = self
        return min(own.in_channels, own.out_channels)

    @property
    def takes(self) -> tuple[str, ...]:
        """The conditions that it has to be given, and the only ones that it accepts."""
        own: Any = self
        names = [name for name, size in SIZES.items() if getattr(self, size, None) is not None]
        return (*names, "image") if own.in_channels > self.sample_channels else tuple(names)


SIZES = {"label": "num_classes", "context": "context_dim", "vector": "vector_dim", "guidance": "guidance_dim"}


def network_input(x: Tensor, condition: Condition, params: Any) -> Tensor:
    """What a network's first layer is given, (B, in_channels, H, W): x, and the image beside it. The one
    place that refuses conditions.

    params  of the network: `NetworkParams`, or what has their three numbers
    ValueError unless x has its channels, and exactly what the network takes is given, in its widths and for
    as many samples.
    """
    if not isinstance(condition, Condition):
        raise ValueError(
            "networks are called as network(x, t, condition), with a Condition(context=..., ...), not "
            f"{brief(condition)}"
        )
    if x.shape[1] != params.sample_channels:
        raise ValueError(f"this network takes samples of {params.sample_channels} channels, not {x.shape[1]}")
    condition.require(params.takes)
    for name in ("context", "vector"):
        value, width = getattr(condition, name), getattr(params, SIZES[name], None)
        if value is not None and width not in (None, value.shape[-1]):
            raise ValueError(
                f"this network takes {width} numbers in a row of the condition {name!r}, not "
                f"{value.shape[-1]}"
            )
    if condition and len(condition) != len(x):
        raise ValueError(
            f"{len(condition)} conditions for {len(x)} samples: one per sample is needed, "
            f"condition.expand({len(x)}) repeats one"
        )
    if condition.image is None:
        return x
    wanted = (params.in_channels - params.sample_channels, *x.shape[2:])
    if condition.image.shape[1:] != wanted:
        raise ValueError(
            f"this network sees images of shape {wanted} beside x, not {tuple(condition.image.shape[1:])}"
        )
    return torch.cat([x, condition.image.to(x.dtype)], dim=1)
