"""python -m samplers run=FOLDER [key=value ...]: see configs/samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import command_line
from samplers.run import run


def main(config: dict[str, Any]) -> int:
    paths = run(config)
    out = Path(config["out"] or Path(config["run"]) / "samples")
    print(f"{len(paths)} images in {out / 'images'}, all in {out / 'grid.png'}")
    return 0


if __name__ == "__main__":
    command_line("samplers", main)
