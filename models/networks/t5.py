"""T5's encoder, version 1.1, in all published sizes: a bidirectional transformer (Raffel et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.spec import check_at_least_one
from models.layers.attention import attend
from models.layers.half import InFloat32, with_enough_precision


@dataclass(frozen=True)
class T5Params:
    """Parameters of an encoder; the defaults are T5 v1.1 XXL.

    vocab         rows of the token table, more than the tokenizer has tokens
    head_dim      of queries, keys and values; heads * head_dim may differ from the width
    hidden        width inside the gated MLP
    buckets       of distances between tokens, half of them for each direction
    max_distance  distances from here on share a bucket
    """

    vocab: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_at_least_one(self, "vocab", "width", "layers", "heads", "head_dim", "hidden")
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets={self.buckets} must divide by 4: two directions, each near and far")
        if self.max_distance <= (near := self.buckets // 4):
            raise ValueError(f"max_distance={self.max_distance} must be more than buckets / 4 = {near}")


T5_XXL = T5Params()


class T5(nn.Module):
    """forward(tokens (B, L)) -> the normed last state (B, L, width), in the dtype of the weights.

    mask  (B, L) bool, which tokens are attended to, at least one per row; None: all, also padding, as in
          FLUX.1 and Stable Diffusion 3
    L has no limit. States between blocks are at least float32: those of published weights exceed float16.
    """

    block_lists = ("blocks",)  # in the order in which they are called

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.params = p = params
        self.token = nn.Embedding(p.vocab, p.width)
        self.relative = nn.Embedding(p.buckets, p.heads)
        self.blocks = nn.ModuleList(Block(p) for _ in range(p.layers))
        self.norm = RMSNorm(p.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's initialisation: normal, scaled by the inputs; queries by head_dim too, as scores are not."""
        p = self.params
        nn.init.normal_(self.token.weight)
        nn.init.normal_(self.relative.weight, std=p.width**-0.5)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                per_head = p.head_dim if name.endswith(".q") else 1
                nn.init.normal_(module.weight, std=(module.in_features * per_head) ** -0.5)

    @with_enough_precision
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if tokens.ndim != 2:
            raise ValueError(f"tokens are (B, L), not {tuple(tokens.shape)}")
        x = self.token(tokens)
        bias = self._bias(tokens.shape[1], x)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], -torch.inf)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def _bias(self, length: int, like: Tensor) -> Tensor:
        """The relative position bias of all blocks, (1, heads, L, L)."""
        place = torch.arange(length, device=like.device)
        bucket = buckets(place - place[:, None], self.params.buckets, self.params.max_distance)
        return rearrange(self.relative(bucket), "i j h -> 1 h i j").contiguous()


def buckets(distance: Tensor, count: int, max_distance: int) -> Tensor:
    """The bucket, 0 ... count-1, of the distance from a query to a key (Raffel et al. 2020, section 2.1).

    Keys after the query (distance > 0) have the upper half of the buckets. Each half has a bucket for every
    distance below count / 4, then buckets evenly spaced in the logarithm up to max_distance, and a last one
    for the rest.
    """
    half, near = count // 2, count // 4
    # Edges instead of logarithms: 16, 32 and 64 lie on edges, where logarithms round differently per device.
    far = [near * (max_distance / near) ** (i / (half - near)) - 1e-6 for i in range(1, half - near)]
    edges = torch.tensor([*range(1, near + 1), *far], dtype=torch.float32)
    edges = edges.to(distance.device, non_blocking=True)
    return torch.bucketize(distance.abs(), edges, right=True) + half * (distance > 0)


class Block(nn.Module):
    """Self-attention, then a gated MLP (GEGLU, Shazeer 2020), both pre-norm with a residual connection."""

    def __init__(self, p: T5Params) -> None:
        super().__init__()
        self.norm1 = RMSNorm(p.width)
        self.attention = BiasedAttention(p.width, p.heads, p.head_dim)
        self.norm2 = RMSNorm(p.width)
        self.gate, self.fc1 = (nn.Linear(p.width, p.hidden, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(p.hidden, p.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), bias)
        y = self.norm2(x)
        hidden = F.gelu(self.gate(y), approximate="tanh").to(x.dtype) * self.fc1(y)
        if y.dtype != torch.float16:
            return x + self.fc2(hidden.to(y.dtype))
        with InFloat32():  # `hidden` exceeds the range of float16
            return x + self.fc2(hidden)


class BiasedAttention(nn.Module):
    """Attention with scores q k^T + bias, not divided by sqrt(d); separate layers, as files hold them."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        layers = (self.q, self.k, self.v)
        q, k, v = (rearrange(layer(x), "b l (h d) -> b h l d", h=self.heads) for layer in layers)
        return self.out(attend(q, k, v, mask=bias, scale=1.0))


class RMSNorm(nn.RMSNorm):
    """RMS norm (Zhang & Sennrich 2019) in the dtype of x, rounded to the dtype of the weight."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
