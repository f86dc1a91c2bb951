"""Chroma: a FLUX.1 [schnell] whose modulations, a quarter of all its weights, come from one small network,
and that reads T5 alone.

Published as weights by Lodestone Rock (2025): the modulations of FLUX.1 depend on little but the time, so a
small network can imitate them.
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
    """One Chroma; the defaults are Chroma1-HD.

    waves       that tell the approximator which modulation to make and at which time, a multiple of 8
    width_approximator, depth_approximator  of its residual blocks
    """

    vector_dim: ClassVar[None] = None  # it is told none

    waves: int = 64
    width_approximator: int = 5120
    depth_approximator: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "waves", "width_approximator", "depth_approximator")
        if self.waves % 8:
            raise ValueError(
                f"waves={self.waves} must divide by 8: a quarter tells the time, a quarter guidance, a half "
                "the modulation"
            )


class Chroma(Trunk):
    """forward(x (B, C, H, W), t (B,) in [0, 1], condition) -> (B, out_channels, H, W).

    Told is the context (B, L, 4096), with a mask: the prompt's tokens and the first pad behind them are
    there, as in training. A side that does not divide by the patch size is filled up inside and cut again
    (`whole_patches`).
    """

    params: ChromaParams
    approximator: Approximator

    def __init__(self, params: ChromaParams) -> None:
        # As published: rows of all single blocks, then those of all image streams, of all text streams, and
        # of the output.
        rows = [
            params.depth_single * SingleBlock.parts,
            params.depth * Stream.parts,
            params.depth * Stream.parts,
            2,
        ]
        super().__init__(params, ModulationRows, approximator=Approximator(params, sum(rows)))
        self.rows = rows

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.approximator.out.weight)

    @with_enough_precision
    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        x = network_input(x, condition, self.params)
        single, image, text, out = self.approximator(t).split(self.rows, dim=1)
        joint = (
            torch.cat(both, dim=1)
            for both in zip(image.split(Stream.parts, dim=1), text.split(Stream.parts, dim=1), strict=True)
        )
        return self.through_blocks(x, [*joint, *single.split(SingleBlock.parts, dim=1), out], condition)


class Approximator(nn.Module):
    """forward(t (B,) in [0, 1]) -> the table of all modulations (B, rows, hidden): residual MLPs of the time
    and the number of the row."""

    def __init__(self, p: ChromaParams, rows: int) -> None:
        super().__init__()
        self.waves, self.rows = p.waves, rows
        self.fc_in = nn.Linear(p.waves, p.width_approximator)
        self.blocks = nn.ModuleList(
            ApproximatorBlock(p.width_approximator) for _ in range(p.depth_approximator)
        )
        self.out = nn.Linear(p.width_approximator, p.hidden)

    def forward(self, t: Tensor) -> Tensor:
        quarter, half = self.waves // 4, self.waves // 2
        # The scale of guidance that FLUX.1 is told is always 0 here. Numbers of rows are told in thousands,
        # as times are.
        told = torch.cat([sinusoid(1000.0 * t, quarter), sinusoid(torch.zeros_like(t), quarter)], dim=-1)
        row = sinusoid(1000.0 * torch.arange(self.rows, device=t.device), half)
        waves = torch.cat(
            [told[:, None].expand(-1, self.rows, -1), row.expand(len(t), -1, -1)], dim=-1
        )  # (B, rows, waves)
        x = self.fc_in(waves.to(self.fc_in.bias.dtype))
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
