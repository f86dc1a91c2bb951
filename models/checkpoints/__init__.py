"""Files to models and back."""

from models.checkpoints.native import load, save

__all__ = ["load", "save"]
