"""Attention, in the one place where every network takes it from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.products import TILES, Linear


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (B, L, heads*d), by torch's fused kernels (Vaswani et al. 2017, eq. 1).

    causal  query i attends to the keys 0 ... i only
    """
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
    out = _in_blocks(q, k, v) if not causal and _blocks_pay(q, k) else F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(out, "b h l d -> b l (h d)")


def _blocks_pay(q: Tensor, k: Tensor) -> bool:
    """Where the CPU has a unit for half-precision products: torch's fused kernel makes next to no use of it.

    Not in training, which would keep all scores; nor for few keys, which are soon done.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return q.device.type == "cpu" and TILES.get(q.dtype, False) and k.shape[2] >= 1024 and not training


def _in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same formula for 512 queries at a time, so that few scores exist at once.

    They are rounded to the dtype of q, which the fused kernel does not: two to nine times its error, the more the larger they are.
    """
    k = k.transpose(-1, -2)
    scale = q.shape[-1] ** -0.5
    return torch.cat([((part * scale) @ k).softmax(dim=-1) @ v for part in q.split(512, dim=2)], dim=2)


class SelfAttention(nn.Module):
    """Tokens attend to each other; query, key and value come from one fused product."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads, self.causal))


class CrossAttention(nn.Module):
    """Tokens attend to a context of another width (Rombach et al. 2022, section 3.3)."""

    def __init__(self, dim: int, context_dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim, bias=bias)
        self.kv = Linear(context_dim, 2 * dim, bias=bias)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.out(attention(self.q(x), k, v, self.heads))
