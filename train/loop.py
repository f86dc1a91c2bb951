"""The training loop, read from top to bottom."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.messages import brief, warn
from diffusion.noise import mix
from diffusion.settings import of_kind, setting
from models import EMA, Model
from models.layers.packed import is_packed
from models.layouts import native
from train.data import Batch, Dataset, shuffled_batches
from train.data.reading import Batches, OnError, check_readable, read_batches
from train.description import describe, warn_of_idle_settings
from train.folder import claim, has_checkpoint
from train.logbook import Logger, Progress
from train.objective import Objective
from train.pictures import Pictures
from train.state import TrainState, Window
from train.world import World

T = TypeVar("T")
CHECK_EVERY = 100  # steps between two looks for values that are not finite: each look waits for the device


@dataclass(frozen=True)
class TrainParams:
    """How to train. Weights, average and optimiser are float32; steps are those of the optimiser."""

    steps: int = setting(10_000, "optimiser steps")
    batch_size: int = setting(128, "samples per step, over all processes and accumulated parts")
    accumulate: int = setting(
        1, "parts of each process's share of a batch, if memory is short", kind="rounding"
    )
    learning_rate: float = 1e-3
    warmup: int = setting(100, "steps over which the learning rate rises from 0")
    final: float = setting(1.0, "factor of the learning rate at the last step, by a cosine; 1: constant")
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = setting(1.0, "limit of the gradient's norm")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of activations: fp32, bf16 or fp16", kind="rounding"
    )
    ema: float = setting(0.999, "decay of the averaged weights")
    seed: int = 0
    save_every: int = setting(1000, "steps", kind="place")
    log_every: int = setting(50, "steps", kind="place")
    evaluate_every: int = setting(
        0, "steps; 0: never. A checkpoint is saved before each evaluation", kind="place"
    )
    workers: int = setting(0, "processes that decode images; 0 decodes in the loop", kind="place")
    on_error: OnError = setting(
        "refuse",
        "samples that cannot be read: refuse ends the run, saved; skip replaces each by the next one of its "
        "class, and warns (not for captioned images)",
    )
    check_data: bool = setting(
        False, "read all samples before the first step, to name unreadable ones", kind="place"
    )
    compile: bool = setting(False, "torch.compile the network", kind="rounding")
    checkpointing: bool = setting(
        False, "recompute activations: less memory, a third more time", kind="place"
    )

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

    def fixed_settings(self, data: Dataset, world: World, objective: Objective) -> dict[str, Any]:
        """What a resumed run must share: all but length, saving, logging, errors, precision and memory.

        The number of parts of a batch, over all processes, is recorded: with the same number, every sample
        gets the same noise, whichever process computes it. A longer run has a longer cosine: its learning
        rate goes on from where the longer run's would be.
        """
        free = ("steps", "on_error", *of_kind(TrainParams, "place", "rounding"))
        return {
            "train": {name: value for name, value in asdict(self).items() if name not in free},
            "data": {
                "images": len(data),
                "shape": list(data.shape),
                **getattr(data, "fixed_settings", {}),
            },
            "parts": world.size * self.accumulate,
            "objective": getattr(objective, "fixed_settings", {}),
        }

    def micro_batch(self, processes: int) -> int:
        """Samples per forward pass of one process."""
        if self.batch_size % (processes * self.accumulate):
            raise ValueError(
                f"train.batch_size={self.batch_size} does not divide into {processes} processes x "
                f"{self.accumulate} parts"
            )
        return self.batch_size // (processes * self.accumulate)

    def evaluates(self, step: int) -> bool:
        """Whether the model is evaluated after that many steps."""
        return bool(step and self.evaluate_every) and (step % self.evaluate_every == 0 or step == self.steps)

    def learning_rate_at(self, step: int) -> float:
        """At a step, counted from 0: linear warm-up, then a cosine down to `final` at the last step."""
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
    pictures: Pictures | None = None,
    resume: bool = False,
    progress: bool = True,
) -> bool:
    """Train `model` in place; afterwards it holds the averaged weights. False if it was interrupted.

    folder    gets checkpoint.safetensors (raw and averaged weights, optimiser, step), the checkpoint before
              it as checkpoint.previous.safetensors, and metrics.jsonl. One training at a time may use it
    resume    go on from that checkpoint, bit for bit as if never stopped; if it is damaged, from the one
              before, with a warning; without one, start. Otherwise a folder with a checkpoint is refused.
              A folder that holds something else is always refused
    loggers   where the numbers go besides metrics.jsonl
    evaluate  called with the averaged model every `params.evaluate_every` steps, after a checkpoint, in the
              leading process; its numbers are logged
    pictures  what the averaged model samples every so many steps (`Pictures`)

    Ctrl-C, SIGTERM and a closed terminal finish the step, save, and return False. An error of the data is
    raised as ValueError or OSError after saving. Any other error is raised as it is, after saving if the last
    step was finite. FloatingPointError if loss or gradient is not finite.
    """
    world = world or World(0, 1, torch.device("cpu"))
    training = Training(
        model, objective, data, params, Path(folder), world, evaluate, pictures, resume, progress
    )
    training.check()
    return training.run(loggers)


@dataclass(eq=False)
class Training:
    """A run of `train`, which explains the arguments: described in the model, but not begun.

    settings  what a resumed run must share with it
    """

    model: Model
    objective: Objective
    data: Dataset
    params: TrainParams
    folder: Path
    world: World
    evaluate: Callable[[Model], Mapping[str, float]] | None = None
    pictures: Pictures | None = None
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        self.micro_batch = self.params.micro_batch(self.world.size)
        _set_checkpointing(self.model.network, self.params.checkpointing)
        describe(self.model, self.objective, self.data)
        self.settings = self.params.fixed_settings(self.data, self.world, self.objective)

    def check(self) -> None:
        """ValueError if checkpoints of the model could not be saved or loaded. Call it before writing."""
        for name, part in self.model.parts.items():
            if is_packed(part):
                raise ValueError(
                    f"the {name}'s weights are packed (8-bit floats or GGUF's blocks), and training needs "
                    "plain ones: train model.unpacked(torch.float32), or a file of it, "
                    "models.save(models.load(...).unpacked(torch.float32), 'plain.safetensors')"
                )
        self.model.check_description()
        if self.pictures is not None:
            self.pictures.check(self.model)
        native.as_text("model", self.model.spec)

    def run(self, loggers: Sequence[Logger] = ()) -> bool:
        """Train, after `check`. True if it was finished."""
        params, world, folder = self.params, self.world, self.folder
        if world.leads:
            warn_of_idle_settings(params, self.objective, self.evaluate is not None)
        with ExitStack() as stack:
            stack.enter_context(claim(folder, world))
            state = self._start()
            stop = _StopRequest(lambda: world.size == 1 and state.consistent and not state.saving)
            if params.check_data:
                world.on_leader(self._check_data)
            batches = stack.enter_context(self._batches(state.step, lambda: stop.requested))
            log = Progress(
                folder, params.steps, params.batch_size, loggers, state.step, world.leads, self.progress
            )
            stack.callback(log.close)
            take_step = _Step(self.model, self.objective, params, world, state)
            gpus = [world.device] if world.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(gpus))
            stack.enter_context(stop)  # after the workers have started, which keep their own handlers
            stack.enter_context(_saving_on_error(state, folder, self.settings, world))
            self._loop(state, stop, batches, take_step, log)
        state.ema.copy_to(self.model.network.eval())
        return state.step == params.steps

    def _loop(
        self, state: TrainState, stop: _StopRequest, batches: Batches, take_step: _Step, log: Progress
    ) -> None:
        params, world = self.params, self.world
        if self._evaluates(state.step):  # the run may have been stopped during this evaluation
            log.log(
                state.step,
                world.on_leader(lambda: self._scores(state, stop) if log.lacks_scores(state.step) else None),
            )
        while state.step < params.steps:
            micro_batches = batches.next_step()
            if batches.error:
                world.report_error(batches.error)
            stopped, failed = world.any(stop.requested, batches.error is not None)
            if stopped or failed:
                self._save_unsaved(state)
                if stopped:
                    return
                if batches.error:
                    raise _data_error(batches.error, self.folder, state.saved_step)
                raise world.reported_error()
            take_step(micro_batches, batches.replaced)
            log.step()

            done, evaluates = state.step == params.steps, self._evaluates(state.step)
            logs = state.step % params.log_every == 0 or done
            # An evaluation may need so much memory that the process is killed, so save before it.
            saves = state.step % params.save_every == 0 or done or evaluates
            if logs or saves or state.step % CHECK_EVERY == 0:  # before replacing the last good checkpoint
                state.check(self.folder, done)
            if logs:
                log.log_training(state.step, state.window.means(), params.learning_rate_at(state.step - 1))
            if saves:
                self._save(state)
            if evaluates:
                with log.paused():
                    log.log(state.step, world.on_leader(lambda: self._scores(state, stop)))
            if self.pictures is not None and self.pictures.due(state.step, params.steps):
                with log.paused():
                    log.show(state.step, world.on_leader(lambda: self._pictures(state, stop)))

    def _start(self) -> TrainState:
        """The state before the first step, or that of the folder's checkpoint."""
        params, device = self.params, self.world.device
        network, fp16 = self.model.network.to(device).train(), params.precision == "fp16"
        optimizer = torch.optim.AdamW(
            network.parameters(), params.learning_rate, betas=params.betas,
            weight_decay=params.weight_decay, fused=True,
        )  # fmt: skip
        scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        state = TrainState(
            self.model, EMA(network, params.ema), optimizer, scaler, Window(device, skips=fp16)
        )
        if has_checkpoint(self.folder, self.resume):
            state.load(self.folder, self.settings, params.steps, self.world.leads)
        return state

    def _check_data(self) -> None:
        params = self.params
        check_readable(self.data, self.micro_batch, params.on_error, params.workers, self.progress)

    def _batches(self, step: int, stopping: Callable[[], bool]) -> AbstractContextManager[Batches]:
        """The micro-batches of this process from a step on: its share of every batch, cut into parts."""
        params, world = self.params, self.world

        def indices() -> Iterator[list[int]]:
            share = params.batch_size // world.size
            for batch in shuffled_batches(len(self.data), params.batch_size, params.seed, step):
                own = batch[world.rank * share : (world.rank + 1) * share]
                yield from (own[i : i + self.micro_batch] for i in range(0, share, self.micro_batch))

        pin = world.device.type == "cuda"
        return read_batches(
            self.data, indices(), params.accumulate, params.on_error, params.workers, pin, stopping
        )

    def _evaluates(self, step: int) -> bool:
        return self.evaluate is not None and self.params.evaluates(step)

    def _scores(self, state: TrainState, stop: _StopRequest) -> Mapping[str, float] | None:
        """The averaged model's scores. None if the run is to stop: it computes them when it goes on."""
        if self.evaluate is None or stop.requested:
            return None
        return _check_scores(self._with_average(state, self.evaluate))

    def _pictures(self, state: TrainState, stop: _StopRequest) -> Path | None:
        """The averaged model's pictures. None if the run is to stop."""
        if self.pictures is None or stop.requested:
            return None
        pictures = self.pictures
        return self._with_average(state, lambda model: pictures.draw(model, state.step))

    def _with_average(self, state: TrainState, job: Callable[[Model], T]) -> T:
        """The result of a job on the averaged model in evaluation mode."""
        with state.ema.applied_to(self.model.network.eval()):
            result = job(self.model)
        self.model.network.train()
        return result

    def _save(self, state: TrainState) -> None:
        state.saving = True  # also after an error, for `_saving_on_error`
        self.world.on_leader(lambda: state.save(self.folder, self.settings))
        state.saved_step, state.saving = state.step, False

    def _save_unsaved(self, state: TrainState) -> None:
        """Save the steps since the last checkpoint, if there are any and they are finite."""
        if state.step > state.saved_step:
            state.check(self.folder, done=False)
            self._save(state)


class _Step:
    """An optimiser step: gradients of this process's parts of a batch, averaged over all processes."""

    def __init__(
        self, model: Model, objective: Objective, params: TrainParams, world: World, state: TrainState
    ) -> None:
        self.network, self.objective = model.network, objective
        self.params, self.world, self.state = params, world, state
        self.forward: Any = torch.compile(self.network) if params.compile else self.network
        if world.size > 1:
            gpus = [world.device] if world.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=gpus)
        self.denoiser = model.network_denoiser(self.forward)
        low = torch.float16 if params.precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(world.device.type, low, enabled=params.precision != "fp32")

    def __call__(self, micro_batches: Sequence[Batch], replaced: int) -> None:
        """Update the weights. replaced: how many samples stand in for unreadable ones, for the log."""
        state, params = self.state, self.params
        for group in state.optimizer.param_groups:
            group["lr"] = params.learning_rate_at(state.step)
        losses = [self._backward(part, batch) for part, batch in enumerate(micro_batches)]
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), params.clip)
        numbers = state.window.numbers(torch.stack(losses).mean(), norm, replaced, self.world)
        state.consistent = False  # until the update ends, which waits for no other process
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(self.network)
        state.step += 1
        state.window.add(numbers)
        state.consistent = True

    def _backward(self, part: int, on_host: Batch) -> Tensor:
        """Add the gradients of one part; its loss."""
        params, world, state = self.params, self.world, self.state
        batch = {name: value.to(world.device, non_blocking=True) for name, value in on_host.items()}
        # Reseeding at every step makes resuming independent of past random states. The seed contains the
        # part's number among those of all processes, so that it does not matter which process computes it.
        torch.manual_seed(mix(params.seed, world.rank * params.accumulate + part, state.step, 0))
        last = part == params.accumulate - 1
        # Processes exchange gradients once per optimiser step, with the last part.
        with self.forward.no_sync() if world.size > 1 and not last else nullcontext():
            with self.autocast:
                loss = self.objective(self.denoiser, batch).mean()
            state.scaler.scale(loss / params.accumulate).backward()
        return loss.detach()


def _set_checkpointing(network: Any, wanted: bool) -> None:
    """Switch it on or off. ValueError for a network that has no checkpointing."""
    if hasattr(network, "checkpointing"):
        network.checkpointing = wanted
    elif wanted:
        raise ValueError(f"a {type(network).__name__} keeps its activations: leave train.checkpointing out")


def _check_scores(scores: Any) -> dict[str, float]:
    """What `evaluate` returned, as floats. ValueError unless it is a mapping of names to numbers."""
    if not isinstance(scores, Mapping) or not all(
        isinstance(value, Real) or getattr(value, "ndim", None) == 0 for value in scores.values()
    ):
        raise ValueError(f"evaluate must return a mapping of names to numbers, not {brief(scores)}")
    return {name: float(value) for name, value in scores.items()}


@contextmanager
def _saving_on_error(
    state: TrainState, folder: Path, settings: Mapping[str, Any], world: World
) -> Iterator[None]:
    """After any error or a second Ctrl-C within the block, save the last consistent and finite step.

    The leading process does so alone, since the others may have ended.
    """
    try:
        yield
    except BaseException as error:
        state.saving = True
        unsaved = state.consistent and state.step > state.saved_step
        if world.leads and unsaved and not isinstance(error, FloatingPointError):
            try:
                state.check(folder, done=False)
                state.save(folder, settings)
            except Exception as failure:  # a warning, since the first error says more
                warn(f"the steps up to {state.step} are not saved, for {failure}; {state.last_good(folder)}")
            else:
                state.saved_step = state.step
                warn(
                    f"the {state.step} steps before the error are saved in {folder}: resume=true goes on "
                    "from there"
                )
        raise


def _data_error(error: ValueError | OSError, folder: Path, saved: int) -> ValueError | OSError:
    """An error of the data, and how to go on."""
    kind = OSError if isinstance(error, OSError) else ValueError
    hint = f"; {saved} steps are saved in {folder}: resume=true continues" if saved else ""
    again = kind(f"{error}{hint}")
    again.__cause__ = error.__cause__
    return again


class _StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a flag for the loop; a second one interrupts at once.

    A signal that is ignored stays so: shells let background jobs ignore the Ctrl-C of the foreground.

    interrupts  whether a second one may interrupt now: not during an update of the weights, which could not
                be saved, nor during saving, nor under torchrun, which passes on signals that a terminal has
                already sent to all processes
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self, interrupts: Callable[[], bool]) -> None:
        self.requested, self._interrupts = False, interrupts
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopRequest:
        with suppress(ValueError):  # only the main thread may set handlers; in others signals work as before
            heeded = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and self._interrupts():
            raise KeyboardInterrupt
        self.requested = True
