"""Where a run's numbers and pictures go: metrics.jsonl in its folder, Weights & Biases, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffusion.messages import brief
from models.files.text import read_json_lines
from models.files.writing import replacing
from plain_diffusion.extras import extra

METRICS = "metrics.jsonl"  # in a run's folder
TENSORBOARD = "tensorboard"


class Logger(Protocol):
    """Takes the numbers of one step. It may also have show(step, path), which takes a picture."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file, none if it is missing. ValueError for a line that no run writes."""
    lines = read_json_lines(path) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if "step" not in line or not all(isinstance(value, int | float) for value in line.values()):
            raise ValueError(
                f"{path} is damaged in line {number}: it must hold numbers, and step among them, "
                f"not {brief(line)}"
            )
    return lines


class JsonLines:
    """One JSON object per line: {"step": ..., "loss": ..., ...}. ValueError for a damaged file to resume.

    A resumed run drops the lines after the step it resumes from. Numbers that are not finite are left out,
    since JSON cannot hold them.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        lines = [line for line in read_metrics(path) if line["step"] <= resumed_step] if resumed_step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(map(_json_line, lines)))
        # The last step with results of an evaluation:
        self.evaluated = max((line["step"] for line in lines if "loss" not in line), default=0)
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(_json_line({"step": step, **values}))

    def close(self) -> None:
        self._file.close()


def _json_line(values: Mapping[str, float]) -> str:
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return json.dumps(finite, allow_nan=False) + "\n"


class Progress:
    """The progress bar, speed and loggers of a run. Only the leading process shows and logs anything.

    resumed  the step at which the run begins
    """

    def __init__(
        self, folder: Path, steps: int, batch_size: int, loggers: Sequence[Logger], resumed: int, leads: bool,
        bar: bool,
    ) -> None:  # fmt: skip
        self._lines = JsonLines(folder / METRICS, resumed) if leads else None
        self._loggers = [self._lines, *loggers] if self._lines else []
        hidden = not (bar and leads)
        self._bar = tqdm(total=steps, initial=resumed, desc=folder.name, unit="step", disable=hidden)
        self._batch_size, self._steps, self._clock = batch_size, 0, time.perf_counter()

    def lacks_scores(self, step: int) -> bool:
        """Whether no evaluation of this step, at which the run begins, is logged."""
        return self._lines is not None and self._lines.evaluated < step

    def step(self) -> None:
        """Count a finished step."""
        self._steps += 1
        self._bar.update()

    def log_training(self, step: int, values: Mapping[str, float], learning_rate: float) -> None:
        """Log these values, the learning rate, and the speed since the last call."""
        speed = self._steps * self._batch_size / (time.perf_counter() - self._clock)
        self.log(step, {**values, "lr": learning_rate, "samples_per_second": speed})
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", samples_per_s=f"{speed:.0f}")
        self._steps, self._clock = 0, time.perf_counter()

    def log(self, step: int, values: Mapping[str, float] | None) -> None:
        """Pass values, if there are any, to the loggers."""
        if values:
            for logger in self._loggers:
                logger.log(step, values)

    def show(self, step: int, picture: Path | None) -> None:
        """Pass a picture, if there is one, to the loggers that take pictures."""
        for logger in self._loggers if picture else ():
            if hasattr(logger, "show"):
                logger.show(step, picture)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block, time does not count for the speed of training."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def close(self) -> None:
        """Close the bar and all loggers."""
        with ExitStack() as stack:
            stack.callback(self._bar.close)
            for logger in self._loggers:
                stack.callback(logger.close)


class WandB:
    """Weights & Biases: online if the user is logged in (or WANDB_MODE says so), else offline and silent.

    id  of the run there, which is resumed if it exists; None for a new run
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str, id: str | None = None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # imported here, as it takes seconds

        chosen = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        self._run = wandb.init(
            dir=folder, config=dict(config), project=project, name=folder.name,
            mode=None if chosen else "offline", id=id, resume="allow" if id else None,
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def show(self, step: int, picture: Path) -> None:
        import wandb

        self._run.log({"pictures": wandb.Image(str(picture))}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard's files, in tensorboard/ of the run's folder. ValueError if the package is missing."""

    def __init__(self, folder: Path) -> None:
        with extra("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._folder, self._open = folder / TENSORBOARD, SummaryWriter
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer_from(step).add_scalar(name, value, step)

    def show(self, step: int, picture: Path) -> None:
        self._writer_from(step).add_image(
            "pictures", np.asarray(Image.open(picture).convert("RGB")), step, dataformats="HWC"
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _writer_from(self, step: int) -> Any:
        """The writer, opened at its first step: TensorBoard hides what earlier ones wrote from there on."""
        if self._writer is None:
            self._writer = self._open(str(self._folder), purge_step=step)
        return self._writer
