"""Where a run's numbers go: metrics.jsonl in its folder, and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from diffusion.messages import brief
from models.files import read_json_lines, replacing

METRICS = "metrics.jsonl"  # in a run's folder


class Logger(Protocol):
    """Takes the numbers of one step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line, {"step": ..., "loss": ..., ...}. A resumed run drops the lines after the step it resumes from.

    Numbers that are not finite are left out: JSON has no word for them. ValueError for a file to be resumed that holds other lines.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        earlier = read_json_lines(path) if path.exists() and resumed_step else []
        for number, line in enumerate(earlier, 1):
            if "step" not in line or not all(isinstance(value, int | float) for value in line.values()):
                raise ValueError(f"{path} is damaged in line {number}: it must hold numbers, and step among them, not {brief(line)}")
        kept = [line for line in earlier if line["step"] <= resumed_step]
        with replacing(path) as temporary:
            temporary.write_text("".join(_line(line) for line in kept))
        self.scored = max((line["step"] for line in kept if "loss" not in line), default=0)  # the last step with numbers of an evaluation
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_line({"step": step, **values}))

    def close(self) -> None:
        self._file.close()


class Progress:
    """A run's bar and loggers, and its speed; only the leading process has the first two.

    resumed  the step that it begins with
    """

    def __init__(
        self, folder: Path, steps: int, batch_size: int, loggers: Sequence[Logger], resumed: int, leads: bool, shown: bool
    ) -> None:
        self._lines = JsonLines(folder / METRICS, resumed) if leads else None
        self._loggers = [self._lines, *loggers] if self._lines else []
        self._bar = tqdm(total=steps, initial=resumed, desc=folder.name, unit="step", disable=not (shown and leads))
        self._batch_size, self._steps, self._clock = batch_size, 0, time.perf_counter()

    def lacks_scores(self, step: int) -> bool:
        """Whether no evaluation is logged of the step that the run begins with."""
        return self._lines is not None and self._lines.scored < step

    def step(self) -> None:
        """One more is done."""
        self._steps += 1
        self._bar.update()

    def log(self, step: int, values: Mapping[str, float], learning_rate: float) -> None:
        """A line of training: these values, the learning rate, and the speed since the last one."""
        speed = self._steps * self._batch_size / (time.perf_counter() - self._clock)
        self._write(step, {**values, "lr": learning_rate, "samples_per_second": speed})
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", samples_per_s=f"{speed:.0f}")
        self._steps, self._clock = 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within the block is not training, and does not count for its speed."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def log_scores(self, step: int, found: Mapping[str, float] | None) -> None:
        """A line of an evaluation, if there is one."""
        if found:
            self._write(step, found)

    def close(self) -> None:
        """The bar and all loggers."""
        with ExitStack() as closing:
            closing.callback(self._bar.close)
            for logger in self._loggers:
                closing.callback(logger.close)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, values)


def _line(values: Mapping[str, float]) -> str:
    return json.dumps({name: value for name, value in values.items() if math.isfinite(value)}, allow_nan=False) + "\n"


class WandB:
    """Weights & Biases: online where the user is logged in (or WANDB_MODE says so), offline and silent otherwise.

    id  of the run there, which one that has it already goes on with; None for a new run
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str, id: str | None = None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # here, because it takes seconds that a run without it need not pay

        decided = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        self._run = wandb.init(
            dir=folder,
            config=dict(config),
            project=project,
            name=folder.name,
            mode=None if decided else "offline",
            id=id,
            resume="allow" if id else None,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
