"""Where a run's numbers go: metrics.jsonl in its folder, and Weights & Biases."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from models.files import read_json_lines, replacing


class Logger(Protocol):
    """Takes the numbers of one step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line, {"step": ..., "loss": ..., ...}. A resumed run drops the lines after the step it resumes from."""

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        kept = [line for line in read_json_lines(path) if line["step"] <= resumed_step] if path.exists() and resumed_step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class WandB:
    """Weights & Biases: online where the user is logged in (or WANDB_MODE says so), offline and silent otherwise."""

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # here, because it takes seconds that a run without it need not pay

        decided = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        self._run = wandb.init(dir=folder, config=dict(config), project=project, name=folder.name, mode=None if decided else "offline")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
