"""What sampling costs on any machine: network calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion import Condition
from models import Model
from models.layers.blocks import BlockNetwork


def calls_per_image(model: Model, draw: Callable[[Model], object]) -> int:
    """Network calls of `draw`, which draws one image with a model. Guidance makes two calls of one.

    They are counted with a network that does nothing.
    """
    network = _Counting(model.network)
    draw(replace(model, backbone=network))
    return network.calls


class _Counting(BlockNetwork):
    """Returns zeros in place of a network, and counts the samples."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        like = next(network.parameters())
        self.params, self.calls = getattr(network, "params", None), 0
        self.place = nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls += len(x)
        return torch.zeros_like(x)
