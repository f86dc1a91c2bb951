"""The processes of a run under torchrun, or its only process."""

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
FAILED = "failed"  # the store's entry for the error of a process that ends once all have saved
ENDED = "ended"  # and for the error of the first process that has ended


class PeerError(OSError):
    """Another process of the run has failed. The message names it and its error."""


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 ... size-1, device, and the store for messages between processes."""

    rank: int
    size: int
    device: torch.device
    store: Store | None = None
    _calls: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes files and messages."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.size == 1:
            return list(flags)
        shares = self.mean(torch.tensor(flags, dtype=torch.float32, device=self.device))
        return [share > 0 for share in shares.tolist()]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.size
        return value

    def on_leader(self, job: Callable[[], T]) -> T | None:
        """Run a job in the leading process while the others wait. Its result there, None elsewhere.

        The job may take hours: the others wait for the store, as a collective operation would time out after
        some minutes. If the job raises, they raise PeerError.
        """
        if self.store is None:
            return job()
        call = f"lead {next(self._calls)}"
        if not self.leads:
            self._wait(self.store, call)
            return None
        try:
            result = job()
        except BaseException as error:
            self.store.set(call, _describe_error(self.rank, error))
            raise
        self.store.set(call, DONE)
        return result

    def barrier(self) -> None:
        """Wait for all processes, without a timeout. PeerError if one has ended with an error."""
        if self.store is None:
            return
        call = f"meet {next(self._calls)}"
        self.store.set(f"{call} {self.rank}", DONE)
        for rank in range(self.size):
            self._wait(self.store, f"{call} {rank}")

    def report_error(self, error: BaseException) -> None:
        """Tell the other processes the error with which this one will end."""
        if self.store is not None:
            self.store.set(FAILED, _describe_error(self.rank, error))

    def reported_error(self) -> PeerError:
        """The error that another process has reported."""
        assert self.store is not None
        return PeerError(self.store.get(FAILED).decode())

    def explain(self, error: Exception) -> Exception:
        """The error to end this process with: PeerError if another process has failed first.

        Records the first error for the processes that end later.
        """
        with suppress(RuntimeError):  # raised by the store if the process that held it has ended
            if self.store is None:
                return error
            if not self.store.check([ENDED]):
                first = str(error) if isinstance(error, PeerError) else _describe_error(self.rank, error)
                self.store.set(ENDED, first)
            elif not (message := self.store.get(ENDED).decode()).startswith(_prefix(self.rank)):
                return PeerError(message)
        return error

    def _wait(self, store: Store, call: str) -> None:
        try:
            while not store.check([call]):
                if store.check([ENDED]):
                    raise PeerError(store.get(ENDED).decode())
                time.sleep(0.05)
            message = store.get(call).decode()
        except RuntimeError as error:  # the store ended with the process that held it
            raise ConnectionError("the leading process has ended: its output says why") from error
        if message != DONE:
            raise PeerError(message)


def _describe_error(rank: int, error: BaseException) -> str:
    return f"{_prefix(rank)}{one_line(error)}"


def _prefix(rank: int) -> str:
    return f"process {rank} has failed: "


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join torchrun's process group, or be the only process. device: default a GPU if there is one."""
    size, rank, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    chosen = find_device(device)
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    store: Store | None = None
    if size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        store = PrefixStore("plain-diffusion", _get_default_store())
    joined = World(rank, size, chosen, store)
    try:
        yield joined
    except Exception as error:
        cause = joined.explain(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        if size > 1:
            dist.destroy_process_group()
