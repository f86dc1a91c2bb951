"""DiT: a transformer over patches, conditioned by adaptive layer norms (adaLN-zero, Peebles & Xie 2023).

The published networks take class labels. With `context_dim` each block also attends to a text (as in
PixArt-alpha, Chen et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.condition import NONE, Condition
from diffusion.spec import check_at_least_one, check_range
from models.layers.attention import CrossAttention, SelfAttention, key_mask
from models.layers.blocks import BlockNetwork
from models.layers.conditioning import (
    LabelEmbedding,
    NetworkParams,
    TimeEmbedding,
    VectorEmbedding,
    network_input,
)
from models.layers.half import with_enough_precision
from models.layers.modulation import Modulation, gated, modulate, norm, start_at_identity


@dataclass(frozen=True)
class DiTParams(NetworkParams):
    """Parameters of a DiT; the defaults are DiT-XL/2 on 32x32 latents.

    image_size       height and width of x, in pixels or latents; fixed, as the position embedding is
    learned_variance doubles the output channels: prediction, then variance (Nichol & Dhariwal 2021)
    num_classes, vector_dim, context_dim  for the conditions it takes: label, vector, text; None: not taken
    time_factor      scales t: 1 for training indices, 1000 for t in [0, 1]; set by `models.build`
    """

    in_channels: int = 4
    image_size: int = 32
    patch_size: int = 2
    hidden: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    learned_variance: bool = False
    num_classes: int | None = 1000
    vector_dim: int | None = None
    context_dim: int | None = None
    time_factor: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_at_least_one(self, "in_channels", "image_size", "patch_size", "hidden", "depth", "heads")
        check_at_least_one(self, "num_classes", "vector_dim", "context_dim")
        check_range(self, "dropout", least=0)
        check_range(self, "time_factor", "mlp_ratio", least=1e-6, most=1e6)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must divide by patch_size={self.patch_size}")
        if self.hidden % self.heads or self.hidden % 4:
            raise ValueError(f"hidden={self.hidden} must divide by heads={self.heads} and by 4")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learned_variance else 1)


class DiT(BlockNetwork):
    """forward(x (B, C, H, W), t (B,), condition) -> (B, out_channels, H, W).

    Its parameters say which of label (B,), context (B, L, D) and vector (B, V) it takes.
    """

    def __init__(self, params: DiTParams) -> None:
        super().__init__()
        self.params = p = params
        self.patch_in = nn.Linear(p.in_channels * p.patch_size**2, p.hidden)
        self.time = TimeEmbedding(256, p.hidden, p.time_factor)
        self.label = None if p.num_classes is None else LabelEmbedding(p.num_classes, p.hidden)
        self.vector = None if p.vector_dim is None else VectorEmbedding(p.vector_dim, p.hidden)
        self.register_buffer("position", position_embedding(p.image_size // p.patch_size, p.hidden))
        self.blocks = nn.ModuleList(DiTBlock(p) for _ in range(p.depth))
        self.modulation_out = Modulation(p.hidden, 2)
        self.patch_out = nn.Linear(p.hidden, p.out_channels * p.patch_size**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear layers, 0.02 for embeddings, zero for modulations and the output (adaLN-zero)."""
        start_at_identity(self)
        if self.label is not None:
            nn.init.normal_(self.label.table.weight, std=0.02)
        nn.init.zeros_(self.patch_out.weight)
        for module in self.modules():
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.out.weight)

    @with_enough_precision
    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        p = self.params
        x = network_input(x, condition, p)
        if x.shape[-2:] != (p.image_size, p.image_size):
            size = f"{p.image_size}x{p.image_size}"
            raise ValueError(f"this DiT was built for {size}, not {x.shape[-2]}x{x.shape[-1]}")
        emb = self.time(t)
        if self.label is not None:
            emb = emb + self.label(condition.label)
        if self.vector is not None:
            emb = emb + self.vector(condition.vector)
        emb = F.silu(emb)  # (B, D)

        patch = p.patch_size
        x = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
        x = self.patch_in(x) + self.position  # (B, L, D)
        mask = key_mask(condition.mask)
        for block in self.blocks:
            x = self.run(block, x, emb, condition.context, mask)
        x = self.patch_out(modulate(norm(x), *self.modulation_out(emb)))  # (B, L, p*q*C)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=p.image_size // patch, p=patch, q=patch)


class DiTBlock(nn.Module):
    """Attention and MLP: the embedding shifts and scales their inputs, and gates their outputs."""

    def __init__(self, p: DiTParams) -> None:
        super().__init__()
        inner = int(p.hidden * p.mlp_ratio)
        self.modulation = Modulation(p.hidden, 6)
        self.self_attention = SelfAttention(p.hidden, p.heads)
        text = p.context_dim
        self.cross_attention = None if text is None else CrossAttention(p.hidden, text, p.heads)
        fc1, fc2 = nn.Linear(p.hidden, inner), nn.Linear(inner, p.hidden)
        self.mlp = nn.Sequential(fc1, nn.GELU(approximate="tanh"), nn.Dropout(p.dropout), fc2)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)
        x = gated(x, gate1, self.self_attention(modulate(norm(x), shift1, scale1)))
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, context, mask)
        return gated(x, gate2, self.mlp(modulate(norm(x), shift2, scale2)))


def position_embedding(size: int, dim: int, step: float = 1.0) -> Tensor:
    """Fixed 2-D sinusoids (size*size, dim): the first half of the features encodes the column, then the row.

    step  distance between neighbouring columns or rows
    """
    if torch.get_default_device().type == "meta":  # where arithmetic is slow and has no result
        return torch.empty(size * size, dim)
    frequency = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = step * torch.arange(size, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=-1).float()  # (size, dim/2)
    column, row = line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)
