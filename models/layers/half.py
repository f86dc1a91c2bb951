"""Half precision on a CPU that has no instructions for it: weights stay small in memory, and layers compute
in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion.messages import warn

HALVES = (torch.bfloat16, torch.float16)
LAYERS = {
    F.linear,
    F.conv2d,
    F.conv_transpose2d,
    F.group_norm,
    F.layer_norm,
    F.rms_norm,
    F.scaled_dot_product_attention,
}
"""What layers hand their weights to. Everything else promotes half precision beside float32 by itself."""

# Read once: tracing for torch.compile could not ask the processor. What other makes than x86 can do is left
# to torch.
_CPU = torch.cpu.get_capabilities()
NATIVE = {
    dtype: _CPU.get("architecture") != "x86_64" or any(_CPU.get(name) for name in names)
    for dtype, names in {
        torch.bfloat16: ("amx_bf16", "avx512_bf16"),
        torch.float16: ("amx_fp16", "avx512_fp16"),
    }.items()
}
"""Whether this CPU multiplies in that dtype. Where it does not, torch takes three to six times as long as in
float32."""

Method = TypeVar("Method", bound=Callable[..., Any])


class InFloat32(TorchFunctionMode):
    """While it is entered, layers compute in float32: half precision, of weights or not, is widened for a
    layer's duration only.

    Without gradients all weights are widened into the same memory, as large as the largest of them: fresh
    memory for each would take up to half of a layer's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.room = torch.empty(0)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in LAYERS:
            args, kwargs = (
                [self._widened(value) for value in args],
                {name: self._widened(value) for name, value in kwargs.items()},
            )
        return function(*args, **kwargs)

    def _widened(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in HALVES:
            return value
        if (
            not isinstance(value, nn.Parameter)
            or value.ndim < 2
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return value.float()
        if len(self.room) < value.numel():
            self.room = torch.empty(value.numel(), device=value.device)
        return (
            self.room[: value.numel()].view(value.shape).copy_(value)
        )  # a layer has one weight that is a matrix


def enough_precision(network: nn.Module) -> AbstractContextManager[object]:
    """What to enter to compute with a network: `InFloat32` for half precision on a CPU that only emulates it,
    else nothing."""
    first = next(network.parameters())
    if first.device.type != "cpu" or NATIVE.get(first.dtype, True):
        return nullcontext()
    if not torch.compiler.is_compiling():
        _tell(first.dtype)
    return InFloat32()


def with_enough_precision(method: Method) -> Method:
    """A network's method in `enough_precision`; the tensor or the list of tensors that it returns is in the
    dtype of the weights."""

    @wraps(method)
    def precise(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = enough_precision(network)
        if not isinstance(mode, InFloat32):
            return method(network, *args, **kwargs)
        with mode:
            out = method(network, *args, **kwargs)
        dtype = next(network.parameters()).dtype
        return [each.to(dtype) for each in out] if isinstance(out, list) else out.to(dtype)

    return cast(Method, precise)


@cache
def _tell(dtype: torch.dtype) -> None:
    """Once in a process."""
    warn(
        f"this CPU has no instructions for {dtype}: layers compute in float32, which takes the time of "
        "float32 in half of its memory"
    )
