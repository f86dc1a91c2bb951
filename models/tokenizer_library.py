"""Calls the package tokenizers, and turns its panics, which are no Exception, into ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion.messages import one_line


def library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"prompts are read with the package tokenizers ({error}): pip install tokenizers") from error
    return tokenizers


def guarded(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of a call of the library. ValueError in one line if it fails in any way."""
    try:
        return call(*args, **options)
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, MemoryError)
        if not failed and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"it is damaged ({one_line(error)})") from None
