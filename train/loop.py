"""The training loop, read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion.noise import mix
from models import EMA, Model
from train.data import Batch, Dataset, shuffled_batches
from train.description import describe, warn_of_idle_settings
from train.logbook import JsonLines, Logger
from train.objective import Objective
from train.state import TrainState, is_begun
from train.world import World


@dataclass(frozen=True)
class TrainParams:
    """How to train.

    steps          optimiser steps; learning rate and everything else counts these
    batch_size     samples per optimiser step, over all processes and accumulated parts
    accumulate     parts that each process splits its share of a batch into, when memory is short
    warmup         steps over which the learning rate rises from 0
    final          share of the learning rate that is left at the last step; the cosine between (1: constant)
    clip           limit of the gradient's norm
    precision      of the forward and backward pass; weights, average and optimiser stay float32
    ema            decay of the averaged weights
    save_every, log_every, evaluate_every   in steps
    workers        processes that decode data; 0 decodes in the loop
    compile        torch.compile the network
    checkpointing  keep few activations and compute the others again on the way back: less memory, a third more time
    """

    steps: int = 10_000
    batch_size: int = 128
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    final: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float = 0.999
    seed: int = 0
    save_every: int = 1000
    log_every: int = 50
    evaluate_every: int = 0
    workers: int = 0
    compile: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "evaluate_every", "workers", "final"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, like {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} must be greater than 0, not {getattr(self, name)}")
        for name, values in (("ema", (self.ema,)), ("betas", self.betas)):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"train.{name} must lie in [0, 1), not {getattr(self, name)}")

    def kept(self, data: Dataset, world: World, objective: Objective) -> dict[str, Any]:
        """What a run must keep when it is resumed: all but its length, saving, logging, precision and memory.

        A longer run has a longer cosine: its learning rate goes on from where the longer one would be.
        """
        free = ("steps", "save_every", "log_every", "evaluate_every", "workers", "precision", "compile", "checkpointing")
        train = {name: value for name, value in asdict(self).items() if name not in free}
        facts = {"images": len(data), "shape": list(data.shape), **getattr(data, "kept", {})}
        return {"train": train, "data": facts, "processes": world.size, "objective": getattr(objective, "kept", {})}

    def micro_batch(self, processes: int) -> int:
        """Samples per forward pass of one process."""
        if self.batch_size % (processes * self.accumulate):
            raise ValueError(f"train.batch_size={self.batch_size} does not divide into {processes} processes x {self.accumulate} parts")
        return self.batch_size // (processes * self.accumulate)

    def learning_rate_at(self, step: int) -> float:
        """Of the step with that number, from 0: linear warm-up, then a cosine down to `final` at the last step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.learning_rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: Model,
    objective: Objective,
    data: Dataset,
    params: TrainParams,
    folder: str | Path,
    *,
    world: World | None = None,
    loggers: Sequence[Logger] = (),
    evaluate: Callable[[Model], Mapping[str, float]] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> bool:
    """Train `model` in place; afterwards it holds the averaged weights. True when finished, False when interrupted.

    folder    gets checkpoint.safetensors (raw and averaged weights, optimiser, step) and metrics.jsonl
    resume    go on from that checkpoint, bit for bit as if never stopped; without one, start. A folder that holds a
              checkpoint is refused otherwise.
    loggers   where the numbers go besides
    evaluate  called with the averaged model every `params.evaluate_every` steps; its numbers are logged
    Ctrl-C and SIGTERM finish the step, save, and return False. Raises FloatingPointError when loss or gradient is not finite.
    """
    folder, world = Path(folder), world or World(0, 1, torch.device("cpu"))
    micro_batch, rank, device = params.micro_batch(world.size), world.rank, world.device
    begun = is_begun(folder, resume)
    network = _set_up(model.network, params).to(device).train()
    describe(model, objective, data)
    if world.leads:
        warn_of_idle_settings(params, objective, evaluate is not None)
    state = TrainState(
        model,
        EMA(network, params.ema),
        torch.optim.AdamW(network.parameters(), params.learning_rate, betas=params.betas, weight_decay=params.weight_decay, fused=True),
        torch.amp.GradScaler(device.type, enabled=params.precision == "fp16"),
    )
    if begun:
        state.load(folder, params.kept(data, world, objective), params.steps)
    forward: Any = torch.compile(network) if params.compile else network
    if world.size > 1:
        forward = DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None)
    denoiser = model.network_denoiser(forward)
    autocast = torch.autocast(
        device.type, torch.float16 if params.precision == "fp16" else torch.bfloat16, enabled=params.precision != "fp32"
    )
    batches = _batches(data, params, world, micro_batch, state.step)
    books = [JsonLines(folder / "metrics.jsonl", state.step), *loggers] if world.leads else []
    bar = tqdm(total=params.steps, initial=state.step, desc=folder.name, unit="step", disable=not (progress and world.leads))
    losses, norms, clock = [], [], time.perf_counter()

    with _StopRequest() as stop, torch.random.fork_rng([device] if device.type == "cuda" else []), contextlib.ExitStack() as closing:
        closing.enter_context(bar)
        closing.callback(batches.close)
        for book in books:
            closing.callback(book.close)
        while state.step < params.steps:
            for group in state.optimizer.param_groups:
                group["lr"] = params.learning_rate_at(state.step)
            for part in range(params.accumulate):
                batch = {name: value.to(device, non_blocking=True) for name, value in next(batches).items()}
                # Reseeding per step makes every step its own, so that resuming needs no random state from the past.
                torch.manual_seed(mix(params.seed, rank, state.step, part))
                last = part == params.accumulate - 1
                # Gradients travel between processes once per optimiser step, with the last part.
                with forward.no_sync() if world.size > 1 and not last else contextlib.nullcontext():
                    with autocast:
                        loss = objective(denoiser, batch).mean()
                    state.scaler.scale(loss / params.accumulate).backward()
                losses.append(loss.detach())
            state.scaler.unscale_(state.optimizer)
            norms.append(nn.utils.clip_grad_norm_(network.parameters(), params.clip))
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            state.ema.update(network)
            state.step += 1
            bar.update()

            done = state.step == params.steps
            logs, saves = (state.step % every == 0 or done for every in (params.log_every, params.save_every))
            stopped = world.any(stop.requested)
            if logs or saves or stopped:  # before anything is saved over the last good checkpoint
                loss_mean, norm_mean = (float(world.mean(torch.stack(values).mean())) for values in (losses, norms))
                _require_finite(loss_mean, norm_mean, state, folder)
            if logs:
                speed = len(losses) * micro_batch * world.size / (time.perf_counter() - clock)
                values = {"loss": loss_mean, "grad_norm": norm_mean, "lr": params.learning_rate_at(state.step - 1)}
                for book in books:
                    book.log(state.step, {**values, "samples_per_second": speed})
                bar.set_postfix(loss=f"{loss_mean:.4f}", samples_per_s=f"{speed:.0f}")
                losses, norms, clock = [], [], time.perf_counter()
            if world.leads and (saves or stopped):
                state.save(folder, params.kept(data, world, objective))
            if evaluate and params.evaluate_every and (state.step % params.evaluate_every == 0 or done):
                paused = time.perf_counter()
                with state.ema.applied_to(network.eval()):
                    found = evaluate(model) if world.leads else {}
                network.train()
                for book in books:
                    book.log(state.step, {name: float(value) for name, value in found.items()})
                clock += time.perf_counter() - paused  # speed is that of training
            if stopped and not done:
                break
    state.ema.copy_to(network.eval())
    return state.step == params.steps


def _set_up(network: Any, params: TrainParams) -> nn.Module:
    """The network, with checkpointing as wished; ValueError where it has none."""
    if hasattr(network, "checkpointing"):
        network.checkpointing = params.checkpointing
    elif params.checkpointing:
        raise ValueError(f"a {type(network).__name__} always keeps its activations: leave train.checkpointing out")
    return network


def _require_finite(loss: float, norm: float, state: TrainState, folder: Path) -> None:
    """FloatingPointError unless training can go on. A gradient beyond fp16's range only makes its scaler skip a step."""
    if math.isfinite(loss) and (math.isfinite(norm) or state.scaler.is_enabled()):
        return
    kept = f"the last good checkpoint, of step {state.saved}, is in {folder}" if state.saved else "nothing was saved yet"
    raise FloatingPointError(
        f"the loss is {loss:g} and its gradient's norm {norm:g} within the last steps up to {state.step}: "
        f"lower train.learning_rate, or use bf16 or fp32; {kept}"
    )


def _batches(data: Dataset, params: TrainParams, world: World, micro_batch: int, step: int) -> Generator[Batch, None, None]:
    """This process's micro-batches from optimiser step `step` on: each global batch is cut into ranks, each rank's share into parts."""

    def mine() -> Iterator[list[int]]:
        share = params.batch_size // world.size
        for batch in shuffled_batches(len(data), params.batch_size, params.seed, step):
            own = batch[world.rank * share : (world.rank + 1) * share]
            yield from (own[i : i + micro_batch] for i in range(0, share, micro_batch))

    loader: Any = DataLoader(
        cast(Any, _Reader(data)),  # torch calls __getitems__ where there is one, but its types do not know it
        batch_sampler=cast(Any, mine()),  # an iterator will do
        collate_fn=cast(Any, _as_it_is),
        worker_init_fn=_leave_signals_to_the_loop,
        num_workers=params.workers,
        pin_memory=world.device.type == "cuda",
    )
    for batch in loader:  # closing this generator lets go of the loader's processes
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Reader:
    """A data set whose errors are handed over like batches: torch would wrap those of a worker process in its traceback."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitems__(self, indices: Sequence[int]) -> Batch | Exception:
        try:
            return self.data.__getitems__(indices)
        except (ValueError, OSError) as error:
            return error


def _as_it_is(batch: Batch | Exception) -> Batch | Exception:
    return batch


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; a worker that dies of it would take the loop along before it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop reads between steps; a second one interrupts at once.

    What is ignored stays so: a shell lets its jobs in the background ignore the Ctrl-C that is meant for the one in front.
    """

    def __enter__(self) -> _StopRequest:
        self.requested = False
        self._previous = {}
        with contextlib.suppress(ValueError):  # only the main thread may handle signals; elsewhere they go where they went
            heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
