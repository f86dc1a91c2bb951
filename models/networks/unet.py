"""The UNet of ADM (Dhariwal & Nichol 2021) and latent diffusion (Rombach et al. 2022; Podell et al. 2023).

SD 1 / 2 / XL and a network for 8x8 digits are configurations of it. ADM is too, except that ADM resamples
inside residual blocks: here resampling is a separate convolution, as in latent diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.condition import NONE, Condition
from diffusion.spec import check_at_least_one, check_names, check_range
from models.layers.attention import CrossAttention, SelfAttention, key_mask
from models.layers.blocks import BlockNetwork
from models.layers.conditioning import (
    GuidanceEmbedding,
    LabelEmbedding,
    NetworkParams,
    TimeEmbedding,
    VectorEmbedding,
    network_input,
)
from models.layers.half import with_enough_precision
from models.layers.upsample import Upsample


@dataclass(frozen=True)
class UNetParams(NetworkParams):
    """Parameters of a UNet. Tuples have one value per level, from the finest to the coarsest.

    in_channels, out_channels  a learned variance doubles the output channels
    channels           width of the finest level; levels are channels * channel_mult wide
    blocks             residual blocks per level on the way down; the way up has one more
    attention          attention blocks after each residual block, 0 for none
    middle_attention   the same in the middle
    attention_kind     "transformer": self-attention, cross-attention to the context if there is one,
                       feed-forward (latent diffusion); "plain": self-attention only (ADM)
    heads, head_dim    give one of the two; the other follows from the width
    linear_projection  transformers begin and end with a linear layer (SD 2, XL), not a 1x1 convolution (SD 1)
    scale_shift        the embedding scales and shifts (ADM), instead of being added (latent diffusion)
    num_classes, vector_dim, context_dim  for the conditions it takes: label, vector, text; None: not taken
    guidance_dim       frequencies of the guidance scale of distilled networks (LCM: 256); None: not taken
    time_factor        scales t: 1 for training indices, 1000 for t in [0, 1]; set by `models.build`
    groups             of all group norms; must divide every width
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (1, 1, 1, 0)
    middle_attention: int = 1
    attention_kind: Literal["transformer", "plain"] = "transformer"
    heads: int | None = None
    head_dim: int | None = 64
    linear_projection: bool = False
    scale_shift: bool = False
    num_classes: int | None = None
    vector_dim: int | None = None
    context_dim: int | None = None
    guidance_dim: int | None = None
    time_factor: float = 1.0
    dropout: float = 0.0
    groups: int = 32

    def __post_init__(self) -> None:
        check_at_least_one(
            self, "in_channels", "out_channels", "channels", "channel_mult", "blocks", "groups"
        )
        check_at_least_one(
            self, "heads", "head_dim", "num_classes", "vector_dim", "context_dim", "guidance_dim"
        )
        check_range(self, "attention", "middle_attention", "dropout", least=0)
        check_range(self, "time_factor", least=1e-6, most=1e6)
        if len(self.attention) != len(self.channel_mult):
            levels = f"attention has {len(self.attention)} levels, channel_mult {len(self.channel_mult)}"
            raise ValueError(f"{levels}: give one value per level")
        if (self.heads is None) == (self.head_dim is None):
            raise ValueError("give either heads or head_dim, and set the other to null")
        for width in (self.channels * m for m in self.channel_mult):
            if width % self.groups:
                raise ValueError(f"a level of {width} channels does not divide into groups={self.groups}")
        check_names("attention kind", [self.attention_kind], ["transformer", "plain"])
        depth = max((*self.attention, self.middle_attention))
        if self.context_dim is not None and (depth == 0 or self.attention_kind == "plain"):
            remedy = "set context_dim to null, or choose transformer attention"
            raise ValueError(f"nothing in this UNet attends to a context: {remedy}")
        if depth > 1 and self.attention_kind == "plain":
            raise ValueError(f"plain attention comes once after a residual block, not {depth} times")

    def count_heads(self, width: int) -> int:
        """Attention heads in a block of that width."""
        divisor = self.heads or self.head_dim
        if not divisor or width % divisor:
            sizes = f"heads={self.heads}, head_dim={self.head_dim}"
            raise ValueError(f"{width} channels do not divide into heads ({sizes})")
        return self.heads or width // divisor


class UNet(BlockNetwork):
    """forward(x (B, C, H, W), t (B,), condition) -> (B, out_channels, H, W) for any H and W.

    Its parameters say which of label (B,), context (B, L, D), vector (B, V) and guidance scale (B,) it takes.
    Odd sides are halved upwards, and cropped to their size again on the way up.
    """

    def __init__(self, params: UNetParams) -> None:
        super().__init__()
        self.params = p = params
        widths = [p.channels * m for m in p.channel_mult]
        emb = 4 * p.channels
        self.time = TimeEmbedding(p.channels, emb, p.time_factor)
        self.label = None if p.num_classes is None else LabelEmbedding(p.num_classes, emb)
        self.vector = None if p.vector_dim is None else VectorEmbedding(p.vector_dim, emb)
        self.guidance = None if p.guidance_dim is None else GuidanceEmbedding(p.guidance_dim, p.channels)

        self.conv_in = nn.Conv2d(p.in_channels, p.channels, 3, padding=1)
        skips = [p.channels]  # the widths of the skip connections
        self.down = nn.ModuleList()
        for level, (width_in, width) in enumerate(pairwise([p.channels, *widths])):
            for i in range(p.blocks):
                self.down.append(Block(p, width if i else width_in, width, emb, p.attention[level]))
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        middle = (Block(p, width, width, emb, depth) for depth in (p.middle_attention, 0))
        self.middle = nn.ModuleList(middle)

        self.up = nn.ModuleList()
        for level, width_out in reversed(list(enumerate(widths))):
            for _ in range(p.blocks + 1):
                self.up.append(Block(p, width + skips.pop(), width_out, emb, p.attention[level]))
                width = width_out
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = nn.GroupNorm(p.groups, p.channels)
        self.conv_out = nn.Conv2d(p.channels, p.out_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's defaults, but the last layer of residual branches is zero: blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, ResBlock):
                _zero(module.conv2)
            elif isinstance(module, PlainAttention):
                _zero(module.attention.out)
            elif isinstance(module, SpatialTransformer):
                _zero(module.proj_out)
        _zero(self.conv_out)
        if self.label is not None:
            nn.init.normal_(self.label.table.weight, std=0.02)

    @with_enough_precision
    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        p = self.params
        x = network_input(x, condition, p)
        emb = self.time(t, None if self.guidance is None else self.guidance(condition.guidance))
        if self.label is not None:
            emb = emb + self.label(condition.label)
        if self.vector is not None:
            emb = emb + self.vector(condition.vector)
        emb = F.silu(emb)  # (B, 4C)
        shared = emb, condition.context, key_mask(condition.mask)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down:
            x = self.run(block, x, *shared)
            skips.append(x)
        for block in self.middle:
            x = self.run(block, x, *shared)
        for block in self.up:
            if isinstance(block, Upsample):
                x = self.run(block, x, skips[-1].shape[-2:])
            else:
                x = self.run(block, torch.cat([x, skips.pop()], dim=1), *shared)
        return self.conv_out(F.silu(self.norm_out(x)))


class Block(nn.Module):
    """A residual block and the attention after it."""

    def __init__(self, p: UNetParams, width_in: int, width: int, emb: int, depth: int) -> None:
        super().__init__()
        self.res = ResBlock(p, width_in, width, emb)
        self.attention: nn.Module | None = None
        if depth:
            plain = p.attention_kind == "plain"
            self.attention = PlainAttention(p, width) if plain else SpatialTransformer(p, width, depth)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        x = self.res(x, emb)
        return x if self.attention is None else self.attention(x, context, mask)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with the embedding in between and a residual connection."""

    def __init__(self, p: UNetParams, width_in: int, width: int, emb: int) -> None:
        super().__init__()
        self.scale_shift = p.scale_shift
        self.norm1 = nn.GroupNorm(p.groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * width if p.scale_shift else width)
        self.norm2 = nn.GroupNorm(p.groups, width)
        self.dropout = nn.Dropout(p.dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        e = self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class PlainAttention(nn.Module):
    """ADM's attention: self-attention over all pixels."""

    def __init__(self, p: UNetParams, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(p.groups, width)
        self.attention = SelfAttention(width, p.count_heads(width))

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class SpatialTransformer(nn.Module):
    """Latent diffusion's transformer over pixels: `depth` blocks between two projections, added to x."""

    def __init__(self, p: UNetParams, width: int, depth: int) -> None:
        super().__init__()
        self.linear = p.linear_projection
        self.norm = nn.GroupNorm(p.groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        heads = p.count_heads(width)
        self.blocks = nn.ModuleList(TransformerBlock(width, p.context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c").contiguous()  # once, instead of in each of the next layers
        if self.linear:
            h = self.proj_in(h)
        for block in self.blocks:
            h = block(h, context, mask)
        if self.linear:
            h = self.proj_out(h)
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        if not self.linear:
            h = self.proj_out(h)
        return x + h


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward: pre-norm, residual connections."""

    def __init__(self, width: int, context_dim: int | None, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads, qkv_bias=False)
        text = context_dim
        self.norm2 = None if text is None else nn.LayerNorm(width)
        self.cross_attention = None if text is None else CrossAttention(width, text, heads, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = GatedFeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        if self.cross_attention is not None and self.norm2 is not None:
            x = x + self.cross_attention(self.norm2(x), context, mask)
        return x + self.feed_forward(self.norm3(x))


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020), with four times the width inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        return self.conv(x)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
