"""Adapters: LoRA in every dialect, and its kin, read and applied to a model."""

from models.adapters.apply import adapted
from models.adapters.read import Adapter, load_adapter, sha256_of_adapters

__all__ = ["Adapter", "adapted", "load_adapter", "sha256_of_adapters"]
