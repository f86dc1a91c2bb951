"""Networks made of blocks: each can be computed again for its gradients, or compiled."""

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
from models.layers.streaming import check_whole

BACKEND = "inductor"  # torch.compile's own
TOOLS = "g++ and Python's headers (apt install g++ python3-dev), for a GPU triton too (pip install triton)"
# of blocks that are not built alike, in all networks of a process: SD 1.5 has 22, and torch gives up at 8
# unless told
MAX_KINDS = 256


class BlockNetwork(nn.Module):
    """Base of networks made of blocks, which call each by `run`.

    checkpointing  False; set it to True to train in less memory: every block's activations are computed again
                   on the way back (Chen et al. 2016), with the same gradients, for about a third more time
    compiled       whether `compiled` is entered
    """

    checkpointing = False
    compiled = False

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(_run_in, enough_precision(self), block, *inputs, use_reentrant=False)
        return _compiled_call(BACKEND)(block, *inputs) if self.compiled else block(*inputs)


def _run_in(precision: AbstractContextManager[object], block: nn.Module, *inputs: Any) -> Any:
    with precision:  # on the way back nothing else enters it
        return block(*inputs)


@contextmanager
def compiled(network: nn.Module, enabled: bool = True) -> Iterator[None]:
    """While it is entered, a network's blocks are compiled, each kind at its first call: blocks that are
    built alike share one graph.

    A graph serves any values and sizes, but for a batch of one, which torch compiles for itself. Compiled
    results differ by rounding. enabled=False changes nothing, as in `torch.autocast`. ValueError as
    `check_compiles` says.
    """
    if not enabled:
        yield
        return
    check_compiles(network)
    assert isinstance(network, BlockNetwork)
    # Sizes that are the same, as those of a square, need not be so in the next call.
    apart = symbolic_shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]  # which torch adds when it is imported
    with apart, torch._dynamo.config.patch(recompile_limit=MAX_KINDS):
        before, network.compiled = network.compiled, True
        try:
            yield
        finally:
            network.compiled = before


def check_compiles(network: nn.Module, device: torch.device | None = None) -> None:
    """ValueError where a network has no blocks, or not all in memory, or where torch cannot compile for the
    device (None: where it is)."""
    if not isinstance(network, BlockNetwork):
        raise ValueError(
            f"compile works block by block, and {type(network).__name__} does not call its blocks by `run`: "
            "leave compile out"
        )
    check_whole(network)
    _check_compiler(BACKEND, str(device or next(network.parameters()).device))


@cache
def _check_compiler(backend: str, device: str) -> None:
    """Compiles something small: what torch needs for it is not all its own, and which parts are missing it
    finds out on the way."""
    try:
        _compiled_call(backend)(nn.ReLU(), torch.ones(2, device=device))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        why = one_line(error.inner_exception, 200)
        raise ValueError(
            f"torch has no working compiler for {device} here ({why}): install {TOOLS}, or leave compile out"
        ) from error


@cache
def _compiled_call(backend: str) -> Callable[..., Any]:
    """A call of a block, compiled: weights are inputs of its graph."""
    return torch.compile(_call, fullgraph=True, dynamic=True, backend=backend)


def _call(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)
