"""python -m samplers run=FOLDER [key=value ...]: see configs/samplers."""

from __future__ import annotations

from typing import Any

from configs import command_line
from samplers.run import SHOWN, run


def main(config: dict[str, Any]) -> int:
    out, n = run(config), config["n"]
    print(f"{n} images in {out / 'images'}, {'all' if n <= SHOWN else f'the first {SHOWN}'} in {out / 'grid.png'}")
    return 0


if __name__ == "__main__":
    command_line("samplers", main)
