"""What benchmarks share: both sides timed in turn, round after round, processes and memory of their own, and
what is written.

A benchmark is a module here with `Params`, settings that derive from `BenchParams`; `Timing`, a dataclass of
a row, whose fields are columns (`column`); and `measure(params) -> (rows, facts)`, which imports the library
to compare with.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
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
    """Measure what the configuration's program names, and write out/bench.json and out/bench.md; the rows."""
    bench = import_module(f"eval.bench.{config['program'].removeprefix('bench_')}")
    params = make_params("", bench.Params, {key: value for key, value in config.items() if key != "program"})
    rows, facts = bench.measure(params)
    write(Path(params.out), "bench", rows, table(rows), **facts, settings=asdict(params))
    return list(rows)


def write(out: Path, name: str, rows: Sequence[Any], markdown: str, **more: Any) -> None:
    """out/NAME.json, the rows, which are dataclasses, with more facts and provenance; and out/NAME.md, the
    table of them."""
    write_json(out / f"{name}.json", {"rows": [asdict(row) for row in rows], **more, "facts": provenance()})
    with replacing(out / f"{name}.md") as temporary:
        temporary.write_text(markdown)


def column(heading: str, form: str | Callable[[Any], str] = "") -> Any:
    """A field of a row that the table shows, under this heading, in this format."""
    return field(
        metadata={"heading": heading, "form": form if callable(form) else lambda value: f"{value:{form}}"}
    )


def gigabytes(value: float) -> str:
    """Bytes, to 10 MB."""
    return f"{value / 1e9:.2f}"


def table(rows: Sequence[Any]) -> str:
    """A Markdown table of rows of one kind."""
    shown = [each for each in fields(rows[0]) if each.metadata]
    head, *lines = (
        [each.metadata["heading"] for each in shown],
        *([_cell(row, each) for each in shown] for row in rows),
    )
    return "\n".join([_line(head), f"|{'---|' * len(shown)}", *map(_line, lines)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Any, each: Field[Any]) -> str:
    return str(each.metadata["form"](getattr(row, each.name)))


# Time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """What each side took in each round."""

    times: Sequence[Sequence[float]]

    def median(self, side: int) -> float:
        """Of a side."""
        return statistics.median(row[side] for row in self.times)

    def ratio(self, side: int, other: int) -> float:
        """The median of the rounds' ratios of two sides: what disturbs a round disturbs both."""
        return statistics.median(row[side] / row[other] for row in self.times)


def in_turn(clocks: Sequence[Callable[[], float]], rounds: int, warm: bool = False) -> Rounds:
    """Sides A B A B ..., each of which says what it took. warm: they are warm already, and no first round is
    thrown away."""
    for clock in () if warm else clocks:
        clock()
    return Rounds([[clock() for clock in clocks] for _ in range(rounds)])


def timed(call: Callable[[], object], device: torch.device | None = None) -> Callable[[], float]:
    """What says how many seconds a call takes by the wall clock; on a GPU, until it has finished."""

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
    """A plain product of MATRIX x MATRIX matrices, whose rate of arithmetic is near the machine's own."""
    matrix = torch.randn(MATRIX, MATRIX, device=device).to(dtype)
    return lambda: matrix @ matrix


# Processes and memory ---------------------------------------------------------------------------------------


def process(module: str, *arguments: str) -> str:
    """What `python -m eval.bench.MODULE arguments` prints, without a network. ValueError with its last line
    of errors where it fails."""
    path = os.pathsep.join(
        filter(None, [ROOT, os.environ.get("PYTHONPATH")])
    )  # the library is found from any folder
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", f"eval.bench.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(
            f"{arguments[0]}: "
            f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'the process was ended'}"
        )
    return done.stdout


def give_back() -> None:
    """Collect what nothing refers to, and let the system have it: the C library keeps freed memory for the
    next time."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def peak_resident(call: Callable[[], object]) -> float:
    """Bytes in memory at most during the call, beyond those before it; NaN where the system does not tell."""
    if not RESET.exists():
        return math.nan
    give_back()
    RESET.write_text("5")  # the peak starts anew
    before = resident_bytes()
    call()
    peak = next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return float(1024 * peak - before)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Bytes a call needs at its peak beyond those held before it, from its second run; NaN where the system
    does not tell."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - before)
    return peak_resident(call) if device.type == "cpu" else math.nan
