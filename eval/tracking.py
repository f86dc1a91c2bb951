"""Results in Weights & Biases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from eval.results import Result
from train.logbook import WandB


def log_result(result: Result, project: str, path: str | Path) -> None:
    """Log a run of that project: each figure as NAME, NAME_low and NAME_high, the sheet, settings and bases.

    path  of the result's JSON: the sheet is the PNG of the same name, and offline data go into such a folder

    Online only if the user is logged in or WANDB_MODE says so, otherwise offline and silent. NaN is left out.
    """
    path = Path(path)
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    content = result.to_json()
    config = {
        **result.settings,
        "result": result.name,
        "fingerprint": {
            "samples": content["samples"],
            "facts": content["facts"],
            **{name: figure["basis"] for name, figure in content["figures"].items()},
        },
    }
    run = WandB(folder, config, project)
    try:
        run.log(0, _values(result, path.with_suffix(".png")))
    finally:
        run.close()


def _values(result: Result, sheet: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, figure in result.figures.items():
        numbers = {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        values |= {key: value for key, value in numbers.items() if math.isfinite(value)}
    if sheet.exists():
        import wandb  # takes seconds

        values["samples"] = wandb.Image(str(sheet), caption=result.name)
    return values
