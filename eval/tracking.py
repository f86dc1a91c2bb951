"""Results in Weights & Biases, beside the training runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from eval.results import Result
from train.logbook import WandB


def log_result(result: Result, project: str, path: str | Path) -> None:
    """One run of that project: each figure as numbers NAME, NAME_low and NAME_high, the sheet, and settings
    and fingerprints as config.

    path  of the result's JSON: the sheet is the PNG of the same name beside it, and what is kept offline goes
          into a folder of that name

    Online only where the user is logged in or WANDB_MODE says so, offline and silent otherwise. What is NaN
    is left out.
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
        import wandb  # here, because it takes seconds that a program without it need not pay

        values["samples"] = wandb.Image(str(sheet), caption=result.name)
    return values
