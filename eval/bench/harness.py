"""What benchmarks share: timing in alternation, separate processes, memory, and the files written.

A benchmark is a module here with `Params`, a `BenchParams`; `Timing`, a dataclass of a row, whose fields are
columns (`column`); and `measure(params) -> (rows, facts)`, which imports the library to compare with.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from diffusion.settings import setting
from diffusion.spec import check_at_least_one, make_params
from models.files.text import write_json
from models.files.writing import replacing
from models.layers.streaming import resident_bytes
from plain_diffusion.packages import ROOT
from samplers.provenance import provenance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX = 2048  # rows and columns of the plain product that rates of arithmetic are compared with
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class BenchParams:
    """The settings that all benchmarks share."""

    rounds: int = setting(5, "each times both sides once; medians are kept", kind="place")
    out: str = setting(..., "the folder of bench.md and bench.json", kind="place", text="path")
    progress: bool = setting(True, "false: no bar", kind="place")

    def __post_init__(self) -> None:
        check_at_least_one(self, "rounds")


def run(config: Mapping[str, Any]) -> list[Any]:
    """Run the benchmark that config["program"] names, and write bench.json and bench.md; the rows."""
    bench = import_module(f"eval.bench.{config['program'].removeprefix('bench_')}")
    params = make_params("", bench.Params, {key: value for key, value in config.items() if key != "program"})
    rows, facts = bench.measure(params)
    write(Path(params.out), "bench", rows, table(rows), **facts, settings=asdict(params))
    return list(rows)


def write(out: Path, name: str, rows: Sequence[Any], text: str, **more: Any) -> None:
    """Write out/NAME.json (rows, which are dataclasses, `more` and provenance) and out/NAME.md (the text)."""
    write_json(out / f"{name}.json", {"rows": [asdict(row) for row in rows], **more, "facts": provenance()})
    with replacing(out / f"{name}.md") as temporary:
        temporary.write_text(text)


def column(heading: str, form: str | Callable[[Any], str] = "") -> Any:
    """A field of a row that is a column of the table, with its heading and format."""
    formatted = form if callable(form) else lambda value: f"{value:{form}}"
    return field(metadata={"heading": heading, "form": formatted})


def gigabytes(value: float) -> str:
    """Bytes as GB, with two decimals."""
    return f"{value / 1e9:.2f}"


def table(rows: Sequence[Any]) -> str:
    """A Markdown table of rows of one dataclass."""
    columns = [each for each in fields(rows[0]) if each.metadata]
    cells = [[each.metadata["form"](getattr(row, each.name)) for each in columns] for row in rows]
    return markdown_table([each.metadata["heading"] for each in columns], cells)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (headings, *rows))
    return "\n".join([head, f"|{'---|' * len(headings)}", *lines]) + "\n"


# Time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """Seconds, or another measure, of each side in each round: times[round][side]."""

    times: Sequence[Sequence[float]]

    def median(self, side: int) -> float:
        """Median over rounds."""
        return statistics.median(row[side] for row in self.times)

    def ratio(self, side: int, other: int) -> float:
        """Median of the rounds' ratios side / other: a disturbance in a round affects both sides."""
        return statistics.median(row[side] / row[other] for row in self.times)


def alternate(clocks: Sequence[Callable[[], float]], rounds: int, warm: bool = False) -> Rounds:
    """Measure A B A B ..., where each call returns its time, after a round to warm up unless all are warm."""
    for clock in () if warm else clocks:
        clock()
    return Rounds([[clock() for clock in clocks] for _ in range(rounds)])


def timed(call: Callable[[], object], device: torch.device | None = None) -> Callable[[], float]:
    """A function that returns the seconds a call takes; on a GPU, until it has finished."""

    def wait() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    def clock() -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    return clock


def product(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A product of two MATRIX x MATRIX matrices, which is about as fast as the machine can compute."""
    matrix = torch.randn(MATRIX, MATRIX, device=device).to(dtype)
    return lambda: matrix @ matrix


# Processes and memory ---------------------------------------------------------------------------------------


def process(module: str, *arguments: str) -> str:
    """The output of `python -m eval.bench.MODULE arguments`, offline. ValueError with its last error line."""
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))  # found from any folder
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", f"eval.bench.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        *_, last = ("the process was killed", *done.stderr.strip().splitlines())
        raise ValueError(f"{arguments[0]}: {last}")
    return done.stdout


def release_memory() -> None:
    """Collect garbage and return freed memory to the system, which the C library would keep."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def peak_resident(call: Callable[[], object]) -> float:
    """Peak of resident bytes during a call minus those before it; NaN where the system does not tell."""
    if not RESET.exists():
        return math.nan
    release_memory()
    RESET.write_text("5")  # the peak starts anew
    before = resident_bytes()
    call()
    peak = next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return float(1024 * peak - before)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Peak bytes of a call's second run beyond those held before; NaN where the system does not tell."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - before)
    return peak_resident(call) if device.type == "cpu" else math.nan
