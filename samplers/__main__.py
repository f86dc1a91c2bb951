"""python -m samplers run=FOLDER [key=value ...]: see configs/samplers."""

from __future__ import annotations

from typing import Any

from configs import command_line
from samplers.run import folder, run


def main(config: dict[str, Any]) -> int:
    paths = run(config)
    out = folder(config)
    print(f"{len(paths)} images in {out / 'images'}, all in {out / 'grid.png'}")
    return 0


if __name__ == "__main__":
    command_line("samplers", main)
