"""The libraries that we compare with, imported by the first test that uses one: together they take longer
than most tests."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from typing import TYPE_CHECKING, Any


class Peer:
    """A module that is imported when something of it is used: within a test, not at the top of its file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # pytest looks for marks on everything that a module holds
        try:
            return getattr(importlib.import_module(self._name), name)
        except AttributeError:
            return importlib.import_module(f"{self._name}.{name}")


if TYPE_CHECKING:
    import cleanfid as cleanfid
    import diffusers as diffusers
    import open_clip as open_clip
    import peft as peft
    import prdc as prdc
    import pytorch_fid as pytorch_fid
    import scipy as scipy
    import sklearn as sklearn
    import timm as timm
    import torch_fidelity as torch_fidelity
    import torchmetrics as torchmetrics
    import transformers as transformers
else:

    def __getattr__(name: str) -> Peer:
        if name.startswith("_"):
            raise AttributeError(name)
        return Peer(name)


@cache
def k_sampling() -> Any:
    """k-diffusion's sampling.py: the package around it imports clip, which wants a setuptools that is
    gone."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("k_diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")
