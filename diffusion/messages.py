"""Messages: text from outside is cut to one line; warnings point at the user's line."""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

MAX_LINE = 500  # characters
MAX_ITEM = 300  # characters of an item in a list
INTERNAL = {"diffusion", "models", "samplers", "train", "eval", "configs", "contextlib", "torch"}  # modules

_BRIEF = reprlib.Repr()  # values from files may be megabytes long, and deeply nested
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 100, 100, 40
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 12


def brief(value: Any) -> str:
    """A value as Python writes it, on one line, long parts cut."""
    return one_line(_BRIEF.repr(value))


def brief_list(texts: Sequence[str], separator: str = ", ", most: int = 12) -> str:
    """The first texts of a list, and how many more there are."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*(one_line(text, MAX_ITEM) for text in texts[:most]), *more])


def one_line(text: object, most: int = MAX_LINE) -> str:
    """A text or an error (without a message: its class) on one line, without control characters."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    line = " ".join(printable.split()) or (type(text).__name__ if isinstance(text, BaseException) else "")
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def first_line(text: object) -> str:
    """The first line of a text or an error: libraries may add advice or a stack below it."""
    return one_line(str(text).strip().partition("\n")[0]) or one_line(text)


def warn(text: str) -> None:
    """A UserWarning that points at the line outside this library, however deep the call."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in INTERNAL:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
