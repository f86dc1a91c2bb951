"""plain-diffusion samplers run=FOLDER | weights=FILE prompt=TEXT | from=IMAGE [key=value ...]"""

from __future__ import annotations

from typing import Any

from configs import command_line
from plain_diffusion.starting import started
from samplers.modes import draw_config
from samplers.results import SHOWN


def main(config: dict[str, Any]) -> int:
    (out, images), comparison = draw_config(config)
    if len(images) == 1:
        print(f"{images[0]}" + (f"   {comparison}" if comparison else ""))
    else:
        together = "all" if len(images) <= SHOWN else f"the first {SHOWN}"
        print(f"{len(images)} images in {out / 'images'}, {together} in {out / 'grid.png'}")
    return 0


if __name__ == "__main__":
    started()
    command_line("samplers", main)
