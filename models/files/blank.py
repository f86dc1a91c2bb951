"""Networks without weights, for those of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = (
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.rand,
    torch.randn,
    torch.arange,
)  # what layers make tensors with


class Blank(TorchFunctionMode):
    """No parameter is initialised within it: on the meta device it is only time, and the first draw there
    imports sympy for two seconds."""

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
    """The same, for networks whose weights are those of a file: ValueError as soon as they take far more
    tensors or numbers than it has.

    shapes  of the tensors in the file
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]]) -> None:
        super().__init__()
        sizes = [math.prod(shape) for shape in shapes]
        self.held = f"{len(sizes):,} tensors of {sum(sizes):,} numbers"
        self.tensors, self.numbers = len(sizes) + 100, 2 * sum(sizes) + 1_000_000

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = super().__torch_function__(function, types, args, kwargs)
        if function in FACTORIES:
            self.tensors -= 1
            self.numbers -= made.numel()
            if self.tensors < 0 or self.numbers < 0:
                raise ValueError(f"it takes far more than the {self.held} that are there")
        return made
