"""python -m eval samples=FOLDER, or python -m eval experiment=quickstart: see configs/eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import command_line
from diffusion.spec import lookup
from eval import folder, quickstart


def main(config: dict[str, Any]) -> int:
    return lookup("program", config["program"], {"score": _score, "quickstart": _quickstart})(config)


def _score(config: dict[str, Any]) -> int:
    for name, value in folder.run(config).items():
        print(f"{name:14s} {value:.4g}")
    return 0


def _quickstart(config: dict[str, Any]) -> int:
    met = quickstart.run(config)
    print(f"{'every target met' if met else 'targets missed, see the report'}\nreport: {(Path(config['out']) / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    command_line("eval", main)
