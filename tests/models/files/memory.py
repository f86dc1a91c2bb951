"""How much memory loading takes, in a process of its own.

python -m tests.models.files.memory PATH DTYPE COUNT ...
    per three arguments, prints one line: {"peak", "model", "largest", "after"}: bytes beyond what the process
    had before, at most while loading once; of the weights; of the largest tensor; and resident after each of
    COUNT loads, none of which is kept. DTYPE is torch's name for it, or "stored"
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import models
from eval.bench.harness import peak_resident, release_memory
from models.layers.streaming import resident_bytes


def measure(path: str, dtype: str, count: int) -> dict[str, Any]:
    wanted = None if dtype == "stored" else getattr(torch, dtype)
    loaded: list[models.Model] = []
    peak = peak_resident(lambda: loaded.append(models.load(path, dtype=wanted)))
    sizes = [value.nbytes for value in loaded.pop().state_dict().values()]
    after = []
    for _ in range(count):
        models.load(path, dtype=wanted)
        release_memory()
        after.append(resident_bytes())
    return {"peak": peak, "model": sum(sizes), "largest": max(sizes), "after": after}


if __name__ == "__main__":
    models.load(sys.argv[1])  # what is imported and set up once
    for path, dtype, count in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        print(json.dumps(measure(path, dtype, int(count))))
