"""What SD 3 and FLUX.1 are built of: text and image tokens, each with weights of their own, in one attention
(Esser et al. 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers.attention import attend
from models.layers.modulation import Modulation, gated, modulate, norm
from models.layers.rotary import turn

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values, each (B, H, L, d)


def split_heads(qkv: Tensor, heads: int) -> Heads:
    """(B, L, 3*D) to heads that lie one after the other in memory: a copy, which norms and attention more
    than make up for."""
    q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=heads).contiguous()
    return q, k, v


class HeadNorm(nn.RMSNorm):
    """Of queries or keys the direction, times a learned number per feature; in the dtype of x, also where
    training keeps weights wider."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Projection(nn.Module):
    """Tokens (B, L, D) to queries, keys and values; with qk_norm, of queries and keys the direction only
    (Henry et al. 2020)."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = HeadNorm(dim // heads) if qk_norm else nn.Identity()
        self.norm_k = HeadNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Heads:
        q, k, v = split_heads(self.qkv(x), self.heads)
        return self.norm_q(q), self.norm_k(k), v


class Attention(Projection):
    """With the way back to tokens."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__(dim, heads, qk_norm)
        self.out = nn.Linear(dim, dim)


class Stream(nn.Module):
    """One kind of tokens within a block: all of it but the attention, in which the kinds meet.

    modulation  gives the `parts` of its modulation from the network's embedding; None: a product of its own
    """

    parts = 6

    def __init__(
        self, dim: int, heads: int, qk_norm: bool, mlp_ratio: float = 4.0, modulation: nn.Module | None = None
    ) -> None:
        super().__init__()
        inner = int(dim * mlp_ratio)
        self.modulation = modulation or Modulation(dim, self.parts)
        self.attention = Attention(dim, heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, dim))

    def project(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Heads:
        """What the tokens bring to the attention."""
        shift, scale, *_ = modulation
        return self.attention(modulate(norm(x), shift, scale))

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """What they take from it, and the MLP."""
        _, _, gate1, shift2, scale2, gate2, *_ = modulation
        x = gated(x, gate1, self.attention.out(attended))
        return gated(x, gate2, self.mlp(modulate(norm(x), shift2, scale2)))


class DualStream(Stream):
    """Tokens that also attend to their own kind only, side by side with the joint attention (Stable Diffusion
    3.5 medium)."""

    parts = 9

    def __init__(self, dim: int, heads: int, qk_norm: bool, mlp_ratio: float = 4.0) -> None:
        super().__init__(dim, heads, qk_norm, mlp_ratio)
        self.attention2 = Attention(dim, heads, qk_norm)

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        shift3, scale3, gate3 = modulation[6:]
        own = attend(*self.attention2(modulate(norm(x), shift3, scale3)))
        return super().update(gated(x, gate3, self.attention2.out(own)), attended, modulation)


class LastStream(nn.Module):
    """Tokens that nobody looks at any more: they are attended to, and stay what they are."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 2)
        self.attention = Projection(dim, heads, qk_norm)

    def project(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Heads:
        return self.attention(modulate(norm(x), *modulation))

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        return x


class JointBlock(nn.Module):
    """Text (B, L, D) and image (B, N, D) attend to both, each through its own stream.

    emb (B, D); angles as `rotary.turns` has them, None for none; mask as `key_mask` has it, None for all
    tokens
    """

    def __init__(self, image: Stream, text: Stream | LastStream) -> None:
        super().__init__()
        self.image, self.text = image, text

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        emb: Tensor,
        angles: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        of_text, of_image = self.text.modulation(emb), self.image.modulation(emb)
        both = zip(self.text.project(text, of_text), self.image.project(image, of_image), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in both)
        if angles is not None:
            q, k = turn(q, angles), turn(k, angles)
        # Tokens that lie apart would go through other kernels, which round otherwise, where a weight is
        # trained than where it is not.
        from_text, from_image = (
            part.contiguous()
            for part in attend(q, k, v, mask=mask).split([text.shape[1], image.shape[1]], dim=1)
        )
        return self.text.update(text, from_text, of_text), self.image.update(image, from_image, of_image)


def whole_patches(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) that divide into square patches of that size: rows and columns that lack are taken
    from the other side.

    So what is added has the noise of the rest. The network's output is cut to the size of x again (as ComfyUI
    does both).
    """
    below, right = -x.shape[-2] % size, -x.shape[-1] % size
    return F.pad(x, (0, right, 0, below), mode="circular") if below or right else x
