"""Adaptive layer norm: the embedding of time and conditions shifts, scales and gates what a transformer block
does (Peebles & Xie 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.conditioning import TimeEmbedding


class Modulation(nn.Linear):
    """One linear layer of the embedding, in n parts: forward(emb (B, D), already through SiLU) -> n tensors
    (B, 1, D)."""

    def __init__(self, dim: int, n: int) -> None:
        super().__init__(dim, n * dim)
        self.n = n

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # the product, in parts
        return super().forward(emb)[:, None].chunk(self.n, dim=-1)


class ModulationRows(nn.Module):
    """A modulation that is given: n rows, from `first` on, of those of its block, forward(rows (B, R, D)) ->
    n tensors (B, 1, D)."""

    def __init__(self, first: int, n: int) -> None:
        super().__init__()
        self.first, self.n = first, n

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows[:, self.first : self.first + self.n].chunk(self.n, dim=1)


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights of its own: those come from the modulation."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, in one pass: the way back into the residual stream."""
    return torch.addcmul(x, gate, branch)


def start_at_identity(network: nn.Module) -> None:
    """Xavier for products, 0.02 for those of time, zero for every modulation (adaLN-zero, section 3.2):
    blocks do nothing yet."""
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
