"""Attention, in the one place where every network takes it from."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention of q, k and v (B, L, heads*d), see `attend`."""
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
    return attend(q, k, v, causal=causal)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v over heads (B, H, L, d), side by side in (B, L, H*d) (Vaswani et al. 2017, eq. 1).

    causal  query i attends to the keys 0 ... i only
    bias    added to the scores, (B or 1, H or 1, queries, keys)
    scale   None: 1/sqrt(d)
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return rearrange(out, "b h l d -> b l (h d)")


class SelfAttention(nn.Module):
    """Tokens attend to each other; query, key and value come from one fused product."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads, self.causal))


class CrossAttention(nn.Module):
    """Tokens attend to a context of another width (Rombach et al. 2022, section 3.3)."""

    def __init__(self, dim: int, context_dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.out(attention(self.q(x), k, v, self.heads))
