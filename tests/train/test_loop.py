"""The training loop: a run that was stopped, killed or split over processes is the run that was not."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import models
from diffusion import Condition, Denoiser
from models import Model
from models.files.text import read_json, read_json_lines
from models.layouts import native
from tests.composing import composed
from train import TrainParams, run, train
from train.data import Batch, digits
from train.density import Uniform
from train.objective import DenoisingObjective, Objective
from train.weighting import uniform

TINY = ("channels=8", "channel_mult=[1]", "attention=[0]", "middle_attention=0", "head_dim=8")
OVERRIDES = (
    "experiment=digits_unet", *(f"model.network.{setting}" for setting in TINY), "model.network.groups=4",
    "device=cpu", "progress=false", "wandb=false",
)  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK: dict[str, Any] = dict(steps=6, batch_size=16, warmup=2, log_every=1, save_every=3, ema=0.9)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As many threads here as in the processes that are started: sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(folder: Path, *overrides: str) -> dict[str, Any]:
    """A run of the tiny network."""
    return composed("train", *OVERRIDES, *overrides, run=str(folder))


def fresh(width: int = 8) -> Model:
    """The tiny network with the same weights every time."""
    network = {**config(Path("unused"))["model"]["network"], "channels": width}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.build(
            {"network": network, "schedule": {"name": "cosine", "steps": 100}, "prediction": "v"}
        )


def denoising(model: Model) -> Objective:
    return DenoisingObjective(model.schedule, model.prediction, Uniform(model.schedule), uniform, model.null)


def reconstruction(denoiser: Denoiser, batch: Batch) -> Tensor:
    """An objective without chance: the output should be the image."""
    level = denoiser.schedule.levels(torch.full((len(batch["x0"]),), 50.0))
    return (
        (denoiser.output(batch["x0"], level, Condition(label=batch["label"])) - batch["x0"])
        .square()
        .flatten(1)
        .mean(1)
    )


def go(
    folder: Path,
    objective: Objective | None = None,
    model: Model | None = None,
    resume: bool = False,
    **params: Any,
) -> Model:
    """Train a few steps in this process."""
    model = model or fresh()
    data = digits()
    data.images = data.images.to(next(model.network.parameters()).dtype)
    train(
        model,
        objective or denoising(model),
        data,
        TrainParams(**{**QUICK, **params}),
        folder,
        resume=resume,
        progress=False,
    )
    return model


def at_call(number: int, act: Callable[[], None], objective: Objective) -> Objective:
    """The same objective that does something as it is called for the number-th time."""
    calls = 0

    def acting(denoiser: Denoiser, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return objective(denoiser, batch)

    return acting


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise RuntimeError("crash")


def state(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """What a checkpoint holds."""
    return {name: value.clone() for name, value in native.read(folder)[0].items() if name.startswith(prefix)}


def progress(folder: Path) -> dict[str, Any]:
    return dict(native.read(folder)[1]["progress"])


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Bitwise."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def lines(folder: Path) -> list[dict[str, float]]:
    """What was logged, but for the speed."""
    found = read_json_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in found]


def steps(folder: Path) -> list[float]:
    return [line["step"] for line in read_json_lines(folder / "metrics.jsonl")]


def test_resumes_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    """20 steps at once = 7, a Ctrl-C, and 13 in a new process: raw and averaged weights, optimiser, progress,
    metrics."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [
        f"train.{s}"
        for s in ("steps=20", "batch_size=100", "accumulate=2", "warmup=5", "evaluate_every=7", "log_every=4")
    ]
    assert run(config(whole, *settings))

    def evaluate(model: Model) -> dict[str, float]:
        interrupt()  # after step 7, in the middle of a line of metrics
        return {"seen": 1.0}

    assert not run(config(parts, *settings), evaluate)
    assert progress(parts)["step"] == 7
    assert (20 * 100) // len(digits()) == 1  # a part of an epoch is behind the stop, and the next epoch ahead
    resumed = subprocess.run(
        [sys.executable, "-m", "train", *OVERRIDES, *settings, f"run={parts}", "resume=true"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same(state(whole), state(parts))
    assert progress(whole) == progress(parts)
    assert lines(whole) == [line for line in lines(parts) if "loss" in line]
    assert [line["step"] for line in lines(whole)] == [4, 8, 12, 16, 20]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """One SIGINT to python -m train: status 130, one line on how to go on, a checkpoint from which
    resume=true finishes."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "train",
        *OVERRIDES,
        f"run={folder}",
        "train.log_every=1",
        "train.save_every=100000",
    ]
    with subprocess.Popen(
        [*command, "train.steps=100000"], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
    ) as process:
        while not ((folder / "metrics.jsonl").exists() and steps(folder)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert error.count("\n") == 1
    assert error.startswith(
        f"stopped and saved: {folder}   go on: plain-diffusion train {shlex.join(OVERRIDES)}"
    )
    assert error.endswith(" resume=true\n")
    done = progress(folder)["step"]
    assert done == steps(folder)[-1] > 0
    assert run(config(folder, "train.log_every=1", f"train.steps={done + 3}", "resume=true"))
    assert steps(folder) == list(range(1, done + 4))


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """A shell starts jobs in the background so: the Ctrl-C in their terminal is for another program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which every test gets back
    go(tmp_path, at_call(2, interrupt, denoising(model := fresh())), model)
    assert progress(tmp_path)["step"] == QUICK["steps"]


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import sklearn.datasets, torch, torch._dynamo  # here once, not in every child
from models.layouts import native
from train import run

config = json.loads(sys.argv[1])
file = Path(config["run"]) / native.FILE_NAME
for attempt in range(5):
    before = file.stat().st_mtime_ns if file.exists() else 0
    if not (child := os.fork()):
        torch.set_num_threads(1)
        run(config)
        os._exit(1)
    while not file.exists() or file.stat().st_mtime_ns == before:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    time.sleep(random.Random(attempt).uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors, metadata = native.read(file)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    print(metadata["progress"]["step"])
"""


def test_kill_9_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Five times SIGKILL at a random moment of a run that saves at every step: the file is whole, and the
    next run goes on from it."""
    settings = config(
        tmp_path / "run", "resume=true", "train.steps=100000", "train.save_every=1", "train.log_every=1"
    )
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(settings)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert killed.returncode == 0, killed.stderr
    reached = [int(line) for line in killed.stdout.split()]
    assert len(reached) == 5
    assert sorted(set(reached)) == reached
    run({**settings, "train": {**settings["train"], "steps": reached[-1] + 2}})
    assert steps(tmp_path / "run") == list(range(1, reached[-1] + 3))


RANKS = """
import copy, json, sys
from dataclasses import replace
from pathlib import Path
import torch
from models import Model
from train import train
from train.loop import Training
from tests.train.test_loop import reconstruction

program = sys.modules["train.run"]  # the module: train.run itself is the function
config = json.loads(sys.argv[1])
folder = Path(config["run"])

class Both(Training):
    def run(self, loggers=()):
        model, data, params, world = self.model, self.data, self.params, self.world
        start = copy.deepcopy(model.network.state_dict())
        plain, begun, resumed = (
            Model(copy.deepcopy(model.network).double(), model.schedule, model.prediction, model.spec)
            for _ in range(3)
        )
        finished = super().run(loggers)
        data.images = data.images.double()
        train(plain, reconstruction, data, params, folder.with_name("plain"), world=world, progress=False)
        half, alone = folder.with_name("half"), replace(params, steps=2, accumulate=4)
        world.on_leader(lambda: train(begun, reconstruction, data, alone, half, progress=False))
        train(resumed, reconstruction, data, params, half, world=world, resume=True, progress=False)
        ends = [network.state_dict() for network in (model.network, plain.network)]
        torch.save([start, *ends], folder.with_name(f"rank{world.rank}.pt"))
        return finished

program.Training = Both
assert program.run(config)
"""


def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """Under torchrun both ranks end with the same weights, one of them writes, and without chance they learn
    what one process does."""
    changes = ("steps=4", "batch_size=16", "accumulate=2", "log_every=1", "warmup=2", "final=1")
    settings = config(tmp_path / "run", *(f"train.{change}" for change in changes))
    (tmp_path / "script.py").write_text(RANKS)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "script.py"),
    ]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = subprocess.run([*launch, json.dumps(settings)], env=environment, capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    assert_same(first[1], models.load(tmp_path / "run").network.state_dict())

    more = {**settings["train"], "steps": 6, "accumulate": 4}
    assert run({**settings, "run": str(tmp_path / "alone"), "train": more})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as many parts get the same noise, whoever computes them
        assert run({**settings, "train": more, "resume": True})
    for name in ("loss", "grad_norm"):
        shared, alone = ([line[name] for line in lines(tmp_path / folder)] for folder in ("run", "alone"))
        assert shared == pytest.approx(alone, rel=1e-4)  # other noise: a tenth

    one = models.build({**settings["model"], "network": dict(settings["model"]["network"])})
    one.network.load_state_dict(first[0])
    go(
        tmp_path / "one",
        reconstruction,
        as_float64(one),
        **{**settings["train"], "betas": (0.9, 0.99), "accumulate": 1},
    )
    for name in ("plain", "half"):  # two processes from the start, and from the middle of what one has begun
        assert_close(state(tmp_path / name, "network."), state(tmp_path / "one", "network."))
        assert steps(tmp_path / name) == [1, 2, 3, 4]


def test_ctrl_c_stops_all_processes_at_the_same_step(tmp_path: Path) -> None:
    """However rarely they log: torchrun waits half a minute for its processes, and kills those that have not
    stopped."""
    folder = tmp_path / "run"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "train",
        *OVERRIDES,
    ]
    settings = [f"run={folder}", "train.steps=1000000", "train.log_every=1000000", "train.save_every=3"]
    with subprocess.Popen(
        [*launch, *settings], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True, start_new_session=True
    ) as process:
        while not (folder / native.FILE_NAME).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate()
    assert error.count("stopped and saved") == 1, error
    assert f"torchrun --nproc-per-node 2 -m plain_diffusion train {shlex.join(OVERRIDES)}" in error
    assert "forcefully" not in error
    assert progress(folder)["step"] >= 3


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_parts_are_one_batch(tmp_path: Path, accumulate: int) -> None:
    """An objective without chance learns the same from a batch and from its parts, to rounding of float64."""
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    go(whole, reconstruction, as_float64(fresh()))
    go(parts, reconstruction, as_float64(fresh()), accumulate=accumulate)
    assert_close(state(whole, "network."), state(parts, "network."))
    for name in ("loss", "grad_norm"):  # the optimiser would not notice a factor of all gradients
        one, other = (
            [line[name] for line in read_json_lines(folder / "metrics.jsonl")] for folder in (whole, parts)
        )
        assert one == pytest.approx(other, rel=1e-9)


def test_checkpointing_computes_the_same_twice(tmp_path: Path) -> None:
    """The run is the same bit for bit, also when it goes on without; blocks are run twice a step. A network
    of one's own refuses it."""

    def passes(folder: Path, **params: Any) -> int:
        model, calls = fresh(), list[Any]()
        network: Any = model.network
        network.down[0].register_forward_pre_hook(lambda *call: calls.append(call))
        go(folder, model=model, resume=True, **params)
        return len(calls)

    assert passes(tmp_path / "without") == 6
    assert passes(tmp_path / "with", checkpointing=True, steps=4) == 8
    assert passes(tmp_path / "with", steps=6) == 2
    assert_same(state(tmp_path / "without"), state(tmp_path / "with"))
    with pytest.raises(ValueError, match=r"a Conv2d keeps its activations: leave train\.checkpointing out"):
        go(tmp_path / "own", model=replace(fresh(), backbone=torch.nn.Conv2d(1, 1, 1)), checkpointing=True)


def test_every_step_has_chance_of_its_own(tmp_path: Path) -> None:
    """Random numbers differ between steps and between parts of a step, and return with the step in a run that
    was resumed."""

    def draws(folder: Path, *lengths: int) -> list[float]:
        found: list[float] = []

        def objective(denoiser: Denoiser, batch: Batch) -> Tensor:
            found.append(float(torch.rand(())))
            return reconstruction(denoiser, batch)

        for steps in lengths:
            go(folder, objective, resume=True, steps=steps, accumulate=2)
        return found

    whole = draws(tmp_path / "whole", 6)
    assert len(set(whole)) == 12
    assert draws(tmp_path / "parts", 2, 6) == whole


@pytest.mark.parametrize("accumulate", [1, 4])
def test_learning_rate_ends_at_the_last_step(tmp_path: Path, accumulate: int) -> None:
    """Warm-up rises to the full rate, the cosine reaches its end exactly at the last optimiser step, however
    a batch is split."""
    go(tmp_path, steps=9, warmup=3, learning_rate=1e-3, final=0.125, accumulate=accumulate)
    cosine = [0.125 + 0.875 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(6)]
    expected = [1e-3 * share for share in (1 / 3, 2 / 3, 1.0, *cosine)]
    assert [line["lr"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == pytest.approx(
        expected, rel=1e-12
    )
    assert progress(tmp_path)["param_groups"][0]["lr"] == 0.125e-3  # what the optimiser itself was given last


def test_the_average_is_what_is_left(tmp_path: Path) -> None:
    """After training the model holds the averaged weights of its checkpoint, which are not the raw ones,
    ready to be used."""
    model = go(tmp_path)
    average, raw = state(tmp_path, "ema."), state(tmp_path, "network.")
    assert_same(
        {name.removeprefix("ema."): value for name, value in average.items()},
        dict(model.network.named_parameters()),
    )
    assert any(
        not torch.equal(value, raw[name.replace("ema.", "network.", 1)]) for name, value in average.items()
    )
    assert not model.network.training


@pytest.mark.parametrize(("log_every", "save_every", "kept"), [(1, 2, 4), (50, 1, 4), (50, 3, 3)])
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, log_every: int, save_every: int, kept: int
) -> None:
    """A loss of NaN at step 5 raises before it spoils a file, however rarely numbers are logged; the last
    good checkpoint stays."""
    poisoned = fresh()

    def poison() -> None:
        with torch.no_grad():
            next(poisoned.network.parameters()).fill_(math.nan)

    objective = at_call(5, poison, denoising(poisoned))
    caught = 5 if log_every == 1 or save_every == 1 else 6
    with pytest.raises(
        FloatingPointError,
        match=rf"the loss is nan .* up to {caught}: .* the last good checkpoint, of step {kept}, is in "
        rf"{tmp_path}",
    ):
        go(tmp_path, objective, poisoned, steps=20, log_every=log_every, save_every=save_every)
    assert progress(tmp_path)["step"] == kept
    assert all(value.isfinite().all() for value in state(tmp_path).values())


def test_ctrl_c_does_not_save_a_broken_state(tmp_path: Path) -> None:
    """Stopped after its loss became NaN, a run raises rather than saves."""

    def poisoned(denoiser: Denoiser, batch: Batch) -> Tensor:
        return reconstruction(denoiser, batch) * math.nan

    with pytest.raises(FloatingPointError):
        go(tmp_path, at_call(2, interrupt, poisoned), steps=20, log_every=50, save_every=50)
    assert not (tmp_path / native.FILE_NAME).exists()


# Another value for every setting of training that a resumed run must keep; those below may change.
OTHER: dict[str, Any] = dict(
    batch_size=8, learning_rate=0.5, warmup=3, final=0.5, weight_decay=0.1, betas=(0.5, 0.99), clip=0.5,
    ema=0.5, seed=7,
)  # fmt: skip
FREE = {
    "steps", "accumulate", "precision", "save_every", "log_every", "evaluate_every", "workers", "on_error",
    "check_data", "compile",
    "checkpointing",
}  # fmt: skip


def test_every_setting_is_either_kept_or_free() -> None:
    """A new setting has to be put into one of the two."""
    assert OTHER.keys() | FREE == {field.name for field in dataclasses.fields(TrainParams)}
    assert not OTHER.keys() & FREE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: value}, f"was trained with train.{name}=") for name, value in OTHER.items()),
        ({"model": 16}, "was trained with network.channels=8, not 16"),
        ({"steps": 5}, "has finished 6 steps: train.steps=5 must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_as_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Another architecture or setting than the checkpoint's: one line that says both, and the checkpoint
    stays as it is."""
    go(tmp_path)
    before = (tmp_path / native.FILE_NAME).read_bytes()
    width = changes.pop("model", 8)
    with pytest.raises(ValueError, match=message) as refusal:
        go(tmp_path, model=fresh(width), resume=True, **changes)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / native.FILE_NAME).read_bytes() == before
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_trained_folder_is_not_overwritten(tmp_path: Path) -> None:
    """Without resume=True the loop itself refuses a folder that holds a checkpoint."""
    go(tmp_path)
    before = (tmp_path / native.FILE_NAME).read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a trained run: resume=true continues it"):
        go(tmp_path, steps=3)
    assert ((tmp_path / native.FILE_NAME).read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()) == before


def test_what_is_trained_is_saved_before_it_is_evaluated(tmp_path: Path) -> None:
    """An evaluation that fails costs no step of training; one that returns tensors is logged as numbers."""

    def fails(model: Model) -> dict[str, float]:
        raise RuntimeError("no")

    def tensors(model: Model) -> dict[str, Any]:
        return {"score": torch.tensor(0.25)}

    model, params = fresh(), TrainParams(**{**QUICK, "evaluate_every": 6, "save_every": 6})
    with pytest.raises(RuntimeError, match="no"):
        train(model, denoising(model), digits(), params, tmp_path / "a", evaluate=fails, progress=False)
    assert progress(tmp_path / "a")["step"] == 6
    train(fresh(), denoising(model), digits(), params, tmp_path / "b", evaluate=tensors, progress=False)
    assert {"step": 6, "score": 0.25} in read_json_lines(tmp_path / "b" / "metrics.jsonl")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_training_with_one_line(workers: int, tmp_path: Path) -> None:
    """Also where a worker process finds it; the workers end with the run."""
    images = pictures(tmp_path / "images")
    damaged = next(images.rglob("7.png"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    command = [*folder_command(images, tmp_path / "run"), f"train.workers={workers}"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(rf"error: {re.escape(str(damaged))} cannot be read as a picture: .*\n", run.stderr), (
        run.stderr
    )


def test_a_resumed_run_says_how_it_began(tmp_path: Path) -> None:
    """provenance.json keeps the first start and adds each resumption; config.json holds the settings of the
    last."""
    assert run(config(tmp_path, "train.steps=2"))
    first = read_json(tmp_path / "provenance.json")
    assert run(config(tmp_path, "train.steps=3", "resume=true"))
    record = read_json(tmp_path / "provenance.json")
    assert len(record.pop("resumed")) == 1
    assert record == first
    assert read_json(tmp_path / "config.json")["train"]["steps"] == 3


CONTINUOUS = ["model.schedule.name=cosine_vp", "~model.schedule.steps", "~model.grid"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.accumulate=3"], "does not divide into 1 processes x 3 parts"),
        (["train.ema=2"], r"train.ema must lie in \[0, 1\), not 2"),
        (["train.betas=[2,3]"], r"train.betas must lie in"),
        (["train.betas=[0.9]"], "train.betas must be a list of 2 numbers"),
        (["train.clip=0"], "train.clip must be greater than 0"),
        (["train.warmup=-5"], "train.warmup must not be negative"),
        (["objective.drop=2"], r"objective.drop is a probability within \[0, 1\], not 2"),
        (["objective.drop=abc"], "drop of objective 'denoising' must be a number, not 'abc'"),
        (["~objective.weighting"], "objective 'denoising' needs weighting"),
        (
            ["model.network.out_channels=3"],
            "model.network.out_channels=3 must be 1, as in the data, or twice that",
        ),
        (
            ["model.network.out_channels=2", *CONTINUOUS],
            "a learned variance needs a schedule with steps",
        ),
        (["resume=maybe"], "resume must be true or false, not 'maybe'"),
        (["device=gpu"], "no device 'gpu' here"),
    ],
)
def test_a_run_that_cannot_be_leaves_no_folder(overrides: list[str], message: str, tmp_path: Path) -> None:
    """Wrong values are refused before anything is written."""
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_an_infinite_gradient_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    """Its loss is finite when it appears, and the weights are lost one step later: the run stops before it
    saves them."""

    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * math.inf

    model, calls = fresh(), 0
    plain = denoising(model)

    def objective(denoiser: Denoiser, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return cast(Tensor, Explodes.apply(plain(denoiser, batch))) if calls == 5 else plain(denoiser, batch)

    with pytest.raises(
        FloatingPointError, match=r"gradient's norm (nan|inf) .* last good checkpoint, of step 3"
    ):
        go(tmp_path, objective, model, save_every=3, log_every=3)
    assert all(value.isfinite().all() for value in state(tmp_path).values())


def pictures(folder: Path) -> Path:
    """32 grey pictures of 8x8 in ten classes."""
    for i in range(32):
        (folder / str(i % 10)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 8 * i, np.uint8)).save(folder / str(i % 10) / f"{i}.png")
    return folder


def folder_command(images: Path, folder: Path) -> list[str]:
    """Training on a folder of images, as a command line."""
    command = [
        sys.executable,
        "-m",
        "train",
        *(o for o in OVERRIDES if not o.startswith("data")),
        "~data.split",
        "data.name=folder",
    ]
    return [*command, f"+data.folder={images}", "+data.channels=1", f"run={folder}"]


def test_ctrl_c_reaches_the_loop_and_not_its_workers(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to every process of the group; those that decode images leave it to the loop,
    which saves."""
    folder = tmp_path / "run"
    command = [
        *folder_command(pictures(tmp_path / "images"), folder),
        "train.log_every=1",
        "train.steps=100000",
    ]
    with subprocess.Popen(
        [*command, "train.workers=2", "train.save_every=100000"],
        env=ENVIRONMENT, stdout=-1, stderr=-1, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        while not ((folder / "metrics.jsonl").exists() and len(steps(folder)) > 1):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130, error
    assert error.startswith("stopped and saved"), error
    assert progress(folder)["step"] > 1


def test_resumed_metrics_have_every_step_once(tmp_path: Path) -> None:
    """A crash after step 5 resumes from the checkpoint of step 3: steps 4 and 5 are not there twice, nor half
    a line."""
    model = fresh()
    with pytest.raises(RuntimeError, match="crash"):
        go(tmp_path, at_call(6, crash, denoising(model)), model)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # what a crash in the middle of a line leaves
    go(tmp_path, resume=True)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_bf16_runs_on_the_cpu(tmp_path: Path) -> None:
    """Low precision computes the same loss to its own accuracy, keeps float32 weights, and is really used."""
    losses = {}
    for precision in ("fp32", "bf16"):
        model = go(tmp_path / precision, precision=precision)
        losses[precision] = torch.tensor(
            [line["loss"] for line in read_json_lines(tmp_path / precision / "metrics.jsonl")]
        )
        assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=2e-2, atol=0)
    assert not torch.equal(losses["bf16"], losses["fp32"])


def as_float64(model: Model) -> Model:
    """The same network in double precision: parts and whole then differ by rounding alone."""
    model.network.double()
    return model


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """To rounding of float64, enlarged by the optimiser, which divides small gradients by their own size."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)
