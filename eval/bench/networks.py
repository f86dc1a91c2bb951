"""One step of a published network, side by side with diffusers in one run. `python -m eval experiment=bench_networks`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusion.spec import check_at_least_one, lookup, make_params
from eval.bench.memory import peak_resident
from eval.bench.pairs import PAIRS, Pair
from eval.bench.record import DTYPES, write_bench
from models.device import find_device
from models.layers.blocks import compiled
from plain_diffusion.extras import extra

MATRIX = 2048  # rows and columns of the plain product that a step's rate of arithmetic is compared with


@dataclass(frozen=True)
class BenchParams:
    """What to time: see configs/eval/experiment/bench_networks.yaml."""

    out: str
    network: str = "sd15"
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    batch: int = 2
    size: int = 64
    layers: dict[str, int] = field(default_factory=dict)
    rounds: int = 5
    device: str | None = None
    compile: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "batch", "size", "rounds")
        lookup("network", self.network, PAIRS).shortened(self.layers)
        for dtype in self.dtypes:
            lookup("dtype", dtype, DTYPES)

    @property
    def pair(self) -> Pair:
        return PAIRS[self.network].shortened(self.layers)


@dataclass(frozen=True)
class Timing:
    """Seconds per step, medians over rounds, and the median of the rounds' ratios.

    speedup     theirs over ours: above 1 where ours is faster
    share       our rate of arithmetic over that of a plain product of MATRIX x MATRIX matrices of the same dtype in the same rounds
    memory, their_memory  bytes that a step needs besides the weights, at its peak; NaN where the system does not tell
    """

    dtype: str
    ours: float
    theirs: float
    speedup: float
    share: float
    memory: float
    their_memory: float


def run(config: Mapping[str, Any]) -> list[Timing]:
    """Time both networks in turn, round after round, in every dtype, and write out/bench.json and out/bench.md."""
    params = make_params("", BenchParams, {key: value for key, value in config.items() if key != "program"})
    device = find_device(params.device)
    timings = [measure(params, dtype, device) for dtype in tqdm(params.dtypes, desc="timing", disable=not params.progress)]
    write_bench(Path(params.out), timings, table(timings), settings=asdict(params))
    return timings


@torch.inference_mode()
def measure(params: BenchParams, dtype: str, device: torch.device) -> Timing:
    """Both networks in one dtype."""
    matrix = torch.randn(MATRIX, MATRIX, device=device).to(DTYPES[dtype])
    with _ours(params, DTYPES[dtype], device) as step:
        steps = [step, _theirs(params, DTYPES[dtype], device)]
        memory = [_peak_memory(step, device) for step in steps]  # which warms up, too, and compiles
        rounds = [[_seconds(call, device) for call in (*steps, lambda: matrix @ matrix)] for _ in range(params.rounds)]
    ours, theirs, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
    work = flops(params) / (2 * MATRIX**3)
    return Timing(
        dtype,
        ours,
        theirs,
        speedup=statistics.median(b / a for a, b, _ in rounds),
        share=statistics.median(work * product / a for a, _, product in rounds),
        memory=memory[0],
        their_memory=memory[1],
    )


def flops(params: BenchParams) -> int:
    """Floating point operations of one step's products; a multiplication and its addition are two."""
    uncompiled = replace(params, compile=False)
    with _ours(uncompiled, torch.float32, torch.device("meta")) as step, FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def table(timings: Sequence[Timing]) -> str:
    """A Markdown table, one row per dtype."""
    rows = []
    for t in timings:
        speed = f"{t.ours:.3g} | {t.theirs:.3g} | {t.speedup:.2f} | {t.share:.0%}"
        rows.append(f"| {t.dtype} | {speed} | {t.memory / 1e9:.2f} | {t.their_memory / 1e9:.2f} |")
    head = "| dtype | s a step | diffusers | times as fast | of the rate of a product | GB | diffusers |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


@contextmanager
def _ours(params: BenchParams, dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[], Tensor]]:
    """One step of our network, which stays compiled between the steps, as it does in a run."""
    pair = params.pair
    network = _filled(lambda: pair.network(pair.params), dtype, device)
    given = pair.given(params.batch, params.size, dtype, device)
    with compiled(network, params.compile):
        yield lambda: network(given.x, given.t, given.condition)


def _theirs(params: BenchParams, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """The same of diffusers' network. ValueError where diffusers is not installed."""
    with extra("bench"):
        import diffusers
    diffusers.logging.set_verbosity_error()
    name, config = params.pair.theirs
    network = _filled(lambda: getattr(diffusers, name).from_config(config), dtype, device)
    call = torch.compile(network) if params.compile else network
    asked = params.pair.asked(params.pair.given(params.batch, params.size, dtype, device))
    return lambda: call(**asked, return_dict=False)[0]


def _filled(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network with small random weights, made in place: nothing exists twice."""
    with torch.device("meta"):
        network = make().to(dtype)
    if device.type != "meta":
        network.to_empty(device=device)
        for p in network.parameters():
            p.uniform_(-0.02, 0.02)
        for buffer in network.buffers():
            buffer.zero_()
    return network.eval()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call; on a GPU, until it has finished."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Bytes a call needs at its peak beyond those held before it, from its second run; NaN where the system does not tell."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return float(torch.cuda.max_memory_allocated(device) - before)
    return peak_resident(call) if device.type == "cpu" else math.nan
