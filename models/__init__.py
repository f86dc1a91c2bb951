"""Networks, and `build`, `load`, `save`, `download`: descriptions and files to models and back."""

from typing import TYPE_CHECKING

import plain_diffusion

plain_diffusion.check("diffusion")

from models.download import download
from models.ema import EMA
from models.layers.conditioning import NetworkParams, check_labels, network_input
from models.model import Model, Report, build, build_network
from models.networks.chroma import Chroma, ChromaParams
from models.networks.clip import CLIPText, CLIPTextParams
from models.networks.dit import DiT, DiTParams
from models.networks.flux import Flux, FluxParams
from models.networks.sd3 import SD3, SD3Params
from models.networks.t5 import T5, T5Params
from models.networks.taesd import TAESD, TAESDParams
from models.networks.unet import UNet, UNetParams
from models.networks.vae import VAE, VAEParams
from models.text.encoder import TextEncoder
from models.text.recipes import TextParams
from models.text.t5_tokenizer import T5Tokenizer

if TYPE_CHECKING:
    from models.adapters import adapted, load_adapter
    from models.families import FAMILIES, NETWORKS, PUBLISHED
    from models.layouts.load import load
    from models.layouts.save import save
    from models.presets import miniature, published
else:
    _AT_FIRST_USE = {"load": "layouts.load", "save": "layouts.save"}
    _AT_FIRST_USE |= dict.fromkeys(("adapted", "load_adapter"), "adapters")
    _AT_FIRST_USE |= dict.fromkeys(("miniature", "published"), "presets")
    _AT_FIRST_USE |= dict.fromkeys(("FAMILIES", "NETWORKS", "PUBLISHED"), "families")

    def __getattr__(name: str) -> object:
        """Families and file formats, imported at their first use, as they take half of the import time."""
        from importlib import import_module

        if name in _AT_FIRST_USE:
            return getattr(import_module(f"models.{_AT_FIRST_USE[name]}"), name)
        if name in ("families", "presets"):
            return import_module(f"models.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "EMA",
    "FAMILIES",
    "NETWORKS",
    "PUBLISHED",
    "SD3",
    "T5",
    "TAESD",
    "VAE",
    "CLIPText",
    "CLIPTextParams",
    "Chroma",
    "ChromaParams",
    "DiT",
    "DiTParams",
    "Flux",
    "FluxParams",
    "Model",
    "NetworkParams",
    "Report",
    "SD3Params",
    "T5Params",
    "T5Tokenizer",
    "TAESDParams",
    "TextEncoder",
    "TextParams",
    "UNet",
    "UNetParams",
    "VAEParams",
    "adapted",
    "build",
    "build_network",
    "check_labels",
    "download",
    "load",
    "load_adapter",
    "miniature",
    "network_input",
    "published",
    "save",
]
