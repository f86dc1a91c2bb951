"""FLUX.1: a flow through blocks of two streams, then of one, with rotary positions (Black Forest Labs 2024;
arXiv:2506.15742)."""

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
    """What FLUX.1 and the networks made from it have in common; the defaults are theirs.

    in_channels   of x and of what it is given beside it: 96 in Fill (x 16, masked latents 16, mask 64), 32 in
                  Canny and Depth
    depth, depth_single  blocks of two streams, and blocks of one behind them
    context_dim   width of the text tokens (T5)
    axes          features of a head that turn with each of three coordinates, 0, row and column; theta: their
                  longest wavelength / 2 pi
    patch_size    pixels of x to a token, in height and width
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
        check_at_least_one(
            self, "in_channels", "out_channels", "hidden", "heads", "depth", "depth_single", "patch_size"
        )
        check_at_least_one(self, "context_dim", "axes")
        check_range(self, "theta", "mlp_ratio", least=1e-6, most=1e9)
        if len(self.axes) != 3 or any(dim % 2 for dim in self.axes):
            raise ValueError(
                f"axes are three even numbers of features, for 0, row and column, not {self.axes}"
            )
        if self.hidden != self.heads * sum(self.axes):
            raise ValueError(
                f"hidden={self.hidden} must be heads={self.heads} times the {sum(self.axes)} features of "
                f"axes={self.axes}"
            )


@dataclass(frozen=True)
class FluxParams(TrunkParams):
    """One Flux; the defaults are FLUX.1-dev.

    vector_dim    width of the pooled text (CLIP)
    guidance_dim  frequencies of the guidance scale that a distilled net takes; None: takes none (schnell)
    """

    vector_dim: int = 768
    guidance_dim: int | None = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "vector_dim", "guidance_dim")


class Trunk(BlockNetwork):
    """Blocks of two streams, then of one, over tokens of text and patches of x: all of FLUX.1 but the
    embedding of what modulates them.

    modulation  makes a module that gives a block, or one of its streams, its modulation from the block's
                embedding: called with the number of parts that streams before it in the block take, and of
                those that it takes
    embeddings  what makes these embeddings, by name
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
            return Stream(
                p.hidden,
                p.heads,
                qk_norm=True,
                mlp_ratio=p.mlp_ratio,
                modulation=modulation(before, Stream.parts),
            )

        self.joint = nn.ModuleList(JointBlock(stream(0), stream(Stream.parts)) for _ in range(p.depth))
        self.single = nn.ModuleList(
            SingleBlock(p, modulation(0, SingleBlock.parts)) for _ in range(p.depth_single)
        )
        self.modulation_out = modulation(0, 2)
        self.patch_out = nn.Linear(p.hidden, p.out_channels * p.patch_size**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every block starts as the identity, and the output at zero."""
        start_at_identity(self)
        nn.init.zeros_(self.patch_out.weight)

    def through_blocks(self, x: Tensor, embs: Iterable[Tensor], condition: Condition) -> Tensor:
        """The output (B, out_channels, H, W) from x (B, in_channels, H, W), text, and for each block and the
        output what modulates it."""
        p = self.params
        height, width = x.shape[-2:]
        x = whole_patches(x, p.patch_size)
        h, w = x.shape[-2] // p.patch_size, x.shape[-1] // p.patch_size
        image = self.patch_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", h=h, w=w))  # (B, N, D)
        text = self.context_in(condition.context)  # (B, L, D)
        mask = key_mask(condition.mask, image.shape[1])
        angles = rotations(positions(text.shape[1], h, w, x.device), p.axes, p.theta)
        rest = iter(embs)
        for block in self.joint:
            text, image = self.run(block, text, image, next(rest), angles, mask)

        tokens = torch.cat([text, image], dim=1)  # (B, L + N, D)
        for block in self.single:
            tokens = self.run(block, tokens, next(rest), angles, mask)

        image = tokens[:, text.shape[1] :]
        image = self.patch_out(modulate(norm(image), *self.modulation_out(next(rest))))  # (B, N, C*p*q)
        image = rearrange(image, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=p.patch_size, q=p.patch_size)
        return image[..., :height, :width]


class Flux(Trunk):
    """forward(x (B, C, H, W), t (B,) in [0, 1], condition) -> (B, out_channels, H, W).

    Told are the context (B, L, 4096), a vector (B, 768) and, by [dev], the guidance scale (B,).

    A side that does not divide by the patch size is filled up inside and cut again (`whole_patches`).
    `guidance` is the scale that the network imitates, in FLUX.1-dev 3.5 as a rule.
    Times and scales are float32 whatever the weights are; the published code rounds them to those first.
    """

    params: FluxParams
    time: TimeEmbedding
    guidance: TimeEmbedding | None
    vector: VectorEmbedding

    def __init__(self, params: FluxParams) -> None:
        p = params
        super().__init__(
            p,
            lambda before, n: Modulation(p.hidden, n),
            time=TimeEmbedding(256, p.hidden, factor=1000.0),
            guidance=None
            if p.guidance_dim is None
            else TimeEmbedding(p.guidance_dim, p.hidden, factor=1000.0),
            vector=VectorEmbedding(p.vector_dim, p.hidden),
        )

    @with_enough_precision
    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        x = network_input(x, condition, self.params)
        emb = self.time(t)
        if self.guidance is not None:
            emb = emb + self.guidance(condition.guidance)
        emb = F.silu(emb + self.vector(condition.vector))  # (B, D)
        return self.through_blocks(x, repeat(emb), condition)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, between two products (as in Dehghani et al. 2023), over text and image
    tokens alike."""

    parts = 3

    def __init__(self, p: TrunkParams, modulation: nn.Module) -> None:
        super().__init__()
        self.heads, self.inner = p.heads, int(p.hidden * p.mlp_ratio)
        self.modulation = modulation
        self.qkv_mlp = nn.Linear(p.hidden, 3 * p.hidden + self.inner)
        self.norm_q = HeadNorm(p.hidden // p.heads)
        self.norm_k = HeadNorm(p.hidden // p.heads)
        self.out = nn.Linear(p.hidden + self.inner, p.hidden)

    def forward(self, x: Tensor, emb: Tensor, angles: Tensor, mask: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb)
        qkv, mlp = self.qkv_mlp(modulate(norm(x), shift, scale)).split([3 * x.shape[-1], self.inner], dim=-1)
        q, k, v = split_heads(qkv, self.heads)
        attended = attend(rotate(self.norm_q(q), angles), rotate(self.norm_k(k), angles), v, mask=mask)
        return gated(x, gate, self.out(torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1)))
