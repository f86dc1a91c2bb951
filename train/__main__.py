"""plain-diffusion train experiment=digits_unet [key=value ...]: `plain-diffusion train --help` lists all
settings."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

import models
from configs import command_line
from configs.sweep import STOPPED
from diffusion.spec import check_type
from models.files.text import read_json
from models.layouts import native
from plain_diffusion.starting import started
from train.export import find_export, load_options
from train.run import run


def main(config: dict[str, Any]) -> int:
    evaluate = instantiate(config["evaluate"], _convert_="all") if config.get("evaluate") else None
    if evaluate is not None and not callable(evaluate):
        raise ValueError(
            f"evaluate must be made by a _target_ and be called with a model, which {evaluate!r} cannot"
        )
    check_type("run", config.get("run", ""), str)
    finished, folder = run(config, evaluate), Path(config["run"])
    if os.environ.get("RANK", "0") == "0":
        if finished:
            print(
                f"trained: {find_export(folder) or folder}   sample it: plain-diffusion samplers "
                f"{_source(folder)}"
            )
        else:
            saved = (
                "stopped and saved"
                if (folder / native.FILE_NAME).exists()
                else "stopped before the first step"
            )
            print(f"{saved}: {folder}   go on: {_command()} resume=true", file=sys.stderr)
    return 0 if finished else STOPPED


def _source(folder: Path) -> str:
    """What a finished run is sampled from: the model in it, with what its files do not tell, or the run
    itself."""
    if not (place := find_export(folder)):
        own = (
            read_json(folder / "config.json")["model"].get("network", {}).get("name", "")
            not in models.NETWORKS
        )
        return f"run={shlex.quote(str(folder))}{' trust=true' * own}"
    options = load_options(models.load(folder), place)
    return " ".join(
        [
            f"weights={shlex.quote(str(place))}",
            *(f"{name}={value}" for name, value in options.items()),
            "prompt=...",
        ]
    )


def _command() -> str:
    """This command line, ready to paste, without its `resume`."""
    processes = os.environ.get("WORLD_SIZE", "1")
    program = (
        "plain-diffusion train"
        if processes == "1"
        else f"torchrun --nproc-per-node {processes} -m plain_diffusion train"
    )
    return (
        f"{program} {shlex.join(argument for argument in sys.argv[1:] if not argument.startswith('resume='))}"
    )


if __name__ == "__main__":
    started()
    command_line("train", main)
