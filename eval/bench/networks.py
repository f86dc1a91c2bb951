"""One step of a published network, against diffusers (experiment=bench_networks)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusion.settings import setting
from diffusion.spec import check_at_least_one, lookup
from eval.bench import harness
from eval.bench.harness import DTYPES, BenchParams, alternate, column, gigabytes, peak_memory, product, timed
from eval.bench.pairs import PAIRS, Pair
from models.device import find_device
from models.layers.blocks import compiled
from plain_diffusion.extras import extra


@dataclass(frozen=True, kw_only=True)
class Params(BenchParams):
    """What to time."""

    network: str = setting("sd15", f"one of {', '.join(PAIRS)}")
    layers: dict[str, int] = setting(
        dict, "fewer blocks of flux and sd3.5: +layers.depth=1, of flux +layers.depth_single=1"
    )
    dtypes: tuple[str, ...] = setting(("fp32", "bf16"), "fp32, bf16, fp16")
    batch: int = setting(2, "with and without the prompt, as classifier-free guidance needs it")
    size: int = setting(64, "height and width of the latents; SDXL's own is 128")
    device: str | None = setting(None, "null: a GPU where there is one")
    compile: bool = setting(False, "torch.compile both")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "batch", "size")
        lookup("network", self.network, PAIRS).shortened(self.layers)
        for dtype in self.dtypes:
            lookup("dtype", dtype, DTYPES)

    @property
    def pair(self) -> Pair:
        return PAIRS[self.network].shortened(self.layers)


@dataclass(frozen=True)
class Timing:
    """Seconds per step, medians over rounds.

    speedup  median of the rounds' ratios theirs / ours: above 1 where ours is faster
    share    our rate of arithmetic over that of a product of matrices of the same dtype
    memory, their_memory  peak of bytes that a step needs besides the weights; NaN where unknown
    """

    dtype: str = column("dtype")
    ours: float = column("s a step", ".3g")
    theirs: float = column("diffusers", ".3g")
    speedup: float = column("times as fast", ".2f")
    share: float = column("of the rate of a product", ".0%")
    memory: float = column("GB", gigabytes)
    their_memory: float = column("diffusers", gigabytes)


@torch.inference_mode()
def measure(params: Params) -> tuple[list[Timing], dict[str, Any]]:
    """Time both networks in every dtype."""
    device, rows = find_device(params.device), []
    for name in tqdm(params.dtypes, desc="timing", disable=not params.progress):
        dtype = DTYPES[name]
        with _ours(params, dtype, device) as step:
            steps = [step, _theirs(params, dtype, device)]
            memory = [peak_memory(step, device) for step in steps]  # also warms up and compiles
            clocks = [timed(call, device) for call in (*steps, product(dtype, device))]
            rounds = alternate(clocks, params.rounds, warm=True)
        share = flops(params) / (2 * harness.MATRIX**3) * rounds.ratio(2, 0)
        rows.append(Timing(name, rounds.median(0), rounds.median(1), rounds.ratio(1, 0), share, *memory))
    return rows, {}


def flops(params: Params) -> int:
    """Floating point operations of one step; a multiply-add is two."""
    ours, counter = replace(params, compile=False), FlopCounterMode(display=False)
    with _ours(ours, torch.float32, torch.device("meta")) as step, counter:
        step()
    return counter.get_total_flops()


@contextmanager
def _ours(params: Params, dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[], Tensor]]:
    """One step of our network, which stays compiled between steps, as when sampling."""
    pair = params.pair
    network = _random(lambda: pair.network(pair.params), dtype, device)
    inputs = pair.inputs(params.batch, params.size, dtype, device)
    with compiled(network, params.compile):
        yield lambda: network(inputs.x, inputs.t, inputs.condition)


def _theirs(params: Params, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """One step of diffusers' network. ValueError where diffusers is not installed."""
    with extra("bench"):
        import diffusers
    diffusers.logging.set_verbosity_error()
    name, config = params.pair.theirs
    network = _random(lambda: getattr(diffusers, name).from_config(config), dtype, device)
    call = torch.compile(network) if params.compile else network
    arguments = params.pair.their_arguments(params.pair.inputs(params.batch, params.size, dtype, device))
    return lambda: call(**arguments, return_dict=False)[0]


def _random(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network with small random weights, which are made in place and exist once."""
    with torch.device("meta"):
        network = make().to(dtype)
    if device.type != "meta":
        network.to_empty(device=device)
        for p in network.parameters():
            p.uniform_(-0.02, 0.02)
        for buffer in network.buffers():
            buffer.zero_()
    return network.eval()
