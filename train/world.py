"""The processes of a run, as torchrun starts them; alone without it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from diffusion.messages import one_line
from models.device import find_device

T = TypeVar("T")
DONE = "done"
FAILED = "failed"  # the entry of the store in which a process says why training will end, once all have saved
ENDED = "ended"  # and the one in which it says that it has ended, and why


class PeerError(OSError):
    """Another process of the run has failed: which, and why, for this one's own output."""


@dataclass(frozen=True)
class World:
    """rank 0 ... size-1 of this process, the device it computes on, and where processes leave word for each other."""

    rank: int
    size: int
    device: torch.device
    store: Store | None = None
    _turns: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process. All agree on the answer."""
        if self.size == 1:
            return list(flags)
        return [share > 0 for share in self.mean(torch.tensor(flags, dtype=torch.float32, device=self.device)).tolist()]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The average of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.size
        return value

    def lead(self, job: Callable[[], T]) -> T | None:
        """What the leading process does alone, for hours if need be, while the others wait; its result there, None elsewhere.

        They wait in no collective operation, which would give up after some minutes. Where the job raises, so do they: PeerError.
        """
        if self.store is None:
            return job()
        turn = f"lead {next(self._turns)}"
        if not self.leads:
            self._wait(self.store, turn)
            return None
        try:
            result = job()
        except BaseException as error:
            self.store.set(turn, _word(self.rank, error))
            raise
        self.store.set(turn, DONE)
        return result

    def meet(self) -> None:
        """Wait, for hours if need be, until all processes are here: before a collective operation to which some come much later.

        Where one has ended with an error, the others raise PeerError.
        """
        if self.store is None:
            return
        turn = f"meet {next(self._turns)}"
        self.store.set(f"{turn} {self.rank}", DONE)
        for rank in range(self.size):
            self._wait(self.store, f"{turn} {rank}")

    def tell(self, error: BaseException, entry: str = FAILED) -> None:
        """Leave word for the other processes of why this one will end, or, as ENDED, has ended."""
        if self.store is not None:
            self.store.set(entry, _word(self.rank, error))

    def told(self) -> PeerError:
        """The error of another process that has left word."""
        assert self.store is not None
        return PeerError(self.store.get(FAILED).decode())

    def _wait(self, store: Store, turn: str) -> None:
        try:
            while not store.check([turn]):
                if store.check([ENDED]):
                    raise PeerError(store.get(ENDED).decode())
                time.sleep(0.05)
            word = store.get(turn).decode()
        except RuntimeError as error:  # the store's, which went with the process that kept it
            raise ConnectionError("the process that leads this run has ended: its own output says why") from error
        if word != DONE:
            raise PeerError(word)


def _word(rank: int, error: BaseException) -> str:
    return f"process {rank} has failed: {one_line(error)}"


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes, or be a world of one. device: default a GPU where there is one."""
    size, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    chosen = find_device(device)
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    store: Store | None = None
    if size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        store = PrefixStore("plain-diffusion", _get_default_store())
    own = World(rank, size, chosen, store)
    try:
        yield own
    except Exception as error:
        with suppress(RuntimeError):  # of the store, where the process that kept it has gone
            if store is not None and store.check([ENDED]):  # and a collective operation has broken off because of that
                raise PeerError(store.get(ENDED).decode()) from error
            own.tell(error, ENDED)
        raise
    finally:
        if size > 1:
            dist.destroy_process_group()
