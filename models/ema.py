"""Exponential moving average of a network's weights, which samples are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- decay * average + (1 - decay) * weights, after each optimiser step, in float32.

    At update n the decay is min(decay, (1 + n) / (10 + n)), so that early averages forget faster. Parameters
    are averaged; buffers stay the network's own.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), not {decay:g}")
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().float().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Add the network's current weights to the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average = [self.average[name] for name, _ in network.named_parameters()]
        torch._foreach_lerp_(average, [p.detach().float() for p in network.parameters()], 1 - decay)

    @contextmanager
    def applied_to(self, network: nn.Module) -> Iterator[nn.Module]:
        """Within the block the network holds the average; afterwards its own weights, bit for bit."""
        raw = {name: p.detach().clone() for name, p in network.named_parameters()}
        try:
            self.copy_to(network)
            yield network
        finally:
            _copy(raw, network)

    def copy_to(self, network: nn.Module) -> None:
        """Overwrite the network's weights with the average."""
        _copy(self.average, network)

    def load(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a saved average."""
        for name, value in self.average.items():
            value.copy_(average[name])
        self.updates = updates


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        parameter.copy_(weights[name])
