"""Upsampling by two in UNets and autoencoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Which of a kernel's 3 taps in a row are summed for each of the transposed kernel's 4 taps; then 9 for 16.
_ROW = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], device="cpu")
_SUMS = torch.kron(_ROW, _ROW)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution.

    On a CPU an image with at least as many pixels as channels goes through one transposed convolution. The
    nine pixels under the kernel have four different values, so the weights of equal pixels are summed first:
    less than half the work, and the upsampled image is never stored.

    forward(x, size): height and width of the output, which may be one less than twice those of x; None: twice
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        twice = (2 * x.shape[2], 2 * x.shape[3])
        height, width = size or twice
        small = x.shape[2] * x.shape[3] < self.conv.in_channels
        if (height, width) != twice or x.device.type != "cpu" or small:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")[..., :height, :width])
        weight = self.conv.weight.to(x.dtype)  # sums in half precision would be rounded
        summed = (weight.flatten(2) @ _SUMS.to(weight)).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, summed.transpose(0, 1), self.conv.bias, stride=2, padding=1)
