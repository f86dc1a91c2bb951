"""Checks that a resumed run finds the pictures and classes that it began with."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from samplers.picture_files import inflate
from train.data.names import nfc

PACKED = "files, packed"  # the checkpoint's setting that identifies the pictures (`pack`)
MAX_NAMES = 2**28  # bytes of the names of all pictures: those of millions


def pack(
    names: Sequence[str], labels: Sequence[str] | None = None, content: Callable[[int], bytes] = lambda i: b""
) -> str:
    """The names of pictures, and a hash of the first picture of each class, as compressed text.

    content  returns the bytes of picture number i
    """
    first = {label: i for i, label in reversed(list(enumerate(labels or ())))}
    marks = {i: _mark(content, i) for i in first.values()}
    lines = [nfc(name) + (f"\t{marks[i]}" if i in marks else "") for i, name in enumerate(names)]
    return base64.b64encode(zlib.compress("\n".join(lines).encode())).decode()


def _mark(content: Callable[[int], bytes], index: int) -> str:
    """A hash of a file's size and beginning; "" if it cannot be read, which training reports."""
    try:
        data = content(index)
    except (OSError, ValueError):
        return ""
    return hashlib.sha256(b"%d " % len(data) + data[: 2**16]).hexdigest()[:16]


def describe_change(packed_then: str, packed_now: str) -> str:
    """How two texts of `pack` differ, such as "with a.png and without b.png"; "" if they are equal.

    Names the first missing picture and the first new one. If there are none, the first class that swapped its
    pictures with another. ValueError if a text is damaged, or the names are in another order.
    """
    before, now = (_unpack(packed) for packed in (packed_then, packed_now))
    had, have = dict(before), dict(now)
    gone = [f"with {name[-60:]}" for name, _ in before if name not in have][:1]
    new = [f"without {name[-60:]}" for name, _ in now if name not in had][:1]
    if gone or new:
        return " and ".join(gone + new)
    if [name for name, _ in before] != [name for name, _ in now]:
        raise ValueError(
            "an earlier version began it, which sorted these pictures by another Unicode form of their "
            "names: start anew in another folder"
        )
    was = {mark: name for name, mark in before if mark}
    moved = {name: was[mark] for name, mark in now if mark in was and had[name] != mark}
    for name, earlier in moved.items():
        if earlier in moved:
            return f"with what is now {name[-60:]} as {earlier[-60:]}"
    return ""


def _unpack(packed: Any) -> list[tuple[str, str]]:
    """Names and hashes. Earlier versions wrote no hashes, and names in the file system's Unicode form."""
    try:
        lines = inflate(base64.b64decode(packed), MAX_NAMES).decode().split("\n")
    except (TypeError, ValueError):
        lines = [""]
    if lines == [""]:
        raise ValueError("the checkpoint's list of pictures is damaged")
    return [(nfc(name), mark) for name, _, mark in (line.partition("\t") for line in lines)]
