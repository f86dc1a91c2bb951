"""Peers that do not import the usual way."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from typing import Any


@cache
def k_sampling() -> Any:
    """k-diffusion's sampling.py: the package around it imports clip, which wants a setuptools that is gone."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("k_diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")
