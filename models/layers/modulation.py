"""Adaptive layer norm: an embedding of time and conditions modulates blocks (Peebles & Xie 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conditioning import TimeEmbedding


class Modulation(nn.Linear):
    """A linear layer of the embedding: forward(emb (B, D), already through SiLU) -> n tensors (B, 1, D)."""

    def __init__(self, dim: int, n: int) -> None:
        super().__init__(dim, n * dim)
        self.n = n

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # a tuple
        return super().forward(emb)[:, None].chunk(self.n, dim=-1)


class ModulationRows(nn.Module):
    """A modulation computed elsewhere: forward(rows (B, R, D)) -> n rows (B, 1, D), from `first` on."""

    def __init__(self, first: int, n: int) -> None:
        super().__init__()
        self.first, self.n = first, n

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows[:, self.first : self.first + self.n].chunk(self.n, dim=1)


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights, which come from the modulation."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, in one pass."""
    return torch.addcmul(x, gate, branch)


def start_at_identity(network: nn.Module) -> None:
    """Initialises modulations to 0 (adaLN-zero, section 3.2), time layers by 0.02, all others by Xavier."""
    for module in network.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, TimeEmbedding):
            nn.init.normal_(module.fc1.weight, std=0.02)
            nn.init.normal_(module.fc2.weight, std=0.02)
