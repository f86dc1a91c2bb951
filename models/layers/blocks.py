"""Networks made of blocks, which can be checkpointed and compiled one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils.checkpoint import checkpoint

from diffusion.messages import one_line
from models.layers.half import enough_precision
from models.layers.streaming import check_not_streamed

BACKEND = "inductor"  # torch.compile's own
TOOLS = "g++ and Python's headers (apt install g++ python3-dev), for a GPU triton too (pip install triton)"
MAX_KINDS = (
    256  # different blocks in all networks of a process; SD 1.5 has 22, and torch's default limit is 8
)


class BlockNetwork(nn.Module):
    """Base class of networks made of blocks. They call each block by `run`.

    checkpointing  set it to True to train in less memory: activations are computed again in the backward pass
                   (Chen et al. 2016), with the same gradients, in about a third more time
    compiled       whether the context manager `compiled` is active
    """

    checkpointing = False
    compiled = False

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(_run_in, enough_precision(self), block, *inputs, use_reentrant=False)
        return _compiled_call(BACKEND)(block, *inputs) if self.compiled else block(*inputs)


def _run_in(precision: AbstractContextManager[object], block: nn.Module, *inputs: Any) -> Any:
    with precision:  # in the backward pass nothing else enters it
        return block(*inputs)


@contextmanager
def compiled(network: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Compiles a network's blocks within the context, at their first call. Equal blocks share one graph.

    A graph serves all values and sizes, except a batch of one, for which torch compiles another. Compiled
    results differ by rounding. enabled=False changes nothing, as in `torch.autocast`. Errors: see
    `check_compiles`.
    """
    if not enabled:
        yield
        return
    check_compiles(network)
    assert isinstance(network, BlockNetwork)
    # Height and width that are equal in this call may differ in the next.
    separate_sizes = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]  # torch adds it on import
    with separate_sizes, torch._dynamo.config.patch(recompile_limit=MAX_KINDS):
        before, network.compiled = network.compiled, True
        try:
            yield
        finally:
            network.compiled = before


def check_compiles(network: nn.Module, device: torch.device | None = None) -> None:
    """ValueError for a network without blocks or with streamed ones, or without a compiler for the device.

    device  None: that of the network
    """
    if not isinstance(network, BlockNetwork):
        name = type(network).__name__
        raise ValueError(f"compile needs a BlockNetwork, which {name} is not: leave compile out")
    check_not_streamed(network)
    _check_compiler(BACKEND, str(device or next(network.parameters()).device))


@cache
def _check_compiler(backend: str, device: str) -> None:
    """Compiles something small, since torch notices only then whether its compiler works."""
    try:
        _compiled_call(backend)(nn.ReLU(), torch.ones(2, device=device))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        why = one_line(error.inner_exception, 200)
        raise ValueError(
            f"torch has no working compiler for {device} here ({why}): install {TOOLS}, or leave compile out"
        ) from error


@cache
def _compiled_call(backend: str) -> Callable[..., Any]:
    """A compiled call of a block, with the weights as inputs of its graph."""
    return torch.compile(_call, fullgraph=True, dynamic=True, backend=backend)


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)
