"""Decodes picture files in threads, with a limit on the pixels in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from samplers.pictures import MAX_PIXELS, Before, no_wait, read_pixels
from train.data.source import Unreadable

T = TypeVar("T")
MAX_DECODED = 2**27  # pixels decoded in advance, 400 MB in colour; a larger picture is decoded alone


def decode_picture(
    path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS, before: Before = no_wait
) -> Tensor:
    """A picture in colour, uint8 (3, H, W) (`read_pixels`).

    Values are those of the file, whatever its colour profile: published protocols ignore profiles.
    """
    read = read_pixels(path, content, max_pixels=max_pixels, before=before)
    return rearrange(torch.from_numpy(read), "h w c -> c h w").contiguous()


def map_in_threads(read: Callable[[int, Before], T], indices: Sequence[int]) -> Iterator[T | Unreadable]:
    """read(i, before) of each index, in order, computed by threads in advance. Decoding releases the GIL.

    `read` must call `before` with the number of pixels before it decodes them; that waits until they fit into
    MAX_DECODED. A picture counts until the next one is requested. ValueError and OSError become Unreadable.
    """
    queue = _Queue()

    def attempt(turn: int, index: int) -> T | Unreadable:
        try:
            return read(index, partial(queue.enter, turn))
        except (OSError, ValueError) as error:
            return Unreadable(str(error))
        finally:
            queue.enter(turn, 0)

    with ThreadPoolExecutor() as pool:
        try:
            for turn, picture in enumerate(pool.map(attempt, range(len(indices)), indices)):
                yield picture
                del picture
                queue.leave(turn)
        finally:
            queue.close()


class _Queue:
    """Admits pictures in order, each when it fits, so that later ones never block the one needed next."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._next, self._held, self._closed = 0, dict[int, int](), False

    def enter(self, turn: int, pixels: int) -> None:
        """Wait until this picture fits, unless it was admitted before. CancelledError if the queue closes."""
        with self._change:
            self._change.wait_for(
                lambda: self._closed or turn < self._next or (turn == self._next and self._has_room(pixels))
            )
            if self._closed:
                raise CancelledError
            if turn == self._next:
                self._next, self._held[turn] = turn + 1, pixels
                self._change.notify_all()

    def _has_room(self, pixels: int) -> bool:
        return not self._held or sum(self._held.values()) + pixels <= MAX_DECODED

    def leave(self, turn: int) -> None:
        """Remove a picture."""
        with self._change:
            del self._held[turn]
            self._change.notify_all()

    def close(self) -> None:
        """Cancel all threads that wait."""
        with self._change:
            self._closed = True
            self._change.notify_all()
