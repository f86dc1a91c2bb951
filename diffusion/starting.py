"""Ctrl-C while a program is still being imported: one line and status 130, in place of a traceback from within torch.

Every package imports this first, because `python -m samplers` imports the package before anything of the program itself runs. Ctrl-C of
other programs that import these packages stays as it is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

PROGRAMS = ("models", "samplers", "train", "eval")


def started() -> None:
    """The program has begun, and handles Ctrl-C itself from now on."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped before it began\n")
    os._exit(130)


def _is_ours(command: Sequence[str]) -> bool:
    """Whether python is asked to run one of our packages, or a module of one."""
    module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
    return any(name.split(".")[0] in PROGRAMS for name in module)


# argv is that while -m imports.
if sys.argv[:1] == ["-m"] and _is_ours(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
