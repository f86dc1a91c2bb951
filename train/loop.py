"""The training loop, read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.messages import brief, warn
from diffusion.noise import mix
from diffusion.settings import setting
from models import EMA, Model
from models.layers.packed import is_packed
from models.layouts import native
from train.data import Batch, Dataset, shuffled_batches
from train.data.reading import Batches, OnError, check_readable, read_batches
from train.description import describe, warn_of_idle_settings
from train.folder import claimed, is_begun
from train.logbook import Logger, Progress
from train.objective import Objective
from train.pictures import Pictures
from train.state import TrainState, Window
from train.world import World

# steps after which numbers that are not finite are found at the latest: to look, the host waits for the
# device
CHECK_EVERY = 100
PLACE = ("precision", "compile", "checkpointing")  # how a step is computed, not what


@dataclass(frozen=True)
class TrainParams:
    """How to train. Weights, average and optimiser are float32; learning rate and everything else counts
    optimiser steps."""

    steps: int = setting(10_000, "optimiser steps")
    batch_size: int = setting(128, "samples per step, over all processes and accumulated parts")
    accumulate: int = setting(
        1, "parts that each process splits its share of a batch into, when memory is short"
    )
    learning_rate: float = 1e-3
    warmup: int = setting(100, "steps over which the learning rate rises from 0")
    final: float = setting(
        1.0, "share of the learning rate that is left at the last step, by a cosine; 1: constant"
    )
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = setting(1.0, "limit of the gradient's norm")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of the forward and backward pass: fp32, bf16 or fp16"
    )
    ema: float = setting(0.999, "decay of the averaged weights")
    seed: int = 0
    save_every: int = setting(1000, "steps")
    log_every: int = setting(50, "steps")
    evaluate_every: int = setting(0, "steps; 0: never. A checkpoint is saved before each evaluation")
    workers: int = setting(0, "processes that decode images; 0 decodes in the loop")
    on_error: OnError = setting(
        "refuse",
        "samples that cannot be read: refuse ends the run, saved; skip puts the next one of their class in "
        "their place, and warns (not for "
        "captioned images)",
    )
    check_data: bool = setting(
        False, "read every sample once before the first step, and name all that cannot be read"
    )
    compile: bool = setting(False, "torch.compile the network")
    checkpointing: bool = setting(
        False, "keep few activations and compute the others again: less memory, a third more time"
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
        """What a run must keep when it is resumed: all but its length, saving, logging, precision, memory,
        and what becomes of errors.

        Parts of a batch, over all processes, are noted: with as many, every sample gets the noise it would
        have got, whoever computes it.

        A longer run has a longer cosine: its learning rate goes on from where the longer one would be.
        """
        free = (
            "steps",
            "accumulate",
            "save_every",
            "log_every",
            "evaluate_every",
            "workers",
            "on_error",
            "check_data",
            *PLACE,
        )
        train = {name: value for name, value in asdict(self).items() if name not in free}
        facts = {"images": len(data), "shape": list(data.shape), **getattr(data, "fixed_settings", {})}
        parts = world.size * self.accumulate
        return {
            "train": train,
            "data": facts,
            "parts": parts,
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
        """Of the step with that number, from 0: linear warm-up, then a cosine down to `final` at the last
        step."""
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
    """Train `model` in place; afterwards it holds the averaged weights. True when finished, False when
    interrupted.

    folder    gets checkpoint.safetensors (raw and averaged weights, optimiser, step), the one before it as
              checkpoint.previous.safetensors, and metrics.jsonl. One training at a time may use it.
    resume    go on from that checkpoint, or, with a warning, from the one before where it is damaged, bit for
              bit as if never stopped; without one, start. A folder that holds a checkpoint is refused
              otherwise, and one that holds something else.
    loggers   where the numbers go besides
    evaluate  called with the averaged model every `params.evaluate_every` steps, which are saved before, in
              the leading process; its numbers are logged
    pictures  what the averaged model draws after every so many steps, see `Pictures`
    Ctrl-C, SIGTERM and a terminal that closes finish the step, save, and return False. An error of the data
    saves before it is raised, as ValueError or OSError, and so does whatever else goes wrong, as it is, if
    the last step was finite. Raises FloatingPointError when loss or gradient is not finite.
    """
    world = world or World(0, 1, torch.device("cpu"))
    training = Training(
        model, objective, data, params, Path(folder), world, evaluate, pictures, resume, progress
    )
    training.check()
    return training.run(loggers)


@dataclass(eq=False)
class Training:
    """A run of `train`, which says what its arguments are: described in the model, but not begun.

    settings  what it must keep when it is resumed
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
        """ValueError for a model whose checkpoints could not be saved or loaded. To be called before anything
        is written."""
        for name, part in self.model.parts.items():
            if is_packed(part):
                raise ValueError(
                    f"the {name}'s weights are packed (8-bit floats or GGUF's blocks), and training needs "
                    "plain ones: train "
                    "model.unpacked(torch.float32), or a file of it, "
                    "models.save(models.load(...).unpacked(torch.float32), 'plain.safetensors')"
                )
        self.model.check_description()
        if self.pictures is not None:
            self.pictures.check(self.model)
        native.as_text("model", self.model.spec)

    def run(self, loggers: Sequence[Logger] = ()) -> bool:
        """Train what `check` has passed; True when finished."""
        params, world, folder = self.params, self.world, self.folder
        if world.leads:
            warn_of_idle_settings(params, self.objective, self.evaluate is not None)
        with contextlib.ExitStack() as closing:
            closing.enter_context(claimed(folder, world))
            state = self._state()
            stop = _StopRequest(lambda: world.size == 1 and state.whole and not state.saving)
            if params.check_data:
                world.lead(
                    lambda: check_readable(
                        self.data, self.micro_batch, params.on_error, params.workers, self.progress
                    )
                )
            batches = closing.enter_context(self._batches(state.step, lambda: stop.requested))
            log = Progress(
                folder, params.steps, params.batch_size, loggers, state.step, world.leads, self.progress
            )
            closing.callback(log.close)
            take_step = _Step(self.model, self.objective, params, world, state)
            closing.enter_context(
                torch.random.fork_rng([world.device] if world.device.type == "cuda" else [])
            )
            closing.enter_context(stop)  # after workers have begun, which keep their own handlers
            closing.enter_context(_saving_on_error(state, folder, self.settings, world))
            if self._evaluates(state.step):  # where the run was stopped in the middle of it
                log.log(
                    state.step,
                    world.lead(lambda: self._scores(state, stop) if log.lacks_scores(state.step) else None),
                )
            while state.step < params.steps:
                micro_batches = batches.next_step()
                if batches.error:
                    world.report(batches.error)
                stopped, failed = world.any(stop.requested, batches.error is not None)
                if stopped or failed:
                    self._save_unsaved(state)
                    if stopped:
                        break
                    raise _failure(batches.error, folder, state.saved) if batches.error else world.reported()
                take_step(micro_batches, batches.replaced)
                log.step()

                done, evaluates = state.step == params.steps, self._evaluates(state.step)
                logs, saves = (
                    state.step % every == 0 or done for every in (params.log_every, params.save_every)
                )
                saves |= evaluates  # which may take the process along, by the memory it needs
                if (
                    logs or saves or state.step % CHECK_EVERY == 0
                ):  # before anything is saved over the last good checkpoint
                    state.check(folder, done)
                if logs:
                    log.log_training(state.step, state.window.line(), params.learning_rate_at(state.step - 1))
                if saves:
                    self._save(state)
                if evaluates:
                    with log.paused():
                        log.log(state.step, world.lead(lambda: self._scores(state, stop)))
                if self.pictures is not None and self.pictures.due(state.step, params.steps):
                    with log.paused():
                        log.show(state.step, world.lead(lambda: self._pictures(state, stop)))
        state.ema.copy_to(self.model.network.eval())
        return state.step == params.steps

    def _state(self) -> TrainState:
        """That of the first step, or of the checkpoint in the folder."""
        params, device = self.params, self.world.device
        network = self.model.network.to(device).train()
        state = TrainState(
            self.model,
            EMA(network, params.ema),
            torch.optim.AdamW(
                network.parameters(),
                params.learning_rate,
                betas=params.betas,
                weight_decay=params.weight_decay,
                fused=True,
            ),
            torch.amp.GradScaler(device.type, enabled=params.precision == "fp16"),
            Window(device, skips=params.precision == "fp16"),
        )
        if is_begun(self.folder, self.resume):
            state.load(self.folder, self.settings, params.steps, self.world.leads)
        return state

    def _batches(self, step: int, stopping: Callable[[], bool]) -> contextlib.AbstractContextManager[Batches]:
        """This process's micro-batches from optimiser step `step` on: each batch is cut into shares of ranks,
        each share into parts."""
        params, world = self.params, self.world

        def mine() -> Iterator[list[int]]:
            share = params.batch_size // world.size
            for batch in shuffled_batches(len(self.data), params.batch_size, params.seed, step):
                own = batch[world.rank * share : (world.rank + 1) * share]
                yield from (own[i : i + self.micro_batch] for i in range(0, share, self.micro_batch))

        pin = world.device.type == "cuda"
        return read_batches(
            self.data, mine(), params.accumulate, params.on_error, params.workers, pin, stopping
        )

    def _evaluates(self, step: int) -> bool:
        return self.evaluate is not None and self.params.evaluates(step)

    def _scores(self, state: TrainState, stop: _StopRequest) -> Mapping[str, float] | None:
        """Of the averaged model; None where it is asked to stop, and finds them missing when it goes on."""
        if self.evaluate is None or stop.requested:
            return None
        with state.ema.applied_to(self.model.network.eval()):
            found = self.evaluate(self.model)
        self.model.network.train()
        return _numbers(found)

    def _pictures(self, state: TrainState, stop: _StopRequest) -> Path | None:
        """Of the averaged model; None where it is asked to stop."""
        if self.pictures is None or stop.requested:
            return None
        with state.ema.applied_to(self.model.network.eval()):
            path = self.pictures.draw(self.model, state.step)
        self.model.network.train()
        return path

    def _save(self, state: TrainState) -> None:
        state.saving = True  # and stays so on an error: `_saving_on_error` comes next
        self.world.lead(lambda: state.save(self.folder, self.settings))
        state.saved = state.step
        state.saving = False

    def _save_unsaved(self, state: TrainState) -> None:
        """If there is anything since the last checkpoint, and it is finite."""
        if state.step > state.saved:
            state.check(self.folder, done=False)
            self._save(state)


class _Step:
    """Takes an optimiser step: gradients of this process's parts of a batch, their mean over all processes,
    weights and their average."""

    def __init__(
        self, model: Model, objective: Objective, params: TrainParams, world: World, state: TrainState
    ) -> None:
        self.network, self.objective, self.params, self.world, self.state = (
            model.network,
            objective,
            params,
            world,
            state,
        )
        self.forward: Any = torch.compile(self.network) if params.compile else self.network
        if world.size > 1:
            self.forward = DistributedDataParallel(
                self.forward, device_ids=[world.device] if world.device.type == "cuda" else None
            )
        self.denoiser = model.network_denoiser(self.forward)
        low = torch.float16 if params.precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(world.device.type, low, enabled=params.precision != "fp32")

    def __call__(self, micro_batches: Sequence[Batch], replaced: int) -> None:
        """`replaced` of the samples stand in for others, which is counted."""
        state, params = self.state, self.params
        for group in state.optimizer.param_groups:
            group["lr"] = params.learning_rate_at(state.step)
        losses = [self._backward(part, batch) for part, batch in enumerate(micro_batches)]
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), params.clip)
        numbers = state.window.numbers(torch.stack(losses).mean(), norm, replaced, self.world)
        state.whole = False  # while nothing is waited for that another process might break off
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(self.network)
        state.step += 1
        state.window.add(numbers)
        state.whole = True

    def _backward(self, part: int, on_host: Batch) -> Tensor:
        """Add the gradients of one part to those there are; its loss."""
        params, world, state = self.params, self.world, self.state
        batch = {name: value.to(world.device, non_blocking=True) for name, value in on_host.items()}
        # Reseeding per step makes every step its own, so that resuming needs no random state from the past;
        # by the number of the part among those of all processes, so that it does not matter which of them
        # computes it.
        torch.manual_seed(mix(params.seed, world.rank * params.accumulate + part, state.step, 0))
        last = part == params.accumulate - 1
        # Gradients travel between processes once per optimiser step, with the last part.
        with self.forward.no_sync() if world.size > 1 and not last else contextlib.nullcontext():
            with self.autocast:
                loss = self.objective(self.denoiser, batch).mean()
            state.scaler.scale(loss / params.accumulate).backward()
        return loss.detach()


def _set_checkpointing(network: Any, wanted: bool) -> None:
    """ValueError where the network has none."""
    if hasattr(network, "checkpointing"):
        network.checkpointing = wanted
    elif wanted:
        raise ValueError(
            f"a {type(network).__name__} always keeps its activations: leave train.checkpointing out"
        )


def _numbers(found: Any) -> dict[str, float]:
    """What an evaluation has found. ValueError where that is not numbers by their names."""
    sound = isinstance(found, Mapping) and all(
        isinstance(value, Real) or getattr(value, "ndim", None) == 0 for value in found.values()
    )
    if not sound:
        raise ValueError(f"evaluate must return a mapping of names to numbers, not {brief(found)}")
    return {name: float(value) for name, value in found.items()}


@contextlib.contextmanager
def _saving_on_error(
    state: TrainState, folder: Path, settings: Mapping[str, Any], world: World
) -> Iterator[None]:
    """Whatever goes wrong within the block, an evaluation or a second Ctrl-C, the last whole and finite step
    is saved before it goes on.

    By the leading process alone: the others may no longer be there.
    """
    try:
        yield
    except BaseException as error:
        state.saving = True
        if (
            world.leads
            and state.whole
            and state.step > state.saved
            and not isinstance(error, FloatingPointError)
        ):
            try:
                state.check(folder, done=False)
                state.save(folder, settings)
            except Exception as failure:  # the error that there is says more
                warn(f"the steps up to {state.step} are not saved, for {failure}; {state.left(folder)}")
            else:
                state.saved = state.step
                warn(
                    f"the {state.step} steps before the error are saved in {folder}: resume=true goes on "
                    "from there"
                )
        raise


def _failure(error: ValueError | OSError, folder: Path, saved: int) -> ValueError | OSError:
    """An error of the data, and how to go on."""
    kind = OSError if isinstance(error, OSError) else ValueError
    kept = (
        f"; the {saved} steps before are saved in {folder}: resume=true goes on from there" if saved else ""
    )
    again = kind(f"{error}{kept}")
    again.__cause__ = error.__cause__
    return again


class _StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a flag that the loop reads between steps; a second one
    interrupts at once.

    What is ignored stays so: a shell lets its jobs in the background ignore the Ctrl-C that is meant for the
    one in front.

    interrupts  whether a second one does so now: not amid an update of the weights, which could not be saved,
                nor while they are saved, nor under torchrun, which passes on to its processes what a terminal
                has sent to them too
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self, interrupts: Callable[[], bool]) -> None:
        self.requested, self._interrupts = False, interrupts
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopRequest:
        with contextlib.suppress(
            ValueError
        ):  # only the main thread may handle signals; elsewhere they go where they went
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
