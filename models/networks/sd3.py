"""MMDiT of Stable Diffusion 3 and 3.5: streams for text and image in each block (Esser et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.condition import NONE, Condition
from diffusion.spec import check_at_least_one
from models.layers.attention import key_mask
from models.layers.blocks import BlockNetwork
from models.layers.conditioning import NetworkParams, TimeEmbedding, VectorEmbedding, network_input
from models.layers.half import with_enough_precision
from models.layers.joint import DualStream, JointBlock, LastStream, Stream, whole_patches
from models.layers.modulation import Modulation, modulate, norm, start_at_identity
from models.networks.dit import position_embedding

HEAD_DIM = 64
POSITIONS = 64  # the side in patches of images whose positions are 1 apart


@dataclass(frozen=True)
class SD3Params(NetworkParams):
    """Parameters of an SD3; the defaults are SD 3 medium. The width follows from the depth (section 5.3).

    depth        blocks: 24 in both medium models, 38 in 3.5 large
    heads        of 64 features each; None: as many as blocks
    context_dim  width of the text tokens; vector_dim: of the pooled text
    positions    side of the position table in patches, the largest image: 192, or 384 in 3.5 medium
    qk_norm      normalise queries and keys (3.5)
    dual         number of first blocks in which the image also attends to itself alone (13 in 3.5 medium)
    """

    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    depth: int = 24
    heads: int | None = None
    context_dim: int = 4096
    vector_dim: int = 2048
    positions: int = 192
    qk_norm: bool = False
    dual: int = 0

    def __post_init__(self) -> None:
        check_at_least_one(self, "in_channels", "out_channels", "patch_size", "depth", "heads")
        check_at_least_one(self, "context_dim", "vector_dim", "positions")
        if not 0 <= self.dual <= self.depth:
            raise ValueError(f"dual={self.dual} must be 0 to depth={self.depth}: it is a number of blocks")

    @property
    def hidden(self) -> int:
        return HEAD_DIM * (self.heads or self.depth)

    @property
    def largest(self) -> int:
        """The largest height and width of x."""
        return self.positions * self.patch_size


class SD3(BlockNetwork):
    """forward(x (B, C, H, W), t (B,) in [0, 1], condition) -> (B, out_channels, H, W).

    It takes the context (B, L, 4096) and the vector (B, 2048). H and W are at most `positions` patches. Sides
    that do not divide by the patch size are padded inside and cropped again (`whole_patches`).
    """

    block_lists = ("blocks",)  # in the order in which they are called

    def __init__(self, params: SD3Params) -> None:
        super().__init__()
        self.params = p = params
        self.patch_in = nn.Conv2d(p.in_channels, p.hidden, p.patch_size, stride=p.patch_size)
        table = position_embedding(p.positions, p.hidden, step=POSITIONS / p.positions)
        self.register_buffer("position", table[None])
        self.context_in = nn.Linear(p.context_dim, p.hidden)
        self.time = TimeEmbedding(256, p.hidden, factor=1000.0)
        self.vector = VectorEmbedding(p.vector_dim, p.hidden)
        self.blocks = nn.ModuleList(_block(p, i) for i in range(p.depth))
        self.modulation_out = Modulation(p.hidden, 2)
        self.patch_out = nn.Linear(p.hidden, p.out_channels * p.patch_size**2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every block starts as the identity, and the output at zero."""
        start_at_identity(self)
        nn.init.zeros_(self.patch_out.weight)

    @with_enough_precision
    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        p = self.params
        x = network_input(x, condition, p)
        height, width = x.shape[-2:]
        x = whole_patches(x, p.patch_size)
        h, w = x.shape[-2] // p.patch_size, x.shape[-1] // p.patch_size
        emb = F.silu(self.time(t) + self.vector(condition.vector))  # (B, D)

        image = rearrange(self.patch_in(x), "b c h w -> b (h w) c") + self.positions(h, w)  # (B, N, D)
        text = self.context_in(condition.context)  # (B, L, D)
        mask = key_mask(condition.mask, image.shape[1])
        for block in self.blocks:
            text, image = self.run(block, text, image, emb, None, mask)
        image = self.patch_out(modulate(norm(image), *self.modulation_out(emb)))  # (B, N, p*q*C)
        image = rearrange(image, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p.patch_size, q=p.patch_size)
        return image[..., :height, :width]

    def positions(self, height: int, width: int) -> Tensor:
        """The middle of the position table, (1, height*width, D)."""
        side, patch = self.params.positions, self.params.patch_size
        if height > side or width > side:
            size, most = f"{height * patch}x{width * patch}", f"{side * patch}x{side * patch}"
            raise ValueError(f"this SD3 has positions for {most} latents, not for {size}")
        top, left = (side - height) // 2, (side - width) // 2
        table = self.get_buffer("position").unflatten(1, (side, side))
        return table[:, top : top + height, left : left + width].flatten(1, 2)


def _block(p: SD3Params, i: int) -> JointBlock:
    size = (p.hidden, p.hidden // HEAD_DIM, p.qk_norm)
    return JointBlock(
        image=(DualStream if i < p.dual else Stream)(*size),
        text=(Stream if i < p.depth - 1 else LastStream)(*size),
    )
