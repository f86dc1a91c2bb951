"""How much memory a process takes that generates images with a streamed model.

python -m tests.models.streamed WEIGHTS COUNT PATH...
    WEIGHTS is how many bytes there are to be for weights, 0 for no limit at all. Prints {"memory", "before",
    "after", "peak"}: what `load` was given, bytes resident before loading and after each of COUNT images, and
    at most
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import models
from models.layers.streaming import WORK, resident_bytes
from samplers import generate


def main(weights: int, count: int, paths: list[str]) -> None:
    generate(models.miniature("sd1"), "a", steps=1, height=16, width=16)  # what is imported and set up once
    before, after = resident_bytes(), []
    memory = int((before + weights) / (1 - WORK)) if weights else None
    model = models.load(*paths, memory=memory)
    for seed in range(count):
        generate(model, "a corgi", steps=1, seeds=[seed], height=32, width=32)
        after.append(resident_bytes())
    # Not ru_maxrss, which begins with that of the process that started this one.
    peak = next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps({"memory": memory, "before": before, "after": after, "peak": peak}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
