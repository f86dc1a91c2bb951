"""The processes of a run, as torchrun starts them; alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from models.device import find_device


@dataclass(frozen=True)
class World:
    """rank 0 ... size-1 of this process, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All agree on the answer."""
        return flag if self.size == 1 else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The average of a tensor over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.size
        return value


@contextmanager
def world(device: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes, or be a world of one. device: default a GPU where there is one."""
    size, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    chosen = find_device(device)
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    joins = size > 1
    if joins:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        if joins:
            dist.destroy_process_group()
