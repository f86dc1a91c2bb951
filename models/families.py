"""The published families of models: what their weights do not say, and how they are meant to be sampled.

Which family a model is of follows from its parts; two families of the same parts (SDXL and SDXL-Turbo) can only be told apart by
whoever names the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from models import recipes
from models.clip import CLIPTextParams
from models.flux import FluxParams
from models.recipes import TextParams
from models.sd3 import SD3Params
from models.t5 import T5Params
from models.taesd import TAESDParams
from models.unet import UNetParams
from models.vae import VAEParams

SD_BETAS: dict[str, Any] = {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000}


@dataclass(frozen=True)
class Family:
    """One published family.

    base      the family with the same parts that a file of this one is taken for
    schedule, prediction, consistency, grid  as in a model's description
    sampling  sampler, steps and guidance that it is meant for
    size      pixels of the shorter side that it was trained on
    scale, shift, mean, std  of its latents, see VAEParams
    text      how its text towers are used, where not as the recipe of its base (see models.recipes)
    table     the one of spacing "align_your_steps" that was fitted to it, if one is published
    """

    title: str
    base: str
    size: int
    scale: float = 0.18215
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    schedule: Mapping[str, Any] = field(default_factory=lambda: SD_BETAS)
    prediction: str = "eps"
    consistency: Mapping[str, Any] | None = None
    grid: Mapping[str, Any] = field(default_factory=lambda: {"spacing": "karras"})
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"sampler": "dpmpp_2m", "steps": 25, "guidance": 7.5})
    text: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None


def _euler(steps: int, guidance: float) -> dict[str, Any]:
    return {"sampler": "euler", "steps": steps, "guidance": guidance}


LCM: dict[str, Any] = {"consistency": {"name": "lcm"}, "grid": {"spacing": "lcm", "initial": "unit"}}
SDXL: dict[str, Any] = {"size": 1024, "scale": 0.13025, "sampling": {"sampler": "dpmpp_2m", "steps": 30, "guidance": 7.0}}
TURBO: dict[str, Any] = {"grid": {"spacing": "turbo"}, "sampling": {"sampler": "euler_ancestral", "steps": 1, "guidance": 1.0}}
FLOW: dict[str, Any] = {"size": 1024, "schedule": {"name": "flow"}, "prediction": "flow"}
FLUX: dict[str, Any] = {**FLOW, "scale": 0.3611, "shift": 0.1159}
DEV: dict[str, Any] = {**FLUX, "grid": {"spacing": "mu_shift"}}
# Its publisher shifts times twice: those between 1 and a thousandth, and those between 1 and the shifted thousandth, evenly spaced, again.
SD3: dict[str, Any] = {**FLOW, "scale": 1.5305, "shift": 0.0609, "grid": {"spacing": "linspace", "t_end": 0.003 / 1.002, "shift": 3.0}}

FAMILIES: dict[str, Family] = {
    "sd1": Family("Stable Diffusion 1.x", "sd1", 512, table="sd1"),
    "sd2": Family("Stable Diffusion 2.x, 512 pixels", "sd2", 512),
    "sd2-v": Family("Stable Diffusion 2.x, 768 pixels", "sd2", 768, prediction="v"),
    "sd-turbo": Family("SD-Turbo", "sd2", 512, **TURBO),
    "lcm": Family("LCM of Stable Diffusion 1.x", "sd1", 512, **LCM, sampling={"sampler": "lcm", "steps": 4, "guidance": 8.0}),
    "sdxl": Family("Stable Diffusion XL", "sdxl", **SDXL, table="sdxl"),
    "sdxl-v": Family("Stable Diffusion XL with v-prediction", "sdxl", **SDXL, prediction="v", table="sdxl"),
    "sdxl-refiner": Family("Stable Diffusion XL refiner", "sdxl-refiner", **SDXL),
    "sdxl-turbo": Family("SDXL-Turbo", "sdxl", 512, 0.13025, **TURBO),
    "lcm-sdxl": Family(
        "LCM of Stable Diffusion XL", "sdxl", 1024, 0.13025, **LCM, sampling={"sampler": "lcm", "steps": 4, "guidance": 8.0}
    ),
    "playground-v2.5": Family(
        "Playground v2.5",
        "sdxl",
        1024,
        0.5,
        mean=(-1.6574, 1.886, -1.383, 2.5155),
        std=(8.4927, 5.9022, 6.5498, 5.2299),
        schedule={"name": "ve", "sigma_min": 0.002, "sigma_max": 80.0},
        prediction="edm",
        grid={"spacing": "karras", "initial": "unit"},
        sampling={"sampler": "dpmpp_2m", "steps": 30, "guidance": 3.0},
    ),
    "flux-dev": Family("FLUX.1 [dev]", "flux-dev", **DEV, sampling=_euler(28, 3.5)),
    "flux-schnell": Family(
        "FLUX.1 [schnell]", "flux-schnell", **FLUX, grid={"spacing": "linspace"}, sampling=_euler(4, 1.0), text={"length": 256}
    ),
    "flux-dedistilled": Family("FLUX.1 [dev], de-distilled", "flux-schnell", **DEV, sampling=_euler(28, 3.5)),  # guided classifier-free
    "flux-fill": Family("FLUX.1 Fill [dev]", "flux-fill", **DEV, sampling=_euler(50, 30.0)),
    "flux-canny": Family("FLUX.1 Canny [dev]", "flux-canny", **DEV, sampling=_euler(50, 30.0)),
    "flux-depth": Family("FLUX.1 Depth [dev]", "flux-canny", **DEV, sampling=_euler(30, 10.0)),
    "sd3": Family("Stable Diffusion 3 Medium", "sd3", **SD3, sampling=_euler(28, 7.0)),
    "sd3.5-medium": Family("Stable Diffusion 3.5 Medium", "sd3.5-medium", **SD3, sampling=_euler(40, 4.5)),
    "sd3.5-large": Family("Stable Diffusion 3.5 Large", "sd3.5-large", **SD3, sampling=_euler(28, 3.5)),
    "sd3.5-large-turbo": Family("Stable Diffusion 3.5 Large Turbo", "sd3.5-large", **SD3, sampling=_euler(4, 1.0)),
}


Network = UNetParams | FluxParams | SD3Params
NETWORK_NAMES = {UNetParams: "unet", FluxParams: "flux", SD3Params: "sd3"}


def base_of(params: Network) -> str:
    """The family that a network's structure is of: a base in FAMILIES."""
    if isinstance(params, FluxParams):
        beside = {0: "flux-dev", params.out_channels: "flux-canny"}.get(params.in_channels - params.out_channels, "flux-fill")
        return "flux-schnell" if params.guidance_dim is None else beside
    if isinstance(params, SD3Params):
        return "sd3.5-medium" if params.dual else "sd3.5-large" if params.qk_norm else "sd3"
    if params.vector_dim is not None:
        # The refiner's vector is a pooled text as wide as its context, and five numbers.
        return "sdxl-refiner" if params.vector_dim == (params.context_dim or 0) + 5 * recipes.NUMBER_DIM else "sdxl"
    return "sd2" if params.linear_projection else "sd1"


TOWERS = {"sd1": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g"), "sdxl-refiner": ("clip_g",)}
TOWERS |= dict.fromkeys(("flux-dev", "flux-schnell", "flux-fill", "flux-canny"), ("clip_l", "t5"))
TOWERS |= dict.fromkeys(("sd3", "sd3.5-medium", "sd3.5-large"), ("clip_l", "clip_g", "t5"))
OPTIONAL_TOWERS = {base: ("t5",) for base in TOWERS if base.startswith("sd3")}  # what else it is told is enough, but for long texts


def recipe(of: Family, towers: Mapping[str, CLIPTextParams | T5Params], **choices: Any) -> TextParams:
    """How a family uses its text towers, given by name; `choices` are what is left open there (see models.recipes)."""
    given: dict[str, Any] = {name: towers[name] for name in TOWERS[of.base] if name in towers}
    kinds: dict[str, Callable[..., TextParams]] = {
        "flux": recipes.flux,
        "sd3": recipes.sd3,
        "sdxl-refiner": recipes.refiner,
        "sdxl": recipes.sdxl,
        "sd2": recipes.sd2,
        "sd1": recipes.sd1,
    }
    return next(make for kind, make in kinds.items() if of.base.startswith(kind))(**given, **{**of.text, **choices})


def description(
    name: str, network: Network | None, vae: VAEParams | None, towers: TextParams | None, preview: TAESDParams | None = None
) -> dict[str, Any]:
    """The description, as `build` takes it, of a model of that family with these parts."""
    of = FAMILIES[name]
    spec: dict[str, Any] = {"family": name, "schedule": dict(of.schedule), "prediction": of.prediction}
    spec |= {"grid": dict(of.grid), "sampling": dict(of.sampling)}
    if of.consistency:
        spec["consistency"] = dict(of.consistency)
        if network and network.guidance_dim is None:  # one merged from an adapter is not told the scale, and guided as usual, if at all
            spec["sampling"]["guidance"] = 1.0
    if network:
        factor = vae.factor if vae else 8
        channels = vae.latent_channels if vae else min(network.out_channels, network.in_channels)
        spec |= {"network": {"name": NETWORK_NAMES[type(network)], **plain(network)}}
        spec |= {"shape": [channels, of.size // factor, of.size // factor]}
    parts = {"vae": vae, "text": towers, "preview": preview}
    return spec | {part: plain(params) for part, params in parts.items() if params is not None}


def plain(params: Any) -> dict[str, Any]:
    """A parameter dataclass as a file's metadata holds it: lists, not tuples."""
    return dict(json.loads(json.dumps(asdict(params))))
