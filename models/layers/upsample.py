"""Twice the resolution, as UNets and autoencoders grow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a kernel's three taps in a row, those that are added up for each of four in a transposed one; and of nine
# for each of sixteen.
_ROW = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], device="cpu")
_SUMS = torch.kron(_ROW, _ROW)


class Upsample(nn.Module):
    """Repeat every pixel in height and width, then convolve, 3x3.

    On a CPU an image of at least as many pixels as channels goes through one transposed convolution. Of nine
    repeated pixels under the kernel four differ, so the weights that meet the same one are added up first:
    less than half the work, and the repeated pixels are never stored.

    forward(x, size): the height and width of the output, None for twice those of x; a last row or column
    beyond them is not repeated
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        twice = (2 * x.shape[2], 2 * x.shape[3])
        height, width = size or twice
        if (
            (height, width) != twice
            or x.device.type != "cpu"
            or x.shape[2] * x.shape[3] < self.conv.in_channels
        ):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")[..., :height, :width])
        weight = self.conv.weight.to(x.dtype)  # of half precision the sums would be rounded
        summed = (weight.flatten(2) @ _SUMS.to(weight)).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, summed.transpose(0, 1), self.conv.bias, stride=2, padding=1)
