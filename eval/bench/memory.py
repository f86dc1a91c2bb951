"""How much memory this process takes, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path

from models.layers.streaming import resident

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def give_back() -> None:
    """Collect what nothing refers to, and let the system have it: the C library keeps freed memory for the next time."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def peak_resident(call: Callable[[], object]) -> float:
    """Bytes in memory at most during the call, beyond those before it; NaN where the system does not tell."""
    if not RESET.exists():
        return math.nan
    give_back()
    RESET.write_text("5")  # the peak starts anew
    before = resident()
    call()
    return float(_field("VmHWM") - before)


def _field(name: str) -> int:
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
