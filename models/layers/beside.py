"""Low-rank changes beside a layer's weight: y = W x + up (scale * down x), the weight as it is.

That is what packed weights and weights that stay in their files need, and what trains: the weight is neither
unpacked nor written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers.packed import PackedLinear


class Factors(nn.Module):
    """The factors of one layer's change, those of several adapters one behind the other.

    down   (R, in), or (R, in, kh, kw) of a convolution
    up     (out, R)
    scale  (R,): alpha / r times the strength of each rank's adapter; a tensor, so that a change of it
           compiles nothing anew
    """

    down: Tensor
    up: Tensor
    scale: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: Tensor) -> None:
        super().__init__()
        for name, value in (("down", down), ("up", up), ("scale", scale)):
            self.register_buffer(name, value)

    @classmethod
    def of(cls, changes: Sequence[tuple[Tensor, Tensor, float, tuple[int, int]]], out: int) -> Factors:
        """Several changes (down, up, scale, rows), each of these rows of a weight with `out` rows."""
        down = torch.cat([each.float() for each, *_ in changes])
        up, scale, first = torch.zeros(out, len(down)), torch.empty(len(down)), 0
        for own, part, s, (start, stop) in changes:
            ranks = slice(first, first + len(own))
            up[start:stop, ranks], scale[ranks] = part, s
            first += len(own)
        return cls(down, up, scale)


class BesideLinear(nn.Linear):
    """A linear layer with `Factors` beside its weight."""

    beside: Factors

    def forward(self, x: Tensor) -> Tensor:
        down, up, scale = (value.to(x.dtype) for value in self.beside.buffers())
        return super().forward(x) + F.linear(F.linear(x, down) * scale, up)


class BesideConv2d(nn.Conv2d):
    """A convolution with `Factors` beside its weight."""

    beside: Factors

    def forward(self, x: Tensor) -> Tensor:
        down, up, scale = (value.to(x.dtype) for value in self.beside.buffers())
        low = F.conv2d(x, down, None, self.stride, self.padding, self.dilation)
        return super().forward(x) + F.conv2d(low * scale[:, None, None], up[..., None, None])


def put_beside(layer: nn.Module, factors: Factors, owner: nn.Module, name: str) -> None:
    """Change a layer, in place, so that it adds the product of these factors to its own product.

    owner, name  the module that holds the factors: the layer, or what brings the layer its weights
    """
    layer.__class__ = _beside_class(type(layer))  # type: ignore[arg-type]  # modules are hashable
    if owner is layer:
        layer.beside = factors.to(next(chain(layer.parameters(), layer.buffers())).device)
    else:
        owner.add_module(name, factors)
        layer.__dict__["beside"] = factors  # used here, and moved and counted where it is held


@cache
def _beside_class(kind: type[Any]) -> type[Any]:
    """A class like the layer's own, with the product of the factors added to that of its weight."""
    base = BesideConv2d if issubclass(kind, nn.Conv2d) else BesideLinear
    packed = (PackedLinear,) if issubclass(kind, PackedLinear) else ()
    # of a layer with a forward of its own, as a modulation is, which calls the product as super().forward
    own = [each for each in kind.__mro__ if "forward" in vars(each) and each is not PackedLinear]
    own = own[: own.index(nn.Conv2d if issubclass(kind, nn.Conv2d) else nn.Linear)]
    return type(f"Beside{kind.__name__}", (*own, base, *packed), {})


def has_factors(network: nn.Module) -> bool:
    """Whether something lies beside a weight."""
    return any(isinstance(module, Factors) for module in network.modules())
