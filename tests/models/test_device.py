"""Names of devices."""

from __future__ import annotations

import pytest
import torch

from models.device import find_device


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_gpus_are_counted_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two GPUs each may be named, and the first free one is the default; a third is refused."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device() == find_device("cuda") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(
        ValueError, match=r"no device .cuda:2. here: choose one of cuda, cuda:0, cuda:1, .*cpu"
    ):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cpuu", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no device '{name}' here: choose one of .*cpu"):
        find_device(name)
