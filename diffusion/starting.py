"""Ctrl-C while a program is still being imported: one line and status 130, in place of a traceback from within torch.

Every package imports this first, because `python -m samplers` imports the package before anything of the program itself runs.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def started() -> None:
    """The program has begun, and handles Ctrl-C itself from now on."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped before it began\n")
    os._exit(130)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # what argv is while -m imports
    signal.signal(signal.SIGINT, _end)
