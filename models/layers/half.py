"""Half precision on CPUs without instructions for it: weights stay as they are, layers compute in float32."""

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

HALF_DTYPES = (torch.bfloat16, torch.float16)
# The functions that take weights. All others promote half precision together with float32 by themselves.
NORMS = {F.group_norm, F.layer_norm, F.rms_norm}
LAYERS = {F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention, *NORMS}

# Read once, since torch.compile cannot trace it. On processors other than x86 the choice is torch's.
_CPU = torch.cpu.get_capabilities()
_FEATURES = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}
NATIVE = {
    dtype: _CPU.get("architecture") != "x86_64" or any(_CPU.get(name) for name in names)
    for dtype, names in _FEATURES.items()
}
"""Whether this CPU multiplies in a dtype. If not, torch takes three to six times as long as in float32."""

Method = TypeVar("Method", bound=Callable[..., Any])


class InFloat32(TorchFunctionMode):
    """Makes layers compute in float32 within the context, converting half precision for each call.

    Without gradients all weights are converted into one buffer of the size of the largest: allocating memory
    for each weight would take up to half of a layer's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.empty(0)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in LAYERS:
            args = [self._to_float32(value) for value in args]
            kwargs = {name: self._to_float32(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _to_float32(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in HALF_DTYPES:
            return value
        # A layer has one weight matrix, so that one buffer is enough.
        is_matrix = isinstance(value, nn.Parameter) and value.ndim > 1
        if not is_matrix or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return value.float()
        if len(self.buffer) < value.numel():
            self.buffer = torch.empty(value.numel(), device=value.device)
        return self.buffer[: value.numel()].view(value.shape).copy_(value)


def enough_precision(network: nn.Module) -> AbstractContextManager[object]:
    """`InFloat32` for a network in half precision on a CPU that only emulates it, else a null context."""
    first = next(network.parameters())
    if first.device.type != "cpu" or NATIVE.get(first.dtype, True):
        return nullcontext()
    if not torch.compiler.is_compiling():
        _warn_emulated(first.dtype)
    return InFloat32()


def with_enough_precision(method: Method) -> Method:
    """Decorates a network's method: it runs in `enough_precision`, and returns the dtype of the weights."""

    @wraps(method)
    def run(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = enough_precision(network)
        if not isinstance(mode, InFloat32):
            return method(network, *args, **kwargs)
        with mode:
            out = method(network, *args, **kwargs)
        dtype = next(network.parameters()).dtype
        return [each.to(dtype) for each in out] if isinstance(out, list) else out.to(dtype)

    return cast(Method, run)


@cache  # once per process
def _warn_emulated(dtype: torch.dtype) -> None:
    cost = "as slow as float32, with half of its memory"
    warn(f"this CPU has no instructions for {dtype}: layers compute in float32, {cost}")
