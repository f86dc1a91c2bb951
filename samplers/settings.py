"""The settings that drawing from a run and from published weights share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion.noise import check_seed
from diffusion.settings import of_kind, setting
from diffusion.spec import check_at_least_one, check_names
from samplers.guide import GuideParams


@dataclass(frozen=True)
class GridSettings:
    """Members of `grid`: settings of `time_grid`. A spacing's own options are added."""

    spacing: str | list[float] | None = setting(
        None,
        "linspace, trailing, karras, ... (--help spacing), or a list of times; add a spacing's own options: "
        "+grid.rho=5",
    )
    t_start: float | None = setting(None, "the noisiest time; null: the schedule's")
    t_end: float | None = setting(None, "the last time above data; null: the schedule's")
    shift: float | None = setting(None, "multiplies sigma/alpha (Stable Diffusion 3: 3); null: 1")


@dataclass(frozen=True, kw_only=True)
class DrawParams:
    """What both ways of drawing share. None stands for the model's default."""

    n: int = setting(1, "number of images", kind="count", heading="How many, and how")
    seed: int = setting(0, "of the first image; the others count up from it")
    ema: bool = setting(True, "false: raw weights instead of averaged ones")
    sampler: str | None = setting(
        None, "ddim, dpmpp_2m, heun, ... (--help sampler); null: the model's own, else ddim"
    )
    steps: int | None = setting(None, "null: the model's own, else 50, or 2 of a distilled model")
    grid: dict[str, Any] = setting(
        dict,
        "the time grid; all null: the model's, which any value here replaces",
        members=GridSettings,
    )
    guidance: float | None = setting(None, "guidance scale; 1 is off; null: the family's, off for a run")
    guide: dict[str, Any] = setting(
        dict, "how guidance works; all null: uncond + guidance * (cond - uncond)", members=GuideParams
    )
    options: dict[str, Any] = setting(dict, "the sampler's own, e.g. +options.eta=0.5")
    out: str | None = setting(
        None,
        "folder of the images; null: samples/SAMPLER-STEPS in the run's folder, or samples/PROMPT-... here",
        kind="place",
        text="path",
        heading="Output and device",
    )
    batch_size: int = setting(4, "images at once; null: 4 of a prompt, 500 of a run", kind="count")
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps; null: a GPU if there is one", kind="rounding")
    compile: bool = setting(
        False,
        "true: compile the network's blocks first, for a minute or so; changes images by rounding only",
        kind="rounding",
    )
    progress: bool = setting(True, "false: no progress bar", kind="place")
    sha256: dict[str, str] = setting(dict, "required SHA-256 of the files that run, weights, image, ... name")

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "batch_size")
        check_seed(self.seed, self.n)
        check_names("file that has a SHA-256", self.sha256, of_kind(type(self), "weights", "picture"))
