"""Reads micro-batches for the training loop, in workers or in this process, with unreadable samples."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from diffusion.messages import brief, brief_list, one_line, warn
from train.data.dataset import Batch, Dataset

MAX_WAIT = 3600.0  # seconds that a worker may take for a micro-batch: a file system may never answer
POLL = 0.5  # seconds between checks for a stop request, while waiting for a worker
OnError = Literal["refuse", "skip"]
UNREADABLE = (ValueError, OSError)  # what data sets raise for a bad sample; anything else is a bug


class Batches:
    """The micro-batches of one process, step by step, from torch's loader.

    error     why there are no more. It is not raised, so that the loop can save and all processes can agree
    replaced  how many samples of the last step were replaced by others; a warning names each of them once
    """

    def __init__(
        self,
        reader: _Reader,
        parts: Iterator[list[int]],
        accumulate: int = 1,
        workers: int = 0,
        pin: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        loader: Any = DataLoader(
            cast(Any, reader),  # torch calls __getitems__, which its types lack
            batch_sampler=cast(Any, parts),  # an iterator is enough
            collate_fn=cast(Any, _identity),
            worker_init_fn=_ignore_ctrl_c,
            num_workers=workers,
            timeout=POLL if workers else 0,
            pin_memory=pin,
        )
        self._batches: Any = iter(loader)
        self._accumulate, self._workers, self._stopping = accumulate, workers, stopping
        self._warned: set[int] = set()
        self.error: ValueError | OSError | None = None
        self.replaced = 0

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step; fewer or none after an `error`, or if the run is to stop."""
        batches: list[Batch] = []
        self.replaced = 0
        try:
            while len(batches) < self._accumulate and (read := self.take()):
                batches.append(read.batch)
                self.replaced += read.replaced
                for index in read.unreadable.keys() - self._warned:
                    self._warned.add(index)
                    reason = read.unreadable[index]
                    warn(f"replaced by the next sample (of its class if it has one): {reason}")
        except UNREADABLE as error:
            self.error = error
        return batches

    def take(self) -> _Read | None:
        """The next micro-batch, None if the run is to stop.

        Errors of the data set become ValueError or OSError in one line, caused by their traceback.
        """
        read = self._wait() if self._workers else next(self._batches)
        if isinstance(read, _Failure):
            kind = OSError if read.of_system else ValueError
            raise kind(read.message) from RuntimeError(f"\n{read.traceback}")
        return cast("_Read | None", read)

    def _wait(self) -> _Read | _Failure | None:
        start = time.monotonic()
        while not self._stopping():
            try:
                return cast("_Read | _Failure", next(self._batches))
            except (RuntimeError, OSError, EOFError) as error:  # torch's or the system's, not the data set's
                if not str(error).startswith("DataLoader timed out"):
                    raise OSError("a worker has died; if memory ran out, take fewer train.workers") from error
            if time.monotonic() - start > MAX_WAIT:
                minutes = f"{MAX_WAIT / 60:.0f} minutes"
                raise OSError(f"no data came for {minutes}: check whether its disk still answers")
        return None

    def close(self) -> None:
        """End the workers now: a traceback may keep the loader alive, and them with it."""
        if self._workers:
            self._batches._shutdown_workers()


def read_batches(
    data: Dataset,
    parts: Iterator[list[int]],
    accumulate: int,
    on_error: OnError,
    workers: int,
    pin: bool,
    stopping: Callable[[], bool] = lambda: False,
) -> AbstractContextManager[Batches]:
    """Read the samples of `parts`, which are the indices of micro-batches; `accumulate` parts make a step.

    on_error  for samples that cannot be read: "refuse" ends with an error; "skip" takes the next readable
              sample, of the same label if the data set has `labels`
    workers   number of processes that read; 0 reads in this one
    stopping  whether the run is to stop, called while a worker is waited for
    """
    return _closing(Batches(_Reader(data, on_error), parts, accumulate, workers, pin, stopping))


def check_readable(data: Dataset, batch_size: int, on_error: OnError, workers: int, progress: bool) -> None:
    """Read every sample once. ValueError, or with "skip" a warning, that names the unreadable ones."""
    parts = [list(range(i, min(i + batch_size, len(data)))) for i in range(0, len(data), batch_size)]
    unreadable: dict[int, str] = {}
    with (
        _closing(Batches(_Checker(data, "skip"), iter(parts), workers=workers)) as batches,
        tqdm(total=len(data), desc="checking data", unit="sample", disable=not progress) as bar,
    ):
        for part in parts:
            read = batches.take()
            assert read is not None
            unreadable |= read.unreadable
            bar.update(len(part))
    if unreadable:
        reasons = brief_list([unreadable[i] for i in sorted(unreadable)], "; ")
        problem = f"{len(unreadable)} of {len(data)} samples cannot be read: {reasons}"
        if on_error == "refuse" or len(unreadable) == len(data):
            raise ValueError(problem)
        warn(problem)


@contextmanager
def _closing(batches: Batches) -> Iterator[Batches]:
    """Ends the workers with the block.

    torch's handler of SIGCHLD is off within it. That raises at any line when a worker dies; reading data then
    raises anyway.
    """
    previous: Any = None
    with suppress(ValueError, AttributeError):  # outside the main thread, or on a platform without the signal
        previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield batches
    finally:
        batches.close()
        if previous is not None:
            signal.signal(signal.SIGCHLD, previous)


class _Read(NamedTuple):
    """A micro-batch, how many of its samples were replaced, and errors by the index of the sample."""

    batch: Batch
    replaced: int
    unreadable: dict[int, str]


class _Failure(NamedTuple):
    """An error as text: not every exception can be sent, and torch would add its traceback to the message."""

    message: str
    of_system: bool
    traceback: str


class _Reader:
    """Wraps a data set: returns errors instead of raising them."""

    def __init__(self, data: Dataset, on_error: OnError) -> None:
        self.data, self.on_error = data, on_error

    def __getitems__(self, indices: Sequence[int]) -> _Read | _Failure:
        try:
            read = self.read(indices)
            return read if get_worker_info() is None else read._replace(batch=_share_memory(read.batch))
        except Exception as error:
            kind = "" if isinstance(error, UNREADABLE) else f"{type(error).__name__} while data was read: "
            return _Failure(f"{kind}{one_line(error)}", isinstance(error, OSError), traceback.format_exc())

    def read(self, indices: Sequence[int]) -> _Read:
        try:
            return _Read(_check_batch(self.data.__getitems__(indices), len(indices)), 0, {})
        except UNREADABLE:
            if self.on_error == "refuse":
                raise
        unreadable: dict[int, str] = {}
        samples = [self._next_readable(index, unreadable) for index in indices]
        batch = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        return _Read(batch, sum(index in unreadable for index in indices), unreadable)

    def _next_readable(self, index: int, unreadable: dict[int, str]) -> Batch:
        for i in self._candidates(index):
            if i not in unreadable and (sample := self.sample(i, unreadable)):
                return sample
        raise ValueError(f"none of the {len(self.data)} samples can be read: {unreadable[index]}")

    def _candidates(self, index: int) -> Iterator[int]:
        """The sample itself, then later ones of its class, so that classes keep their shares, then others."""
        yield index
        order = torch.arange(index + 1, index + len(self.data)) % len(self.data)
        labels: Tensor | None = getattr(self.data, "labels", None)
        same = torch.ones_like(order, dtype=torch.bool) if labels is None else labels[order] == labels[index]
        yield from order[same].tolist()
        yield from order[~same].tolist()

    def sample(self, index: int, unreadable: dict[int, str]) -> Batch | None:
        """One sample as a batch; None if it cannot be used, with the reason in `unreadable`."""
        try:
            sample = _check_batch(self.data.__getitems__([index]), 1)
            if (shape := tuple(sample["x0"].shape[1:])) != tuple(self.data.shape):
                raise ValueError(
                    f"sample {index} has shape {shape}, others {tuple(self.data.shape)}: give a size to "
                    "resize to"
                )
        except UNREADABLE as error:
            unreadable[index] = one_line(error)
            return None
        return sample


class _Checker(_Reader):
    """Reads samples and returns only the errors."""

    def read(self, indices: Sequence[int]) -> _Read:
        unreadable: dict[int, str] = {}
        for index in indices:
            self.sample(index, unreadable)
        return _Read({}, 0, unreadable)


def _check_batch(batch: Any, n: int) -> Batch:
    """The data set's batch. TypeError unless it has n samples."""
    valid = isinstance(batch, Mapping) and "x0" in batch
    if not valid or not all(
        isinstance(value, Tensor) and value.ndim and len(value) == n for value in batch.values()
    ):
        raise TypeError(
            f"a data set must return a mapping to tensors with a row for each of {n} samples, x0 among them, "
            f"not {brief(batch)}"
        )
    return dict(batch)


def _share_memory(batch: Batch) -> Batch:
    """Move tensors to shared memory, as torch does when a worker sends them, where errors would be lost."""
    return {name: value.detach().share_memory_() for name, value in batch.items()}


def _identity(read: _Read | _Failure) -> _Read | _Failure:
    return read


def _ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but the loop ends the workers, after it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
