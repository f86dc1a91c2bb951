"""How the schedulers of diffusers are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch


class Wide:
    """A module in which float32 is float64."""

    def __init__(self, module: Any, float64: Any) -> None:
        self.module, self.float32 = module, float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Makes a scheduler compute in float64 throughout, tables and times too: its algorithm is compared then,
    and not its rounding."""

    def widened(scheduler: Any) -> Any:
        module = inspect.getmodule(scheduler)
        monkeypatch.setattr(module, "torch", Wide(torch, torch.float64))
        monkeypatch.setattr(module, "np", Wide(np, np.float64), raising=False)
        return scheduler

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield widened
    torch.set_default_dtype(default)
