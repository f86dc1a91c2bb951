"""Where to compute."""

from __future__ import annotations

import torch


def find_device(name: str | None = None) -> torch.device:
    """A device by name, "cuda:1", "mps" or "cpu"; default: a GPU if there is one. ValueError if absent.

    Does not initialise any GPU, so that each of several processes uses its own only.
    """
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    names = ["cuda"] * bool(gpus) + [f"cuda:{i}" for i in range(gpus)] + ["mps"] * mps + ["cpu"]
    if name not in names:
        raise ValueError(f"no device {name!r} here: choose one of {', '.join(names)}")
    return torch.device(name)
