"""Where to compute."""

from __future__ import annotations

import torch


def find_device(name: str | None = None) -> torch.device:
    """The device of that name: "cuda", "cuda:1", "mps", "cpu"; None takes a GPU where there is one. ValueError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        have = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"no device {name!r} here ({str(error).splitlines()[0]}); there is: {', '.join([*have, 'cpu'])}") from None
    return device
