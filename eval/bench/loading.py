"""Opening a published single file, side by side with diffusers. `python -m eval experiment=bench_loading`.

Each load has a process of its own, which has imported what it needs before the clock starts: `python -m eval.bench.loading SIDE ...`.
The file lies in the system's page cache, so that neither side waits for the disk.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import models
from diffusion.spec import check_at_least_one, lookup, make_params
from eval.bench.memory import peak_resident
from eval.bench.record import DTYPES, write_bench
from models.families import ARCHITECTURES
from models.layouts.diffusers_folder import write_configs
from plain_diffusion.extras import extra
from plain_diffusion.packages import ROOT

DEFAULT = "default"  # neither side is told a dtype: ours is then the file's own, diffusers' float32


@dataclass(frozen=True)
class BenchParams:
    """What to time: see configs/eval/experiment/bench_loading.yaml."""

    out: str
    family: str = "sdxl"
    stored: str = "fp16"
    dtypes: tuple[str, ...] = (DEFAULT, "fp16")
    miniature: bool = False
    rounds: int = 3
    folder: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "rounds")
        lookup("family with a pipeline of diffusers'", self.family, ARCHITECTURES)
        lookup("dtype", self.stored, DTYPES)
        for dtype in self.dtypes:
            lookup("dtype", dtype, {**DTYPES, DEFAULT: None})


@dataclass(frozen=True)
class Timing:
    """Seconds, medians over rounds, and the medians of the rounds' ratios (theirs over ours: above 1 where ours is quicker).

    ours, theirs                to open the file
    touched, theirs_touched     the same and to read every weight once, for what is memory-mapped may not have been read before
    memory, theirs_memory       bytes resident at the peak of both, beyond those before; NaN where the system does not tell
    """

    dtype: str
    ours: float
    theirs: float
    speedup: float
    touched: float
    theirs_touched: float
    speedup_touched: float
    memory: float
    theirs_memory: float


def run(config: Mapping[str, Any]) -> list[Timing]:
    """Write a file of random weights, time both sides in turn, round after round, and write out/bench.json and out/bench.md."""
    params = make_params("", BenchParams, {key: value for key, value in config.items() if key != "program"})
    _require_diffusers()
    with tempfile.TemporaryDirectory(dir=params.folder) as folder:
        _process("make", folder, params.family, params.stored, str(params.miniature))
        timings = [_timed(params, dtype, Path(folder)) for dtype in params.dtypes]
        size = (Path(folder) / "model.safetensors").stat().st_size
    write_bench(Path(params.out), timings, table(timings), bytes=size, settings=asdict(params))
    return timings


def table(timings: Sequence[Timing]) -> str:
    """A Markdown table, one row per dtype."""
    rows = []
    for t in timings:
        seconds = f"{t.ours:.2f} | {t.theirs:.2f} | {t.speedup:.1f} | {t.touched:.2f} | {t.theirs_touched:.2f} | {t.speedup_touched:.1f}"
        rows.append(f"| {t.dtype} | {seconds} | {t.memory / 1e9:.2f} | {t.theirs_memory / 1e9:.2f} |")
    head = "| dtype | s to open | diffusers | times as fast | and read once | diffusers | times as fast | GB | diffusers |\n"
    return head + "|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _timed(params: BenchParams, dtype: str, folder: Path) -> Timing:
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in tqdm(range(params.rounds), desc=f"timing {dtype}", disable=not params.progress):
        sides = []
        for side in ("ours", "theirs"):
            _into_page_cache(folder / "model.safetensors")
            sides.append(json.loads(_process(side, str(folder), params.family, dtype)))
        rounds.append((sides[0], sides[1]))

    def median(value: Callable[[dict[str, float], dict[str, float]], float]) -> float:
        return statistics.median(value(ours, theirs) for ours, theirs in rounds)

    return Timing(
        dtype,
        ours=median(lambda a, b: a["opened"]),
        theirs=median(lambda a, b: b["opened"]),
        speedup=median(lambda a, b: b["opened"] / a["opened"]),
        touched=median(lambda a, b: a["touched"]),
        theirs_touched=median(lambda a, b: b["touched"]),
        speedup_touched=median(lambda a, b: b["touched"] / a["touched"]),
        memory=median(lambda a, b: a["memory"]),
        theirs_memory=median(lambda a, b: b["memory"]),
    )


def _process(*arguments: str) -> str:
    """What a fresh process of this module prints. ValueError with its last line of errors where it fails."""
    done = subprocess.run([sys.executable, "-m", "eval.bench.loading", *arguments], capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise ValueError(f"{arguments[0]}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'the process was ended'}")
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's own, with the library to be found from any folder, and no network."""
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def _into_page_cache(file: Path) -> None:
    buffer = bytearray(1 << 24)
    with open(file, "rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def _require_diffusers() -> Any:
    with extra("bench"):
        import diffusers
    diffusers.logging.set_verbosity_error()
    return diffusers


# In a process of its own -----------------------------------------------------------------------------------------------


def make(folder: str, family: str, dtype: str, miniature: str) -> None:
    """model.safetensors with random weights, and beside it the configurations that diffusers wants."""
    if miniature == "True":
        model = models.miniature(family).to(dtype=DTYPES[dtype])
    else:
        model = models.published(family)
        for part in model.parts.values():
            part.to(DTYPES[dtype]).to_empty(device="cpu")
            for p in part.parameters():
                p.data.uniform_(-0.02, 0.02)
    models.save(model, Path(folder) / "model.safetensors", layout="ldm")
    write_configs(model, Path(folder) / "configs")


def ours(folder: str, family: str, dtype: str) -> None:
    _measure(lambda: list(models.load(Path(folder) / "model.safetensors", dtype=DTYPES.get(dtype)).parts.values()))


def theirs(folder: str, family: str, dtype: str) -> None:
    pipeline = getattr(_require_diffusers(), ARCHITECTURES[family].pipelines[None])
    options = {"config": str(Path(folder) / "configs"), "local_files_only": True}
    if dtype != DEFAULT:
        options["torch_dtype"] = DTYPES[dtype]

    def load() -> list[nn.Module]:
        parts = pipeline.from_single_file(str(Path(folder) / "model.safetensors"), **options).components.values()
        return [part for part in parts if isinstance(part, nn.Module)]

    _measure(load)


@torch.no_grad()
def _measure(load: Callable[[], list[nn.Module]]) -> None:
    """Print seconds to load, seconds to load and read every weight once, and the peak of resident memory."""
    torch.ones(2).aminmax()  # threads are there before the clock starts
    seconds: dict[str, float] = {}

    def timed() -> list[nn.Module]:
        start = time.perf_counter()
        parts = load()
        seconds["opened"] = time.perf_counter() - start
        for part in parts:
            for p in part.parameters():
                p.aminmax()
        seconds["touched"] = time.perf_counter() - start
        return parts

    print(json.dumps({"memory": peak_resident(timed), **seconds}))


SIDES: dict[str, Callable[..., None]] = {"make": make, "ours": ours, "theirs": theirs}

if __name__ == "__main__":
    SIDES[sys.argv[1]](*sys.argv[2:])
