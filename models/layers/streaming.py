"""Networks larger than memory: blocks that are read from their files when it is their turn, the next one
while one computes.

Two buffers as large as the largest block go round (`Conveyor`), for all networks of a model. The file is read
and not mapped, so that nothing of it stays; on a GPU the buffers are there, and copies run beside the
computation. Results are the same, to the last bit.
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
WORK = 0.25  # of a budget, for what networks compute with
ALIGN = 64  # bytes


def parse_bytes(memory: str | int) -> int:
    """A number of bytes, or "6GB", "500 MB", "5.5GiB". ValueError for anything else, and for none."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", str(memory))
    try:
        size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise ValueError(f"memory is a size like '6GB' or '800MB', not {memory!r}")
    return size


def in_words(size: float) -> str:
    """Bytes as a size that parses, rounded up."""
    return f"{math.ceil(size / 1e6)}MB" if size < 1e9 else f"{math.ceil(size / 1e8) / 10:g}GB"


def resident() -> int:
    """Bytes of this process that are in memory now; where the system does not tell, the most that ever
    were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        pass
    try:
        import resource  # which is not everywhere
    except ImportError:
        raise ValueError("this system does not tell how much memory is taken: leave memory out") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Blocks -----------------------------------------------------------------------------------------------------


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a network calls one after the other, in order: the members of its class's
    `block_lists`."""
    return {
        f"{name}.{i}": block
        for name in getattr(network, "block_lists", ())
        for i, block in network.get_submodule(name).named_children()
    }


def needed(supplies: Supplies) -> int:
    """Bytes that these tensors take, each beginning at a multiple of 64."""
    return sum(-(-_nbytes(supply) // ALIGN) * ALIGN for supply in supplies.values())


def under(supplies: Supplies, place: str) -> dict[str, Supply]:
    """Those of a sub-module, by its own names."""
    return {
        name.removeprefix(f"{place}."): supply
        for name, supply in supplies.items()
        if name.startswith(f"{place}.")
    }


class Streamed(nn.Module):
    """Stands in a network in a block's place, and brings it its weights for the duration of a call.

    line  all of the network's that come and go, in order
    """

    def __init__(
        self, block: nn.Module, supplies: Supplies, conveyor: Conveyor, line: list[Streamed]
    ) -> None:
        super().__init__()
        self.held = [
            block
        ]  # no sub-module: its weights are nowhere that .to() or state_dict() could look for them
        self.supplies, self.conveyor, self.line = supplies, conveyor, line

    @property
    def next(self) -> Streamed:
        """The one after it, and after the last the first: of the next pass."""
        return self.line[(self.line.index(self) + 1) % len(self.line)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in args if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(value.requires_grad for value in given):
            raise ValueError(
                "a model loaded with memory=... has no gradients, since its weights come and go: load it "
                "without"
            )
        (block,) = self.held
        blank = block.state_dict()
        block.load_state_dict(self.conveyor.bring(self, given[0].device), assign=True)
        try:
            return block(*args, **kwargs)
        finally:
            self.conveyor.passed()
            block.load_state_dict(blank, assign=True)  # nothing else holds the buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Streamed:
        """A cast is for every time that a block is read. It comes to its device with each call, and packed
        weights stay as they are."""
        packed = {name for name, layer in self.held[0].named_modules() if isinstance(layer, PackedLinear)}
        for name, supply in self.supplies.items():
            layer, _, tensor = name.rpartition(".")
            dtype = fn(torch.empty(0, dtype=supply.dtype)).dtype
            if dtype != supply.dtype and not (layer in packed and tensor in ("packed", "scale")):
                self.supplies = {**self.supplies, name: supply.cast(dtype)}
        self.conveyor.widen(needed(self.supplies))
        return self

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Its tensors, one after the other in a buffer of bytes."""
        found, start = {}, 0
        for name, supply in self.supplies.items():
            found[name] = buffer[start : start + _nbytes(supply)].view(supply.dtype).view(supply.shape)
            start += needed({name: supply})
        return found


class Conveyor:
    """Two buffers of so many bytes: while the block in one computes, the other is filled for the block after
    it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="conveyor")
        self.buffers: list[_Buffer] = []
        self.coming: _Delivery | None = None

    def bring(self, block: Streamed, device: torch.device) -> dict[str, Tensor]:
        """The block's tensors on that device, until the one after the next is brought."""
        if not self.buffers or self.buffers[0].device != device:
            self._settle()
            self._release()
            self.buffers = [_Buffer(self.size, device) for _ in range(2)]
        if self.coming is None or self.coming.block is not block:  # the first ever, or a pass was broken off
            self._settle()
            self.coming = self._send(block)
        delivery, self.coming = self.coming, None
        tensors = delivery.tensors.result()
        delivery.buffer.arrived()
        self.coming = self._send(block.next)
        return tensors

    def passed(self) -> None:
        """The block that was brought last has been told to compute."""
        if self.coming is not None:
            self.coming.other.used()

    def widen(self, size: int) -> None:
        """Blocks are of another dtype from now on: wait for what is on its way in the old one."""
        self._settle()
        if size > self.size:
            self.size = size
            self._release()

    def _send(self, block: Streamed) -> _Delivery:
        self.buffers.reverse()  # the other one's turn
        buffer, other = self.buffers
        return _Delivery(block, buffer, other, self.worker.submit(buffer.fill, block))

    def _release(self) -> None:
        """Give the buffers up, once no copy writes to them."""
        for buffer in self.buffers:
            if buffer.copies is not None:
                buffer.copies.synchronize()
        self.buffers = []

    def _settle(self) -> None:
        """Wait for what is on its way."""
        if self.coming is not None:
            self.coming.tensors.exception()
        self.coming = None


class _Delivery(NamedTuple):
    block: Streamed
    buffer: _Buffer
    other: _Buffer
    tensors: Future[dict[str, Tensor]]


class _Buffer:
    """Memory for a block. On a GPU it is filled through memory that the GPU can read by itself, and nobody
    waits for it but its streams."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        self.here, self.copies = self.there, None
        if device.type == "cuda":
            self.here, self.copies = (
                torch.empty(size, dtype=torch.uint8, pin_memory=True),
                torch.cuda.Stream(device),
            )
            # this memory may have been another tensor's, which something already told to compute still reads
            self.used()

    def fill(self, block: Streamed) -> dict[str, Tensor]:
        if self.copies is not None:
            self.copies.synchronize()  # of the block before, the copy from `here`
        for name, view in block.views(self.here).items():
            block.supplies[name].read_into(view)
        if self.copies is not None:
            with torch.cuda.stream(self.copies):
                self.there.copy_(self.here, non_blocking=True)
        return block.views(self.there)

    def arrived(self) -> None:
        """What computes from now on, computes after the copy."""
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)

    def used(self) -> None:
        """The next copy begins after what has been told to compute until now."""
        if self.copies is not None:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))


# Networks ---------------------------------------------------------------------------------------------------


class Budget:
    """How much of a model stays in memory: of the share of `memory` that is for weights, what buffers and
    everything but blocks leave.

    parts  the networks on the meta device, and where their tensors are to be had
    """

    def __init__(self, memory: str | int, parts: Iterable[tuple[nn.Module, Supplies]]) -> None:
        total, blocks, fixed = parse_bytes(memory), [0], resident()
        for network, supplies in parts:
            sizes = [needed(under(supplies, place)) for place in blocks_of(network)]
            fixed += needed(supplies) - sum(sizes)
            blocks += sizes
        self.conveyor = Conveyor(max(blocks))
        self.left = int(total * (1 - WORK)) - fixed
        self.streams = sum(blocks) > self.left  # not all of them can stay, so some come and go
        if self.streams:
            self.left -= 2 * self.conveyor.size
        if self.left < 0:
            least = in_words(total - self.left / (1 - WORK))
            raise ValueError(f"memory={memory!r} is too little for this model: give at least {least}")

    def fill(self, network: nn.Module, supplies: Supplies) -> None:
        """Give a network its weights, or where they do not fit in, a Streamed in place of the block."""
        places = blocks_of(network)
        kept = {
            name: supply
            for name, supply in supplies.items()
            if not name.startswith(tuple(f"{place}." for place in places))
        }
        streamed: list[Streamed] = []
        for place, block in places.items():
            own = under(supplies, place)
            if needed(own) <= self.left:
                self.left -= needed(own)
                kept |= {f"{place}.{name}": supply for name, supply in own.items()}
            else:
                streamed.append(Streamed(block.eval().requires_grad_(False), own, self.conveyor, streamed))
                network.set_submodule(place, streamed[-1])
        # What stays is not mapped either: a file that is cut short would end the process, where reading it
        # raises.
        taken = {name: supply.read() if self.streams else supply.take() for name, supply in kept.items()}
        network.load_state_dict(taken, assign=True)


def layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a network, by name, those of streamed blocks too: their weights are what the last call
    left."""
    for place, module in network.named_modules():
        yield place, module
        if isinstance(module, Streamed):
            yield from ((f"{place}.{name}", inner) for name, inner in module.held[0].named_modules() if name)


def values(network: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every tensor of a network, or of several within one, by name, to be had one at a time: those of
    streamed blocks are read for it."""
    for name, value in network.state_dict().items():
        yield name, partial(Tensor.detach, value)
    for place, block in network.named_modules():
        if isinstance(block, Streamed):
            yield from (
                (f"{place}.{name}", partial(_fresh, supply)) for name, supply in block.supplies.items()
            )


def _fresh(supply: Supply) -> Tensor:
    value = torch.empty(supply.shape, dtype=supply.dtype)
    supply.read_into(value)
    return value


def check_whole(network: nn.Module) -> None:
    """ValueError for a network of which some blocks are in their files only."""
    if is_streamed(network):
        raise ValueError("blocks of this model are in its files only: load it without memory=...")


def is_streamed(network: nn.Module) -> bool:
    """Whether some of its blocks come and go."""
    return any(isinstance(module, Streamed) for module in network.modules())


def _nbytes(supply: Supply) -> int:
    return supply.shape.numel() * supply.dtype.itemsize
