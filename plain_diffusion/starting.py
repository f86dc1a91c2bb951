"""Ctrl-C while a program is being imported prints one line and exits with status 130, without a traceback.

Every package imports this first, because `python -m samplers` imports the package before the program runs.
Nothing changes for other programs that import these packages.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

PROGRAMS = ("train", "samplers", "eval", "models")


def program() -> str | None:
    """Which of our programs `python -m` is importing at the moment; None for everything else."""
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:  # argv is ["-m"] during that import
        return None
    package = sys.orig_argv[sys.orig_argv.index("-m") + 1].split(".")[0]
    return package if package in PROGRAMS else None


def end_on_interrupt() -> None:
    """From now until `started`, Ctrl-C ends the process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def started() -> None:
    """Called when the program has begun: it handles Ctrl-C itself from now on."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped before it began\n")
    os._exit(130)


if program():
    end_on_interrupt()
