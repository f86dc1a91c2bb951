"""Opening a published single file, against diffusers (experiment=bench_loading).

Each load has its own process, which imports everything before the clock starts: `python -m eval.bench.loading
SIDE ...`. The file is in the system's page cache, so that neither side waits for the disk.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import models
from diffusion.settings import setting
from diffusion.spec import lookup
from eval.bench.harness import DTYPES, BenchParams, Rounds, column, gigabytes, peak_resident, process
from models.families import ARCHITECTURES
from models.layouts.diffusers_folder import write_configs
from plain_diffusion.extras import extra

DEFAULT = "default"  # no dtype is asked for


@dataclass(frozen=True, kw_only=True)
class Params(BenchParams):
    """What to time."""

    family: str = setting(
        "sdxl", "whose file is written, at its published size: 7 GB of disk and of memory for sdxl in fp16"
    )
    stored: str = setting("fp16", "the dtype in the file: fp32, bf16 or fp16")
    dtypes: tuple[str, ...] = setting(
        (DEFAULT, "fp16"),
        "to load it in. default: no dtype is asked for; ours is then the file's, diffusers' float32",
    )
    miniature: bool = setting(False, "true: a tiny model, to see that the benchmark runs")
    folder: str | None = setting(
        None,
        "for the file while it is needed; null: the system's temporary folder",
        kind="place",
        text="path",
    )
    rounds: int = setting(
        3, "each loads once on either side, in fresh processes; medians are kept", kind="place"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup("family with a pipeline of diffusers'", self.family, ARCHITECTURES)
        lookup("dtype", self.stored, DTYPES)
        for dtype in self.dtypes:
            lookup("dtype", dtype, {**DTYPES, DEFAULT: None})


@dataclass(frozen=True)
class Timing:
    """Seconds, medians over rounds, and medians of the rounds' ratios theirs / ours.

    ours, theirs             to open the file
    touched, theirs_touched  to open it and read every weight once, since it may be memory-mapped
    memory, theirs_memory    peak of resident bytes of the two, beyond those before; NaN where unknown
    """

    dtype: str = column("dtype")
    ours: float = column("s to open", ".2f")
    theirs: float = column("diffusers", ".2f")
    speedup: float = column("times as fast", ".1f")
    touched: float = column("and read once", ".2f")
    theirs_touched: float = column("diffusers", ".2f")
    speedup_touched: float = column("times as fast", ".1f")
    memory: float = column("GB", gigabytes)
    theirs_memory: float = column("diffusers", gigabytes)


def measure(params: Params) -> tuple[list[Timing], dict[str, Any]]:
    """Write a file of random weights and time both sides."""
    _require_diffusers()
    with tempfile.TemporaryDirectory(dir=params.folder) as folder:
        process("loading", "make", folder, params.family, params.stored, str(params.miniature))
        rows = [_timing(params, dtype, Path(folder)) for dtype in params.dtypes]
        size = (Path(folder) / "model.safetensors").stat().st_size
    return rows, {"bytes": size}


def _timing(params: Params, dtype: str, folder: Path) -> Timing:
    def load(side: str) -> dict[str, float]:
        _into_page_cache(folder / "model.safetensors")
        return dict(json.loads(process("loading", side, str(folder), params.family, dtype)))

    bar = tqdm(range(params.rounds), desc=f"timing {dtype}", disable=not params.progress)
    loads = [[load(side) for side in ("ours", "theirs")] for _ in bar]
    opened, touched, memory = (
        Rounds([[side[key] for side in row] for row in loads]) for key in ("opened", "touched", "memory")
    )
    return Timing(
        dtype,
        ours=opened.median(0),
        theirs=opened.median(1),
        speedup=opened.ratio(1, 0),
        touched=touched.median(0),
        theirs_touched=touched.median(1),
        speedup_touched=touched.ratio(1, 0),
        memory=memory.median(0),
        theirs_memory=memory.median(1),
    )


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


# In its own process -----------------------------------------------------------------------------------------


def make(folder: str, family: str, dtype: str, miniature: str) -> None:
    """Write model.safetensors with random weights, and the configurations that diffusers needs."""
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
    file = Path(folder) / "model.safetensors"
    _measure(lambda: list(models.load(file, dtype=DTYPES.get(dtype)).parts.values()))


def theirs(folder: str, family: str, dtype: str) -> None:
    pipeline = getattr(_require_diffusers(), ARCHITECTURES[family].pipelines[None])
    file, options = f"{folder}/model.safetensors", {"config": f"{folder}/configs", "local_files_only": True}
    if dtype != DEFAULT:
        options["torch_dtype"] = DTYPES[dtype]

    def load() -> list[nn.Module]:
        parts = pipeline.from_single_file(file, **options).components
        return [part for part in parts.values() if isinstance(part, nn.Module)]

    _measure(load)


@torch.no_grad()
def _measure(load: Callable[[], list[nn.Module]]) -> None:
    """Print seconds to load, seconds to load and read every weight, and the peak of resident memory."""
    torch.ones(2).aminmax()  # starts the threads before the clock
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
