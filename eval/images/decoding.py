"""From picture files to pixels, several at a time, and few of them in memory where they are large."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from eval.images.source import Unreadable
from samplers.pictures import MAX_PIXELS, read_pixels

HELD = 2**26  # pixels, of all pictures together, that are decoded before they are asked for; a larger picture is decoded alone

Before = Callable[[int], None]


def pixels(path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS, before: Before = lambda pixels: None) -> Tensor:
    """uint8 (3, H, W) of a picture in colour; see `read_pixels`.

    Values are those of the file, whatever colour profile it has: published protocols read pictures so, and their figures with it.
    """
    read = read_pixels(path, content, max_pixels=max_pixels, before=before)
    return rearrange(torch.from_numpy(read), "h w c -> c h w").contiguous()


def in_threads(read: Callable[[int, Before], Tensor], indices: Sequence[int]) -> Iterator[Tensor | Unreadable]:
    """read(i, before) of each, in order; decoding leaves Python free, so that it happens side by side, ahead of what is asked for.

    `read` calls `before` with the number of pixels that it is about to decode, which waits until there is room for them (HELD): a picture
    counts until the next one is asked for. What ValueError or OSError says becomes Unreadable.
    """
    line = _Line()

    def attempt(turn: int, index: int) -> Tensor | Unreadable:
        try:
            return read(index, partial(line.enter, turn))
        except (OSError, ValueError) as error:
            return Unreadable(str(error))
        finally:
            line.enter(turn, 0)

    with ThreadPoolExecutor() as pool:
        try:
            for turn, picture in enumerate(pool.map(attempt, range(len(indices)), indices)):
                yield picture
                del picture
                line.leave(turn)
        finally:
            line.close()


class _Line:
    """Pictures enter in order, each when those before it have left room; so the one that is waited for is never kept out by later ones."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._next, self._held, self._closed = 0, dict[int, int](), False

    def enter(self, turn: int, pixels: int) -> None:
        """Wait for room, if this one has not entered yet. CancelledError where the line is closed meanwhile."""
        with self._change:
            self._change.wait_for(lambda: self._closed or turn < self._next or (turn == self._next and self._has_room(pixels)))
            if self._closed:
                raise CancelledError
            if turn == self._next:
                self._next, self._held[turn] = turn + 1, pixels
                self._change.notify_all()

    def _has_room(self, pixels: int) -> bool:
        return not self._held or sum(self._held.values()) + pixels <= HELD

    def leave(self, turn: int) -> None:
        """Make room."""
        with self._change:
            del self._held[turn]
            self._change.notify_all()

    def close(self) -> None:
        """Nobody asks for more: all who wait go home."""
        with self._change:
            self._closed = True
            self._change.notify_all()
