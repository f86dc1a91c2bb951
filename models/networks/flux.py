"""FLUX.1: blocks of two streams, then of one, and rotary positions (Black Forest Labs, arXiv:2506.15742)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.condition import NONE, Condition
from diffusion.spec import check_at_least_one, check_range
from models.layers.attention import attend, key_mask
from models.layers.blocks import BlockNetwork
from models.layers.conditioning import NetworkParams, TimeEmbedding, VectorEmbedding, network_input
from models.layers.half import with_enough_precision
from models.layers.joint import HeadNorm, JointBlock, Stream, split_heads, whole_patches
from models.layers.modulation import Modulation, gated, modulate, norm, start_at_identity
from models.layers.rotary import positions, rotate, rotations


@dataclass(frozen=True)
class TrunkParams(NetworkParams):
    """Common parameters of FLUX.1 and the networks derived from it.

    in_channels   of x and the image condition: 96 in Fill (x 16, latents 16, mask 64), 32 in Canny and Depth
    depth, depth_single  number of blocks with two streams, and of the following blocks with one
    context_dim   width of the text tokens (T5)
    axes          features of a head that rotate with each of three coordinates: 0, row and column
    theta         the longest wavelength of the rotations / 2 pi
    patch_size    height and width of a token's patch of x
    """

    in_channels: int = 16
    out_channels: int = 16
    hidden: int = 3072
    heads: int = 24
    depth: int = 19
    depth_single: int = 38
    context_dim: int = 4096
    axes: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10_000.0
    mlp_ratio: float = 4.0
    patch_size: int = 2

    def __post_init__(self) -> None:
        check_at_least_one(self, "in_channels", "out_channels", "hidden", "heads", "depth", "depth_single")
        check_at_least_one(self, "patch_size", "context_dim", "axes")
        check_range(self, "theta", "mlp_ratio", least=1e-6, most=1e9)
        if len(self.axes) != 3 or any(dim % 2 for dim in self.axes):
            raise ValueError(f"axes are three even numbers, for 0, row and column, not {self.axes}")
        if self.hidden != self.heads * sum(self.axes):
            sizes = f"heads={self.heads} times the sum of axes={self.axes}"
            raise ValueError(f"hidden={self.hidden} must be {sizes}")


@dataclass(frozen=True)
class FluxParams(TrunkParams):
    """Parameters of FLUX.1; the defaults are [dev].

    vector_dim    width of the pooled text (CLIP)
    guidance_dim  frequencies of the guidance scale's embedding; None: the network takes no scale ([schnell])
    """

    vector_dim: int = 768
    guidance_dim: int | None = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "vector_dim", "guidance_dim")


class Trunk(BlockNetwork):
    """FLUX.1 except the embedding that modulates its blocks.

    modulation  modulation(before, parts) returns a module that computes `parts` tensors from a block's
                embedding, for a stream behind streams with `before` parts in the same block
    embeddings  the modules that compute these embeddings, by name
    """

    block_lists = ("joint", "single")  # in the order in which they are called

    def __init__(
        self, params: TrunkParams, modulation: Callable[[int, int], nn.Module], **embeddings: nn.Module | None
    ) -> None:
        super().__init__()
        self.params = p = params
        self.patch_in = nn.Linear(p.in_channels * p.patch_size**2, p.hidden)
        self.context_in = nn.Linear(p.context_dim, p.hidden)
        for name, embedding in embeddings.items():
            self.add_module(name, embedding)

        def stream(before: int) -> Stream:
            return Stream(p.hidden, p.heads, True, p.mlp_ratio, modulation(before, Stream.parts))

        self.joint = nn.ModuleList(JointBlock(stream(0), stream(Stream.parts)) for _ in range(p.depth))
        single = (SingleBlock(p, modulation(0, SingleBlock.parts)) for _ in range(p.depth_single))
        self.single = nn.ModuleList(single)
        self.modulation_out = modulation(0, 2)
        self.patch_out = nn.Linear(p.hidden, p.out_channels * p.patch_size**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every block starts as the identity, and the output at zero."""
        start_at_identity(self)
        nn.init.zeros_(self.patch_out.weight)

    def run_blocks(self, x: Tensor, embeddings: Iterable[Tensor], condition: Condition) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H, W). The last embedding is for the output."""
        p = self.params
        height, width = x.shape[-2:]
        x = whole_patches(x, p.patch_size)
        h, w = x.shape[-2] // p.patch_size, x.shape[-1] // p.patch_size
        image = self.patch_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", h=h, w=w))  # (B, N, D)
        text = self.context_in(condition.context)  # (B, L, D)
        mask = key_mask(condition.mask, image.shape[1])
        angles = rotations(positions(text.shape[1], h, w, x.device), p.axes, p.theta)
        emb = iter(embeddings)
        for block in self.joint:
            text, image = self.run(block, text, image, next(emb), angles, mask)

        tokens = torch.cat([text, image], dim=1)  # (B, L + N, D)
        for block in self.single:
            tokens = self.run(block, tokens, next(emb), angles, mask)

        image = tokens[:, text.shape[1] :]
        image = self.patch_out(modulate(norm(image), *self.modulation_out(next(emb))))  # (B, N, C*p*q)
        image = rearrange(image, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=p.patch_size, q=p.patch_size)
        return image[..., :height, :width]


class Flux(Trunk):
    """forward(x (B, C, H, W), t (B,) in [0, 1], condition) -> (B, out_channels, H, W).

    It takes the context (B, L, 4096), the vector (B, 768) and in [dev] the guidance scale (B,), usually 3.5.

    Sides that do not divide by the patch size are padded inside and cropped again (`whole_patches`). Times
    and scales are float32 for all dtypes of weights; the published code rounds them to that dtype first.
    """

    params: FluxParams
    time: TimeEmbedding
    guidance: TimeEmbedding | None
    vector: VectorEmbedding

    def __init__(self, params: FluxParams) -> None:
        p, hidden, scales = params, params.hidden, params.guidance_dim
        super().__init__(
            p,
            lambda before, parts: Modulation(hidden, parts),
            time=TimeEmbedding(256, hidden, factor=1000.0),
            guidance=None if scales is None else TimeEmbedding(scales, hidden, factor=1000.0),
            vector=VectorEmbedding(p.vector_dim, hidden),
        )

    @with_enough_precision
    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        x = network_input(x, condition, self.params)
        emb = self.time(t)
        if self.guidance is not None:
            emb = emb + self.guidance(condition.guidance)
        emb = F.silu(emb + self.vector(condition.vector))  # (B, D)
        return self.run_blocks(x, repeat(emb), condition)


class SingleBlock(nn.Module):
    """Parallel attention and MLP between two linear layers (as in Dehghani et al. 2023), over all tokens."""

    parts = 3

    def __init__(self, p: TrunkParams, modulation: nn.Module) -> None:
        super().__init__()
        self.heads, self.inner = p.heads, int(p.hidden * p.mlp_ratio)
        self.modulation = modulation
        self.qkv_mlp = nn.Linear(p.hidden, 3 * p.hidden + self.inner)
        self.norm_q, self.norm_k = (HeadNorm(p.hidden // p.heads) for _ in range(2))
        self.out = nn.Linear(p.hidden + self.inner, p.hidden)

    def forward(self, x: Tensor, emb: Tensor, angles: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb)
        qkv, mlp = self.qkv_mlp(modulate(norm(x), shift, scale)).split([3 * x.shape[-1], self.inner], dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        attended = attend(rotate(self.norm_q(q), angles), rotate(self.norm_k(k), angles), v, mask=mask)
        return gated(x, gate, self.out(torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1)))
