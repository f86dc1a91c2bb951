"""Data for the loop: micro-batches in the order of their steps, read by worker processes or here, and what happens to errors."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, cast

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from train.data import Batch, Dataset

LONGEST = 3600.0  # seconds that a worker may take for a micro-batch: one that cannot send what it read would be waited for for ever
OnError = Literal["refuse", "skip"]
UNREADABLE = (ValueError, OSError)  # what data sets raise for a sample that cannot be used; anything else is no fault of a sample


class Batches:
    """The micro-batches of one process, step by step.

    error     why there are no more; set in place of raised, so that a loop can save what it has, and all processes can agree on it
    replaced  samples of the last step that others stand in for; a warning names each such sample once
    """

    def __init__(self, source: Iterator[_Read | _Failure], accumulate: int) -> None:
        self._source, self._accumulate = source, accumulate
        self._warned: set[int] = set()
        self.error: ValueError | OSError | None = None
        self.replaced = 0

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step; fewer or none where there is an `error`."""
        found: list[Batch] = []
        self.replaced = 0
        try:
            for _ in range(self._accumulate):
                read = _take(self._source)
                found.append(read.batch)
                self.replaced += read.replaced
                for index in read.unreadable.keys() - self._warned:
                    self._warned.add(index)
                    warnings.warn(f"left out, the next sample takes its place: {read.unreadable[index]}", stacklevel=2)
        except UNREADABLE as error:
            self.error = error
        return found


@contextmanager
def read_batches(
    data: Dataset, parts: Iterator[list[int]], accumulate: int, on_error: OnError, workers: int, pin: bool
) -> Iterator[Batches]:
    """The data set's samples in the order of `parts`, the indices of micro-batches of which `accumulate` make a step.

    on_error  what is done about a sample that cannot be read. "skip": the next one that can takes its place, the same one every time
    workers   processes that read, and end with the block; 0 reads here
    """
    with _reading(_Reader(data, on_error), parts, workers, pin) as source:
        yield Batches(source, accumulate)


def check_readable(data: Dataset, batch_size: int, on_error: OnError, workers: int, progress: bool) -> None:
    """Read every sample once. ValueError that names all that cannot be read; with "skip" a warning that does."""
    parts = (list(range(i, min(i + batch_size, len(data)))) for i in range(0, len(data), batch_size))
    unreadable: dict[int, str] = {}
    with (
        _reading(_Checker(data), parts, workers, pin=False) as source,
        tqdm(total=len(data), desc="checking data", unit="sample", disable=not progress) as bar,
    ):
        for first in range(0, len(data), batch_size):
            unreadable |= _take(source).unreadable
            bar.update(min(batch_size, len(data) - first))
    if unreadable:
        found = f"{len(unreadable)} of {len(data)} samples cannot be read: {'; '.join(unreadable[i] for i in sorted(unreadable))}"
        if on_error == "refuse" or len(unreadable) == len(data):
            raise ValueError(found)
        warnings.warn(found, stacklevel=2)


class _Read(NamedTuple):
    """A micro-batch, how many of its samples are replaced, and why samples could not be read, by their numbers."""

    batch: Batch
    replaced: int
    unreadable: dict[int, str]


class _Failure(NamedTuple):
    """An error as text: torch would wrap that of a worker in its traceback, and not every exception can be sent from there."""

    message: str
    of_system: bool
    traceback: str


class _Reader:
    """A data set whose errors are handed over like batches."""

    def __init__(self, data: Dataset, on_error: OnError) -> None:
        self.data, self.on_error = data, on_error

    def __getitems__(self, indices: Sequence[int]) -> _Read | _Failure:
        try:
            return self.read(indices)
        except Exception as error:
            kind = "" if isinstance(error, UNREADABLE) else f"{type(error).__name__} while data was read: "
            message = kind + " ".join(str(error).split())
            return _Failure(message, isinstance(error, OSError), traceback.format_exc())

    def read(self, indices: Sequence[int]) -> _Read:
        try:
            return _Read(self.data.__getitems__(indices), 0, {})
        except UNREADABLE:
            if self.on_error == "refuse":
                raise
        unreadable: dict[int, str] = {}
        samples = [self._next_readable(index, unreadable) for index in indices]
        batch = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        return _Read(batch, sum(index in unreadable for index in indices), unreadable)

    def _next_readable(self, index: int, unreadable: dict[int, str]) -> Batch:
        n = len(self.data)
        for i in (*range(index, n), *range(index)):
            if i not in unreadable and (sample := self.sample(i, unreadable)):
                return sample
        raise ValueError(f"none of the {n} samples can be read: {unreadable[index]}")

    def sample(self, index: int, unreadable: dict[int, str]) -> Batch | None:
        """One sample; None where it cannot be used, and why is noted."""
        try:
            sample = self.data.__getitems__([index])
            if (shape := tuple(sample["x0"].shape[1:])) != tuple(self.data.shape):
                raise ValueError(f"sample {index} has shape {shape}, others {tuple(self.data.shape)}: give a size to resize to")
        except UNREADABLE as error:
            unreadable[index] = " ".join(str(error).split())
            return None
        return sample


class _Checker(_Reader):
    """Hands over only what cannot be read."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data, "skip")

    def read(self, indices: Sequence[int]) -> _Read:
        unreadable: dict[int, str] = {}
        for index in indices:
            self.sample(index, unreadable)
        return _Read({}, 0, unreadable)


@contextmanager
def _reading(reader: _Reader, parts: Iterator[list[int]], workers: int, pin: bool) -> Iterator[Iterator[_Read | _Failure]]:
    loader: Any = DataLoader(
        cast(Any, reader),  # torch calls __getitems__ where there is one, but its types do not know it
        batch_sampler=cast(Any, parts),  # an iterator will do
        collate_fn=cast(Any, _as_it_is),
        worker_init_fn=_leave_ctrl_c_to_the_loop,
        num_workers=workers,
        timeout=LONGEST if workers else 0,
        pin_memory=pin,
    )
    source = iter(loader)
    with _no_error_between_lines():
        try:
            yield source
        finally:
            if workers:  # end them now, though the traceback of an error may still refer to what holds them
                source._shutdown_workers()


@contextmanager
def _no_error_between_lines() -> Iterator[None]:
    """When a worker dies, torch's handler of SIGCHLD raises in the middle of whatever runs; without it, it does where data is asked for."""
    previous: Any = None
    with suppress(ValueError, AttributeError):  # only the main thread has handlers, and not every platform this signal
        previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGCHLD, previous)


def _take(source: Iterator[_Read | _Failure]) -> _Read:
    """The next micro-batch. ValueError or OSError in one line, whatever was raised, wherever; the traceback is its cause's."""
    try:
        read = next(source)
    except Exception as error:  # none of the data set's: what torch and the system say of a process that is gone
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"a process that reads data has died; if memory ran out, take fewer train.workers ({reason})") from error
    if isinstance(read, _Failure):
        raise (OSError if read.of_system else ValueError)(read.message) from RuntimeError(f"\n{read.traceback}")
    return read


def _as_it_is(read: _Read | _Failure) -> _Read | _Failure:
    return read


def _leave_ctrl_c_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the loop ends its workers once it has saved. SIGTERM, which ends them, stays as it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
