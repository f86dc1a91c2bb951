"""Networks, and `build`, `load`, `save`: descriptions and files to models and back."""

from models.checkpoints import load, save
from models.conditioning import check_labels
from models.dit import DiT, DiTParams
from models.ema import EMA
from models.model import NETWORKS, Model, Report, build, build_network
from models.unet import UNet, UNetParams

__all__ = [
    "EMA",
    "NETWORKS",
    "DiT",
    "DiTParams",
    "Model",
    "Report",
    "UNet",
    "UNetParams",
    "build",
    "build_network",
    "check_labels",
    "load",
    "save",
]
