"""Data for the loop: micro-batches in the order of their steps, read by worker processes or here, and what happens to errors."""

from __future__ import annotations

import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from diffusion.messages import brief, brief_list, one_line
from train.data import Batch, Dataset

MAX_WAIT = 3600.0  # seconds that a worker may take for a micro-batch: a file system may never answer
POLL = 0.5  # seconds after which the wait for a worker looks at whether the run is to stop
OnError = Literal["refuse", "skip"]
UNREADABLE = (ValueError, OSError)  # what data sets raise for a sample that cannot be used; anything else is no fault of a sample


class Batches:
    """The micro-batches of one process, step by step.

    error     why there are no more; set in place of raised, so that a loop can save what it has, and all processes can agree on it
    replaced  samples of the last step that others stand in for; a warning names each such sample once
    """

    def __init__(self, source: _Source, accumulate: int) -> None:
        self._source, self._accumulate = source, accumulate
        self._warned: set[int] = set()
        self.error: ValueError | OSError | None = None
        self.replaced = 0

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step; fewer or none where there is an `error`, or the run is to stop while they are waited for."""
        found: list[Batch] = []
        self.replaced = 0
        try:
            for _ in range(self._accumulate):
                read = self._source.take()
                if read is None:
                    break
                found.append(read.batch)
                self.replaced += read.replaced
                for index in read.unreadable.keys() - self._warned:
                    self._warned.add(index)
                    warnings.warn(
                        f"left out, the next sample (of its class if there is one) takes its place: {read.unreadable[index]}", stacklevel=2
                    )
        except UNREADABLE as error:
            self.error = error
        return found


@contextmanager
def read_batches(
    data: Dataset,
    parts: Iterator[list[int]],
    accumulate: int,
    on_error: OnError,
    workers: int,
    pin: bool,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Batches]:
    """The data set's samples in the order of `parts`, the indices of micro-batches of which `accumulate` make a step.

    on_error  what is done about a sample that cannot be read. "skip": the next one that can takes its place, the same one every time;
              where the data set has `labels`, the next one with the same label, if any can be read
    workers   processes that read, and end with the block; 0 reads here
    stopping  whether the run is to stop, asked while a worker is waited for
    """
    with _reading(_Reader(data, on_error), parts, workers, pin, stopping) as source:
        yield Batches(source, accumulate)


def check_readable(data: Dataset, batch_size: int, on_error: OnError, workers: int, progress: bool) -> None:
    """Read every sample once. ValueError that names the first that cannot be read and counts all; with "skip" a warning that does."""
    parts = (list(range(i, min(i + batch_size, len(data)))) for i in range(0, len(data), batch_size))
    unreadable: dict[int, str] = {}
    with (
        _reading(_Checker(data), parts, workers, pin=False) as source,
        tqdm(total=len(data), desc="checking data", unit="sample", disable=not progress) as bar,
    ):
        for first in range(0, len(data), batch_size):
            read = source.take()
            assert read is not None
            unreadable |= read.unreadable
            bar.update(min(batch_size, len(data) - first))
    if unreadable:
        found = f"{len(unreadable)} of {len(data)} samples cannot be read: {brief_list([unreadable[i] for i in sorted(unreadable)], '; ')}"
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
            read = self.read(indices)
            return read if get_worker_info() is None else read._replace(batch=_shared(read.batch))
        except Exception as error:
            kind = "" if isinstance(error, UNREADABLE) else f"{type(error).__name__} while data was read: "
            return _Failure(f"{kind}{one_line(error)}", isinstance(error, OSError), traceback.format_exc())

    def read(self, indices: Sequence[int]) -> _Read:
        try:
            return _Read(_checked(self.data.__getitems__(indices), len(indices)), 0, {})
        except UNREADABLE:
            if self.on_error == "refuse":
                raise
        unreadable: dict[int, str] = {}
        samples = [self._next_readable(index, unreadable) for index in indices]
        batch = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        return _Read(batch, sum(index in unreadable for index in indices), unreadable)

    def _next_readable(self, index: int, unreadable: dict[int, str]) -> Batch:
        for i in self._in_turn(index):
            if i not in unreadable and (sample := self.sample(i, unreadable)):
                return sample
        raise ValueError(f"none of the {len(self.data)} samples can be read: {unreadable[index]}")

    def _in_turn(self, index: int) -> Iterator[int]:
        """That sample, the others of its class after it, and then those of other classes: classes keep their shares."""
        yield index
        order = torch.arange(index + 1, index + len(self.data)) % len(self.data)
        labels: Tensor | None = getattr(self.data, "labels", None)
        same = torch.ones_like(order, dtype=torch.bool) if labels is None else labels[order] == labels[index]
        yield from order[same].tolist()
        yield from order[~same].tolist()

    def sample(self, index: int, unreadable: dict[int, str]) -> Batch | None:
        """One sample; None where it cannot be used, and why is noted."""
        try:
            sample = _checked(self.data.__getitems__([index]), 1)
            if (shape := tuple(sample["x0"].shape[1:])) != tuple(self.data.shape):
                raise ValueError(f"sample {index} has shape {shape}, others {tuple(self.data.shape)}: give a size to resize to")
        except UNREADABLE as error:
            unreadable[index] = one_line(error)
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


def _checked(batch: Any, n: int) -> Batch:
    """What a data set gave for n samples. ValueError where it is no batch of n."""
    sound = isinstance(batch, Mapping) and "x0" in batch
    if not sound or not all(isinstance(value, Tensor) and value.ndim and len(value) == n for value in batch.values()):
        raise TypeError(f"a data set must give a mapping to tensors with a row for each of {n} samples, x0 among them, not {brief(batch)}")
    return dict(batch)


def _shared(batch: Batch) -> Batch:
    """In memory that processes share, where torch puts what a worker sends: what fails here is said, later it never comes."""
    return {name: value.detach().share_memory_() for name, value in batch.items()}


class _Source:
    """Micro-batches as torch's loader gives them."""

    def __init__(self, loader: DataLoader[Any], stopping: Callable[[], bool]) -> None:
        self._batches: Any = iter(loader)
        self._workers, self._stopping = loader.num_workers, stopping

    def take(self) -> _Read | None:
        """The next one; None where the run is to stop while a worker is waited for.

        ValueError or OSError in one line, whatever was raised by the data set, wherever; the traceback is its cause's.
        """
        read = self._wait() if self._workers else next(self._batches)
        if isinstance(read, _Failure):
            raise (OSError if read.of_system else ValueError)(read.message) from RuntimeError(f"\n{read.traceback}")
        return cast("_Read | None", read)

    def _wait(self) -> _Read | _Failure | None:
        began = time.monotonic()
        while not self._stopping():
            try:
                return cast("_Read | _Failure", next(self._batches))
            except (RuntimeError, OSError, EOFError) as error:  # none of the data set's: of torch and the system
                if not str(error).startswith("DataLoader timed out"):
                    raise OSError("a process that reads data has died; if memory ran out, take fewer train.workers") from error
            if time.monotonic() - began > MAX_WAIT:
                raise OSError(f"data was waited for for {MAX_WAIT / 60:.0f} minutes: see whether its disk still answers")
        return None

    def close(self) -> None:
        """End the workers now, though the traceback of an error may still refer to what holds them."""
        if self._workers:
            self._batches._shutdown_workers()


@contextmanager
def _reading(
    reader: _Reader, parts: Iterator[list[int]], workers: int, pin: bool, stopping: Callable[[], bool] = lambda: False
) -> Iterator[_Source]:
    loader: Any = DataLoader(
        cast(Any, reader),  # torch calls __getitems__ where there is one, but its types do not know it
        batch_sampler=cast(Any, parts),  # an iterator will do
        collate_fn=cast(Any, _as_it_is),
        worker_init_fn=_leave_ctrl_c_to_the_loop,
        num_workers=workers,
        timeout=POLL if workers else 0,
        pin_memory=pin,
    )
    source = _Source(loader, stopping)
    with _no_error_between_lines():
        try:
            yield source
        finally:
            source.close()


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


def _as_it_is(read: _Read | _Failure) -> _Read | _Failure:
    return read


def _leave_ctrl_c_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the loop ends its workers once it has saved. SIGTERM, which ends them, stays as it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
