"""plain-diffusion train experiment=digits_unet [key=value ...]. --help lists all settings."""

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
        raise ValueError(f"evaluate must be a _target_ that is called with a model, not {evaluate!r}")
    check_type("run", config.get("run", ""), str)
    finished, folder = run(config, evaluate), Path(config["run"])
    if os.environ.get("RANK", "0") == "0":
        if finished:
            trained = find_export(folder) or folder
            print(f"trained: {trained}   sample it: plain-diffusion samplers {_sampling_settings(folder)}")
        else:
            saved = (folder / native.FILE_NAME).exists()
            done = "stopped and saved" if saved else "stopped before the first step"
            print(f"{done}: {folder}   go on: {_command()} resume=true", file=sys.stderr)
    return 0 if finished else STOPPED


def _sampling_settings(folder: Path) -> str:
    """The settings with which `plain-diffusion samplers` samples a finished run."""
    if path := find_export(folder):
        options = load_options(models.load(folder), path)
        settings = [f"{name}={value}" for name, value in options.items()]
        return " ".join([f"weights={shlex.quote(str(path))}", *settings, "prompt=..."])
    network = read_json(folder / "config.json")["model"].get("network", {}).get("name", "")
    return f"run={shlex.quote(str(folder))}{' trust=true' * (network not in models.NETWORKS)}"


def _command() -> str:
    """This command line, ready to paste, without its `resume`."""
    arguments = shlex.join(argument for argument in sys.argv[1:] if not argument.startswith("resume="))
    if (processes := os.environ.get("WORLD_SIZE", "1")) == "1":
        return f"plain-diffusion train {arguments}"
    return f"torchrun --nproc-per-node {processes} -m plain_diffusion train {arguments}"


if __name__ == "__main__":
    started()
    command_line("train", main)
