"""python -m train experiment=digits_unet [key=value ...]: see configs/train."""

from __future__ import annotations

import sys
from typing import Any

from hydra.utils import instantiate

from configs import command_line
from train.run import run


def main(config: dict[str, Any]) -> int:
    evaluate = instantiate(config["evaluate"]) if config.get("evaluate") else None
    if run(config, evaluate):
        print(f"trained: {config['run']}   sample it: python -m samplers run={config['run']}")
        return 0
    print(f"stopped and saved: {config['run']}   go on: python -m train {' '.join(_without_resume())} resume=true", file=sys.stderr)
    return 130


def _without_resume() -> list[str]:
    return [argument for argument in sys.argv[1:] if not argument.startswith("resume=")]


if __name__ == "__main__":
    command_line("train", main)
