"""How much memory loading takes, in a process of its own.

python -m tests.models.checkpoints.memory PATH DTYPE COUNT ...
    per three arguments, prints one line: {"peak", "model", "largest", "after"}: bytes beyond what the process had before, at most
    while loading once; of the weights; of the largest tensor; and resident after each of COUNT loads, none of which is kept.
    DTYPE is torch's name for it, or "stored"
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

import models


def resident(field: str) -> int:
    """VmRSS, what is resident, or VmHWM, the most that was, in bytes."""
    return 1024 * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def give_back() -> None:
    """Collect what nothing refers to, and let the system have it: the C library keeps freed memory for the next time."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(path: str, dtype: str, count: int) -> dict[str, Any]:
    wanted = None if dtype == "stored" else getattr(torch, dtype)
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
    before = resident("VmRSS")
    model = models.load(path, dtype=wanted)
    peak = resident("VmHWM") - before
    sizes = [value.nbytes for value in model.state_dict().values()]
    del model
    after = []
    for _ in range(count):
        models.load(path, dtype=wanted)
        give_back()
        after.append(resident("VmRSS"))
    return {"peak": peak, "model": sum(sizes), "largest": max(sizes), "after": after}


if __name__ == "__main__":
    models.load(sys.argv[1])  # what is imported and set up once
    for path, dtype, count in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        print(json.dumps(measure(path, dtype, int(count))))
