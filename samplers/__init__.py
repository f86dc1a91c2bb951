"""Solvers, one per file; `sample`, which runs any of them by name; `generate`, prompts to images."""

from typing import TYPE_CHECKING

import plain_diffusion

plain_diffusion.check("diffusion", "models")

from samplers.consistency import consistency
from samplers.ddim import ddim
from samplers.ddpm import ddpm
from samplers.dpm2 import dpm2
from samplers.dpmpp_2m import dpmpp_2m
from samplers.dpmpp_2m_sde import dpmpp_2m_sde
from samplers.dpmpp_2s import dpmpp_2s
from samplers.dpmpp_3m import dpmpp_3m
from samplers.dpmpp_3m_sde import dpmpp_3m_sde
from samplers.dpmpp_sde import dpmpp_sde
from samplers.edm import edm
from samplers.euler import euler
from samplers.euler_ancestral import euler_ancestral
from samplers.generate import generate, preview
from samplers.heun import heun
from samplers.image_to_image import image_to_image
from samplers.invert import invert
from samplers.likelihood import log_likelihood
from samplers.rk4 import rk4
from samplers.sample import SAMPLERS, network_calls, sample
from samplers.sit_sde import sit_sde
from samplers.solver import Solver, Step
from samplers.unipc import unipc

if TYPE_CHECKING:
    from samplers.display import show
    from samplers.pictures import read_image, read_mask, to_pil
else:
    _AT_FIRST_USE = {**dict.fromkeys(("read_image", "read_mask", "to_pil"), "pictures"), "show": "display"}

    def __getattr__(name: str) -> object:
        """What works on pictures, imported with Pillow at its first use."""
        if name not in _AT_FIRST_USE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"samplers.{_AT_FIRST_USE[name]}"), name)


__all__ = [
    "SAMPLERS",
    "Solver",
    "Step",
    "consistency",
    "ddim",
    "ddpm",
    "dpm2",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "edm",
    "euler",
    "euler_ancestral",
    "generate",
    "heun",
    "image_to_image",
    "invert",
    "log_likelihood",
    "network_calls",
    "preview",
    "read_image",
    "read_mask",
    "rk4",
    "sample",
    "show",
    "sit_sde",
    "to_pil",
    "unipc",
]
