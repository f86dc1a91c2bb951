"""Attention layers of all networks."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Multi-head attention of q, k and v (B, L, heads*d); see `attend`."""
    q, k, v = (rearrange(x, "b l (h d) -> b h l d", h=heads) for x in (q, k, v))
    return attend(q, k, v, causal=causal, mask=mask)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v: heads (B, H, L, d) -> (B, L, H*d) (Vaswani et al. 2017, eq. 1).

    causal  query i attends to the keys 0 ... i only
    mask    (B or 1, H or 1, queries or 1, keys): added to the scores; if bool, True for keys to attend to
    scale   None: 1/sqrt(d)
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return rearrange(out, "b h l d -> b l (h d)")


def key_mask(mask: Tensor | None, more: int = 0) -> Tensor | None:
    """A token mask (B, L) as `attend` takes it, (B, 1, 1, L + more): the last `more` entries are True."""
    return None if mask is None else F.pad(mask, (0, more), value=True)[:, None, None]


class SelfAttention(nn.Module):
    """Tokens attend to each other; query, key and value come from one fused product."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads, causal=self.causal))


class CrossAttention(nn.Module):
    """Tokens attend to a context of another width (Rombach et al. 2022, section 3.3)."""

    def __init__(self, dim: int, context_dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = self.kv(context).chunk(2, dim=-1)
        return self.out(attention(self.q(x), k, v, self.heads, mask=mask))
