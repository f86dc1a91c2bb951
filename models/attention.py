"""Attention, in the one place where every network takes it from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.products import TILES, Linear


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
    if causal or bias is not None or not _blocks_pay(q, k):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    else:
        out = _in_blocks(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return rearrange(out, "b h l d -> b l (h d)")


def _blocks_pay(q: Tensor, k: Tensor) -> bool:
    """Where the CPU has a unit for half-precision products: torch's fused kernel makes next to no use of it.

    Not in training, which would keep all scores; nor for few keys, which are soon done.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return q.device.type == "cpu" and TILES.get(q.dtype, False) and k.shape[2] >= 1024 and not training


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same formula for 512 queries at a time, so that few scores exist at once.

    They are rounded to the dtype of q, which the fused kernel does not: two to nine times its error, the more the larger they are.
    """
    k = k.transpose(-1, -2)
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
