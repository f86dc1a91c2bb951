"""Chroma (Lodestone Rock 2025, weights only): FLUX.1 [schnell] with one small network for all modulations.

Modulations are a quarter of FLUX.1's weights, but depend on little more than the time, so that a small
network can compute them. Prompts are read by T5 alone, without CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.condition import NONE, Condition
from diffusion.spec import check_at_least_one
from models.layers.conditioning import network_input, sinusoid
from models.layers.half import with_enough_precision
from models.layers.joint import HeadNorm, Stream
from models.layers.modulation import ModulationRows
from models.networks.flux import SingleBlock, Trunk, TrunkParams


@dataclass(frozen=True)
class ChromaParams(TrunkParams):
    """Parameters of Chroma; the defaults are Chroma1-HD.

    waves  features that encode the time and the row of the modulation table, a multiple of 8
    width_approximator, depth_approximator  width and number of the approximator's residual blocks
    """

    vector_dim: ClassVar[None] = None

    waves: int = 64
    width_approximator: int = 5120
    depth_approximator: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "waves", "width_approximator", "depth_approximator")
        if self.waves % 8:
            use = "a quarter for the time, a quarter for guidance, half for the row"
            raise ValueError(f"waves={self.waves} must divide by 8: {use}")


class Chroma(Trunk):
    """forward(x (B, C, H, W), t (B,) in [0, 1], condition) -> (B, out_channels, H, W).

    The context is (B, L, 4096), with a mask for the prompt's tokens and the first padding token after them,
    as in training. Sides that do not divide by the patch size are padded inside and cropped again
    (`whole_patches`).
    """

    params: ChromaParams
    approximator: Approximator

    def __init__(self, params: ChromaParams) -> None:
        # The published order: single blocks, image streams, text streams, output.
        single, streams = params.depth_single * SingleBlock.parts, params.depth * Stream.parts
        rows = [single, streams, streams, 2]
        super().__init__(params, ModulationRows, approximator=Approximator(params, sum(rows)))
        self.rows = rows

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.approximator.out.weight)

    @with_enough_precision
    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        x = network_input(x, condition, self.params)
        single, image, text, out = self.approximator(t).split(self.rows, dim=1)
        streams = (rows.split(Stream.parts, dim=1) for rows in (image, text))
        joint = (torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))
        return self.run_blocks(x, [*joint, *single.split(SingleBlock.parts, dim=1), out], condition)


class Approximator(nn.Module):
    """forward(t (B,) in [0, 1]) -> all modulations (B, rows, hidden), from the time and the row numbers."""

    def __init__(self, p: ChromaParams, rows: int) -> None:
        super().__init__()
        self.waves, self.rows = p.waves, rows
        self.fc_in = nn.Linear(p.waves, p.width_approximator)
        blocks = (ApproximatorBlock(p.width_approximator) for _ in range(p.depth_approximator))
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(p.width_approximator, p.hidden)

    def forward(self, t: Tensor) -> Tensor:
        quarter, half = self.waves // 4, self.waves // 2
        # FLUX.1's guidance scale is always 0 here. Row numbers are scaled by 1000, as times are.
        time = torch.cat([sinusoid(1000.0 * t, quarter), sinusoid(torch.zeros_like(t), quarter)], dim=-1)
        row = sinusoid(1000.0 * torch.arange(self.rows, device=t.device), half)
        time, row = time[:, None].expand(-1, self.rows, -1), row.expand(len(t), -1, -1)
        x = self.fc_in(torch.cat([time, row], dim=-1).to(self.fc_in.bias.dtype))  # (B, rows, width)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class ApproximatorBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = HeadNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.silu(self.fc1(self.norm(x))))
