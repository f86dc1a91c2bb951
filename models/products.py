"""The products that networks are made of, linear layer and convolutions, and how a CPU does them best.

On a GPU, and wherever torch's own choice is the best one, these are torch's own layers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Read once: tracing for torch.compile could not ask the processor. What other makes than x86 can do is left to torch.
_CPU = torch.cpu.get_capabilities()
_X86 = _CPU.get("architecture") == "x86_64"
TILES = {torch.bfloat16: bool(_CPU.get("amx_bf16")), torch.float16: bool(_CPU.get("amx_fp16"))}  # whole products, 16 times float32's rate
NATIVE = {
    torch.bfloat16: TILES[torch.bfloat16] or bool(_CPU.get("avx512_bf16")) or not _X86,
    torch.float16: TILES[torch.float16] or bool(_CPU.get("avx512_fp16")) or not _X86,
}
WIDENED = 2**22  # so many numbers of a weight exist in float32 at once

# Of a kernel's three taps in a row, those that are added up for each of four in a transposed one; and of nine for each of sixteen.
_ROW = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], device="cpu")
_SUMS = torch.kron(_ROW, _ROW)


def emulated(x: Tensor) -> bool:
    """Whether products of x's dtype run on a CPU that has no instructions for it: three times slower than in float32."""
    return x.device.type == "cpu" and not NATIVE.get(x.dtype, True)


def best_layout(x: Tensor) -> torch.memory_format:
    """How a network's images should lie in memory: pixel by pixel on a CPU with tiles, elsewhere as they come."""
    tiles = x.device.type == "cpu" and TILES.get(x.dtype, False)
    return torch.channels_last if tiles else torch.preserve_format


def widened(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product computed in float32, which exists for its duration only, and rounded to the dtype of x."""
    return product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class Linear(nn.Linear):
    """x W^T + b over the tokens of a network."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # else torch makes it one product, or one per image, which rounds otherwise, as the weight is trained or not
        return self.wide(x) if emulated(x) else F.linear(x, self.weight, self.bias)

    def wide(self, x: Tensor) -> Tensor:
        """Computed in float32 at least, and rounded to the dtype of x, which may be wider than that of the weight.

        A large weight is widened 16 MB at a time: all of it would be fresh memory at every call.
        """
        rows = max(1, WIDENED // self.in_features)
        weights = self.weight.split(rows)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(rows)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        parts = [widened(F.linear, wide, weight, bias).to(x.dtype) for weight, bias in zip(weights, biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Conv2d(nn.Conv2d):
    """A convolution; an image of fewer pixels than channels is unfolded into patches, for a linear layer.

    There the weights are most of what has to be moved, and convolution kernels reorder them before they use them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        few = x.shape[0] * x.shape[2] * x.shape[3] < self.in_channels
        product = self._unfolded if few and self.groups == 1 and self.kernel_size != (1, 1) else self._conv_forward
        return widened(product, x, self.weight, self.bias) if emulated(x) else product(x, self.weight, self.bias)

    def _unfolded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(self.padding, str)
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)  # (B, C*kh*kw, L)
        height = (x.shape[2] + 2 * self.padding[0] - self.dilation[0] * (self.kernel_size[0] - 1) - 1) // self.stride[0] + 1
        if x.is_contiguous():
            out = weight.flatten(1) @ patches  # in the layout of x, whichever that is
            out = out if bias is None else out + bias[:, None]
        else:
            out = F.linear(patches.transpose(1, 2), weight.flatten(1), bias).transpose(1, 2)
        return out.unflatten(2, (height, -1))


class UpConv2d(Conv2d):
    """Twice the resolution: repeat every pixel in height and width, then convolve, 3x3.

    An image of at least as many pixels as channels goes through one transposed convolution on a CPU. Of nine repeated pixels under the
    kernel four differ, so the weights that meet the same one are added up first: less than half the work, and the repeated pixels are
    never stored.

    forward(x, size): the height and width of the output, None for twice those of x; a last row or column beyond them is not repeated
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        height, width = size or (2 * x.shape[2], 2 * x.shape[3])
        cut = (height, width) != (2 * x.shape[2], 2 * x.shape[3])
        if cut or x.device.type != "cpu" or x.shape[2] * x.shape[3] < self.in_channels:
            return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest")[..., :height, :width])
        product = self._transposed
        return widened(product, x, self.weight, self.bias) if emulated(x) else product(x, self.weight, self.bias)

    def _transposed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        summed = (weight.flatten(2) @ _SUMS.to(weight)).unflatten(2, (4, 4))
        return F.conv_transpose2d(x, summed.transpose(0, 1), bias, stride=2, padding=1)
