"""Networks without weights, to be loaded from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange)


class Blank(TorchFunctionMode):
    """Within it, no parameter is initialised: on the meta device that only takes time (and imports sympy)."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


class BlankWithin(Blank):
    """The same for a file with these shapes: ValueError if the networks need far more than it has."""

    def __init__(self, shapes: Iterable[tuple[int, ...]]) -> None:
        super().__init__()
        sizes = [math.prod(shape) for shape in shapes]
        self.available = f"{len(sizes):,} tensors of {sum(sizes):,} numbers"
        self.tensors, self.numbers = len(sizes) + 100, 2 * sum(sizes) + 1_000_000

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_function__(function, types, args, kwargs)
        if function in FACTORIES:
            self.tensors -= 1
            self.numbers -= result.numel()
            if self.tensors < 0 or self.numbers < 0:
                raise ValueError(f"it takes far more than the {self.available} in the file")
        return result
