"""Networks larger than memory: each block is read from its file while the block before it computes.

All networks of a model share two buffers as large as the largest block (`Prefetcher`). The file is read and
not mapped, so that nothing of it stays in memory. On a GPU the buffers are in its memory, and copies overlap
with the computation. Results are the same to the last bit.
"""

from __future__ import annotations

import math
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from models.layers.packed import PackedLinear

if TYPE_CHECKING:
    from models.files.table import Supplies, Supply

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WORK = 0.25  # share of a budget for what networks compute with
ALIGN = 64  # bytes


def parse_bytes(memory: str | int) -> int:
    """A number of bytes, or "6GB", "500 MB", "5.5GiB". ValueError for anything else, and below one byte."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", str(memory))
    try:
        size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise ValueError(f"memory is a size like '6GB' or '800MB', not {memory!r}")
    return size


def format_bytes(size: float) -> str:
    """A number of bytes as `parse_bytes` reads it, rounded up."""
    return f"{math.ceil(size / 1e6)}MB" if size < 1e9 else f"{math.ceil(size / 1e8) / 10:g}GB"


def resident_bytes() -> int:
    """Memory of this process now; its peak so far where the system does not report the current value."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        pass
    try:
        import resource  # missing on Windows
    except ImportError:
        raise ValueError("this system does not report how much memory is in use: leave memory out") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Blocks -----------------------------------------------------------------------------------------------------


def list_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks by name, in the order in which the network calls them: members of its `block_lists`."""
    return {
        f"{name}.{i}": block
        for name in getattr(network, "block_lists", ())
        for i, block in network.get_submodule(name).named_children()
    }


def buffer_size(supplies: Supplies) -> int:
    """Bytes that these tensors take in a buffer, each aligned to 64."""
    return sum(-(-_nbytes(supply) // ALIGN) * ALIGN for supply in supplies.values())


def submodule_supplies(supplies: Supplies, name: str) -> dict[str, Supply]:
    """The tensors of a submodule, by their names in it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): each for key, each in supplies.items() if key.startswith(prefix)}


class Streamed(nn.Module):
    """Takes the place of a block in a network, and loads its weights for the duration of each call.

    chain  all streamed blocks of the network, in the order in which they are called
    """

    def __init__(
        self, block: nn.Module, supplies: Supplies, prefetcher: Prefetcher, chain: list[Streamed]
    ) -> None:
        super().__init__()
        self.streamed = [block]  # in a list, and so no submodule: .to() and state_dict() must not see it
        self.supplies, self.prefetcher, self.chain = supplies, prefetcher, chain

    @property
    def next(self) -> Streamed:
        """The next streamed block; after the last, the first, for the next forward pass."""
        return self.chain[(self.chain.index(self) + 1) % len(self.chain)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [value for value in args if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
            raise ValueError("a model loaded with memory=... has no gradients: load it without memory=...")
        (block,) = self.streamed
        blank = block.state_dict()
        block.load_state_dict(self.prefetcher.fetch(self, inputs[0].device), assign=True)
        try:
            return block(*args, **kwargs)
        finally:
            self.prefetcher.mark_computed()
            block.load_state_dict(blank, assign=True)  # so that nothing else refers to the buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Streamed:
        """Casts apply when the block is read, but not to packed weights. Each call moves it to its device."""
        packed = {name for name, layer in self.streamed[0].named_modules() if isinstance(layer, PackedLinear)}
        for name, supply in self.supplies.items():
            layer, _, tensor = name.rpartition(".")
            dtype = fn(torch.empty(0, dtype=supply.dtype)).dtype
            if dtype != supply.dtype and not (layer in packed and tensor in ("packed", "scale")):
                self.supplies = {**self.supplies, name: supply.cast(dtype)}
        self.prefetcher.resize(buffer_size(self.supplies))
        for child in self.children():  # factors of adapters, which stay in memory
            child._apply(fn)
        return self

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Its tensors, one after the other in a buffer of bytes."""
        tensors, start = {}, 0
        for name, supply in self.supplies.items():
            tensors[name] = buffer[start : start + _nbytes(supply)].view(supply.dtype).view(supply.shape)
            start += buffer_size({name: supply})
        return tensors


class Prefetcher:
    """Two buffers of `size` bytes: while one block computes, the other buffer is filled for the next."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="prefetcher")
        self.buffers: list[_Buffer] = []
        self.pending: _Fetch | None = None

    def fetch(self, block: Streamed, device: torch.device) -> dict[str, Tensor]:
        """The block's tensors on the device. They are valid until the fetch after the next one."""
        if not self.buffers or self.buffers[0].device != device:
            self._wait()
            self._release()
            self.buffers = [_Buffer(self.size, device) for _ in range(2)]
        if (
            self.pending is None or self.pending.block is not block
        ):  # the first call, or after an interrupted pass
            self._wait()
            self.pending = self._start(block)
        ready, self.pending = self.pending, None
        tensors = ready.tensors.result()
        ready.buffer.wait_for_copy()
        self.pending = self._start(block.next)
        return tensors

    def mark_computed(self) -> None:
        """The computation of the block that was fetched last is queued on the device."""
        if self.pending is not None:
            self.pending.other.mark_used()

    def resize(self, size: int) -> None:
        """Blocks change their dtype: wait for the pending fetch in the old one, and grow the buffers."""
        self._wait()
        if size > self.size:
            self.size = size
            self._release()

    def _start(self, block: Streamed) -> _Fetch:
        self.buffers.reverse()
        buffer, other = self.buffers
        return _Fetch(block, buffer, other, self.worker.submit(buffer.fill, block))

    def _release(self) -> None:
        """Free the buffers when no copy writes to them any more."""
        for buffer in self.buffers:
            if buffer.copies is not None:
                buffer.copies.synchronize()
        self.buffers = []

    def _wait(self) -> None:
        """Wait for the pending fetch, and drop it."""
        if self.pending is not None:
            self.pending.tensors.exception()
        self.pending = None


class _Fetch(NamedTuple):
    block: Streamed
    buffer: _Buffer
    other: _Buffer
    tensors: Future[dict[str, Tensor]]


class _Buffer:
    """Memory for a block on the device. On a GPU it is filled through pinned memory; only streams wait."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.on_device = torch.empty(size, dtype=torch.uint8, device=device)
        self.on_host, self.copies = self.on_device, None
        if device.type == "cuda":
            self.on_host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.copies = torch.cuda.Stream(device)
            self.mark_used()  # queued computations may still read the memory's former tensor

    def fill(self, block: Streamed) -> dict[str, Tensor]:
        if self.copies is not None:
            self.copies.synchronize()  # the copy of the block before reads `on_host`
        for name, view in block.views(self.on_host).items():
            block.supplies[name].read_into(view)
        if self.copies is not None:
            with torch.cuda.stream(self.copies):
                self.on_device.copy_(self.on_host, non_blocking=True)
        return block.views(self.on_device)

    def wait_for_copy(self) -> None:
        """What is queued from now on runs after the copy."""
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)

    def mark_used(self) -> None:
        """The next copy begins after everything that is queued now."""
        if self.copies is not None:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))


# Networks ---------------------------------------------------------------------------------------------------


class Budget:
    """How much memory is left for blocks: `memory` without the share for work, buffers and all other weights.

    parts  the networks on the meta device, and the supplies of their tensors
    """

    def __init__(self, memory: str | int, parts: Iterable[tuple[nn.Module, Supplies]]) -> None:
        total, blocks, fixed = parse_bytes(memory), [0], resident_bytes()
        for network, supplies in parts:
            sizes = [buffer_size(submodule_supplies(supplies, name)) for name in list_blocks(network)]
            fixed += buffer_size(supplies) - sum(sizes)
            blocks += sizes
        self.prefetcher = Prefetcher(max(blocks))
        self.left = int(total * (1 - WORK)) - fixed
        self.streams = sum(blocks) > self.left  # not all blocks fit
        if self.streams:
            self.left -= 2 * self.prefetcher.size
        if self.left < 0:
            least = format_bytes(total - self.left / (1 - WORK))
            raise ValueError(f"memory={memory!r} is too little for this model: give at least {least}")

    def fill(self, network: nn.Module, supplies: Supplies) -> None:
        """Load a network's weights, and replace the blocks that do not fit by a `Streamed`."""
        blocks = list_blocks(network)
        prefixes = tuple(f"{name}." for name in blocks)
        resident = {name: supply for name, supply in supplies.items() if not name.startswith(prefixes)}
        streamed: list[Streamed] = []
        for block_name, block in blocks.items():
            own = submodule_supplies(supplies, block_name)
            if buffer_size(own) <= self.left:
                self.left -= buffer_size(own)
                resident |= {f"{block_name}.{name}": supply for name, supply in own.items()}
            else:
                streamed.append(Streamed(block.eval().requires_grad_(False), own, self.prefetcher, streamed))
                network.set_submodule(block_name, streamed[-1])
        # A mapped file that is cut short later would end the process; reading it raises an error.
        state = {name: each.read() if self.streams else each.take() for name, each in resident.items()}
        network.load_state_dict(state, assign=True)


def all_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, including those of streamed blocks, whose weights are blank between calls."""
    for place, module in network.named_modules():
        yield place, module
        if isinstance(module, Streamed):
            yield from (
                (f"{place}.{name}", layer) for name, layer in module.streamed[0].named_modules() if name
            )


def weight_readers(network: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """By name, a function that returns each tensor of a network, and reads it if its block is streamed."""
    for name, value in network.state_dict().items():
        yield name, partial(Tensor.detach, value)
    for place, block in network.named_modules():
        if isinstance(block, Streamed):
            yield from ((f"{place}.{name}", partial(_read, each)) for name, each in block.supplies.items())


def _read(supply: Supply) -> Tensor:
    value = torch.empty(supply.shape, dtype=supply.dtype)
    supply.read_into(value)
    return value


def check_not_streamed(network: nn.Module) -> None:
    """ValueError for a network with streamed blocks."""
    if is_streamed(network):
        raise ValueError("blocks of this model are in its files only: load it without memory=...")


def is_streamed(network: nn.Module) -> bool:
    """Whether some of its blocks are streamed."""
    return any(isinstance(module, Streamed) for module in network.modules())


def _nbytes(supply: Supply) -> int:
    return supply.shape.numel() * supply.dtype.itemsize
