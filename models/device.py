"""Where to compute."""

from __future__ import annotations

import torch


def find_device(name: str | None = None) -> torch.device:
    """The device of that name: "cuda", "cuda:1", "mps", "cpu"; None takes a GPU where there is one.
    ValueError where it is not there.

    Touches no GPU, so that of several processes each wakes its own only.
    """
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    there = ["cuda"] * bool(gpus) + [f"cuda:{i}" for i in range(gpus)] + ["mps"] * mps + ["cpu"]
    if name not in there:
        raise ValueError(f"no device {name!r} here; there is: {', '.join(there)}")
    return torch.device(name)
