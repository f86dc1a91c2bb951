"""Blocks of SD 3 and FLUX.1: separate weights for text and image, joint attention (Esser et al. 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers.attention import attend
from models.layers.modulation import Modulation, gated, modulate, norm
from models.layers.rotary import rotate

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values, each (B, H, L, d)


def split_heads(qkv: Tensor, heads: int) -> Heads:
    """(B, L, 3*D) to contiguous heads: norms and attention save more time than the copy takes."""
    q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=heads).contiguous()
    return q, k, v


class HeadNorm(nn.RMSNorm):
    """RMS norm of queries or keys, in the dtype of x even if training keeps the weights in a wider one."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Projection(nn.Module):
    """Tokens (B, L, D) to queries, keys and values; qk_norm normalises the first two (Henry et al. 2020)."""

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
    """A projection, and the output layer of the attention."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__(dim, heads, qk_norm)
        self.out = nn.Linear(dim, dim)


class Stream(nn.Module):
    """The layers of a block for one kind of tokens (text or image), except the joint attention itself.

    modulation  maps the network's embedding to the `parts` of the modulation; None: a linear layer of its own
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
        """Queries, keys and values for the joint attention."""
        shift, scale, *_ = modulation
        return self.attention(modulate(norm(x), shift, scale))

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Adds the attention's output, then the MLP's."""
        _, _, gate1, shift2, scale2, gate2, *_ = modulation
        x = gated(x, gate1, self.attention.out(attended))
        return gated(x, gate2, self.mlp(modulate(norm(x), shift2, scale2)))


class DualStream(Stream):
    """A stream whose tokens also attend to their own kind alone (Stable Diffusion 3.5 medium)."""

    parts = 9

    def __init__(self, dim: int, heads: int, qk_norm: bool, mlp_ratio: float = 4.0) -> None:
        super().__init__(dim, heads, qk_norm, mlp_ratio)
        self.attention2 = Attention(dim, heads, qk_norm)

    def update(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        shift3, scale3, gate3 = modulation[6:]
        own = attend(*self.attention2(modulate(norm(x), shift3, scale3)))
        return super().update(gated(x, gate3, self.attention2.out(own)), attended, modulation)


class LastStream(nn.Module):
    """The text stream of the last block: its tokens are attended to, but not updated."""

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

    emb (B, D); angles: of `rotary.rotations`, None: no rotation; mask: of `key_mask`, None: all tokens
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
        text_mod, image_mod = self.text.modulation(emb), self.image.modulation(emb)
        heads = zip(self.text.project(text, text_mod), self.image.project(image, image_mod), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in heads)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        # Contiguous, since other layouts choose kernels, and so a rounding, that depend on requires_grad.
        lengths = [text.shape[1], image.shape[1]]
        out_text, out_image = (part.contiguous() for part in attend(q, k, v, mask=mask).split(lengths, dim=1))
        return self.text.update(text, out_text, text_mod), self.image.update(image, out_image, image_mod)


def whole_patches(x: Tensor, size: int) -> Tensor:
    """Pads images (B, C, H, W) circularly to a multiple of the patch size, so that the padding is as noisy.

    Networks crop their output to the size of x again. ComfyUI does both in the same way.
    """
    below, right = -x.shape[-2] % size, -x.shape[-1] % size
    return F.pad(x, (0, right, 0, below), mode="circular") if below or right else x
