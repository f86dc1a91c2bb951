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
from models.files.text import read_json_lines
from models.files.writing import replacing

METRICS = "metrics.jsonl"  # in a run's folder


class Logger(Protocol):
    """Takes the numbers of one step. It may have show(step, path), which takes a picture."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def read_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a run that is to be resumed, none where there is no file. ValueError where one cannot be
    of a run."""
    found = read_json_lines(path) if path.exists() else []
    for number, line in enumerate(found, 1):
        if "step" not in line or not all(isinstance(value, int | float) for value in line.values()):
            raise ValueError(
                f"{path} is damaged in line {number}: it must hold numbers, and step among them, not "
                f"{brief(line)}"
            )
    return found


class JsonLines:
    """One JSON object per line, {"step": ..., "loss": ..., ...}. A resumed run drops the lines after the step
    it resumes from.

    Numbers that are not finite are left out, since JSON cannot hold them. ValueError if a file to be resumed
    holds other lines.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= resumed_step] if resumed_step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(_line(line) for line in kept))
        self.scored = max(
            (line["step"] for line in kept if "loss" not in line), default=0
        )  # the last step with results of an evaluation
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_line({"step": step, **values}))

    def close(self) -> None:
        self._file.close()


class Progress:
    """A run's progress bar and loggers, in the leading process only, and its speed.

    resumed  the step at which the run begins
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        batch_size: int,
        loggers: Sequence[Logger],
        resumed: int,
        leads: bool,
        shown: bool,
    ) -> None:
        self._lines = JsonLines(folder / METRICS, resumed) if leads else None
        self._loggers = [self._lines, *loggers] if self._lines else []
        self._bar = tqdm(
            total=steps, initial=resumed, desc=folder.name, unit="step", disable=not (shown and leads)
        )
        self._batch_size, self._steps, self._clock = batch_size, 0, time.perf_counter()

    def lacks_scores(self, step: int) -> bool:
        """Whether the step at which the run begins has no logged evaluation."""
        return self._lines is not None and self._lines.scored < step

    def step(self) -> None:
        """Count a finished step."""
        self._steps += 1
        self._bar.update()

    def log(self, step: int, values: Mapping[str, float], learning_rate: float) -> None:
        """Log these values, the learning rate, and the speed since the last call."""
        speed = self._steps * self._batch_size / (time.perf_counter() - self._clock)
        self._write(step, {**values, "lr": learning_rate, "samples_per_second": speed})
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", samples_per_s=f"{speed:.0f}")
        self._steps, self._clock = 0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block, time does not count for the speed of training."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def log_scores(self, step: int, found: Mapping[str, float] | None) -> None:
        """Log the results of an evaluation, if there are any."""
        if found:
            self._write(step, found)

    def show(self, step: int, picture: Path | None) -> None:
        """Pass a picture, if there is one, to the loggers that take some."""
        for logger in self._loggers if picture else ():
            if hasattr(logger, "show"):
                logger.show(step, picture)

    def close(self) -> None:
        """Close the bar and all loggers."""
        with ExitStack() as closing:
            closing.callback(self._bar.close)
            for logger in self._loggers:
                closing.callback(logger.close)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, values)


def _line(values: Mapping[str, float]) -> str:
    return (
        json.dumps({name: value for name, value in values.items() if math.isfinite(value)}, allow_nan=False)
        + "\n"
    )


class WandB:
    """Weights & Biases: online where the user is logged in (or WANDB_MODE says so), offline and silent
    otherwise.

    id  of the run there, which is resumed if it exists; None for a new run
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str, id: str | None = None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # imported here, as it takes seconds

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

    def show(self, step: int, picture: Path) -> None:
        import wandb

        self._run.log({"pictures": wandb.Image(str(picture))}, step=step)

    def close(self) -> None:
        self._run.finish()
