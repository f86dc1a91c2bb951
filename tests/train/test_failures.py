"""What goes wrong during a run loses no work, hangs nothing and overwrites nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not marked so

from diffusion import Denoiser
from models import EMA, Model
from models.files.text import read_json
from models.files.writing import locked
from models.layouts import native
from tests.train.test_loop import (
    QUICK,
    _one_thread,  # noqa: F401  # a fixture, which this module uses too
    assert_same,
    at_call,
    config,
    crash,
    denoising,
    fresh,
    go,
    interrupt,
    lines,
    progress,
    reconstruction,
    state,
    steps,
)  # fmt: skip
from train import TrainParams, run, train
from train.data import Batch, TensorData, digits, shuffled_batches
from train.data.reading import Batches, check_readable, read_batches
from train.folder import LOCK
from train.loop import _StopRequest
from train.state import PREVIOUS, TrainState
from train.world import PeerError, World

BAD = 5  # the number of a sample that cannot be read, where there is one


class Faulty(TensorData):
    """Sixteen pictures, of which some cannot be read."""

    def __init__(self, bad: Sequence[int] = (BAD,), fault: Callable[[], None] | None = None) -> None:
        whole = digits()
        super().__init__(
            whole.images[:16], (whole.labels if whole.labels is not None else torch.zeros(0))[:16], 10
        )
        self.bad, self.fault = bad, fault

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        for i in indices:
            if i in self.bad:
                if self.fault is not None:
                    self.fault()
                raise ValueError(f"{i}.png cannot be read as a picture")
        return super().__getitems__(indices)


SMALL = {**QUICK, "batch_size": 2, "save_every": 1000, "steps": 9}


def fit(folder: Path, data: TensorData, resume: bool = False, stop: int = 0, **params: Any) -> Model:
    """Train the tiny network on that data; with a Ctrl-C in step number `stop`."""
    model = fresh()
    train(
        model,
        at_call(stop, interrupt, denoising(model)),
        data,
        TrainParams(**{**SMALL, **params}),
        folder,
        resume=resume,
        progress=False,
    )
    return model


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose samples can all be read."""
    folder = tmp_path_factory.mktemp("unbroken")
    fit(folder, Faulty([]))
    return folder


def before(bad: int) -> int:
    """How many steps pass before a sample's turn comes."""
    return next(step for step, batch in enumerate(shuffled_batches(16, 2, 0)) if bad in batch)


def memory_error() -> None:
    raise MemoryError("no more\nof it")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class OfTwoArgumentsError(Exception):
    """Cannot be sent from one process to another: it is made anew there, of one argument."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


def of_two_arguments() -> None:
    raise OfTwoArgumentsError(1, 2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "5.png cannot be read as a picture"),
        (memory_error, "MemoryError while data was read: no more of it"),
        (of_two_arguments, "OfTwoArgumentsError while data was read: 1 2"),
        (killed, "a worker has died"),
    ],
    ids=["unreadable", "memory", "odd", "killed"],
)
def test_an_error_of_the_data_loses_no_step(
    fault: Callable[[], None] | None, message: str, workers: int, unbroken: Path, tmp_path: Path
) -> None:
    """Whatever it is, and wherever: the steps before are saved, one line says so, workers end; mended, the
    run goes on bit for bit."""
    if fault is killed and workers == 0:
        pytest.skip("that would be this process")
    with pytest.raises((ValueError, OSError), match=message) as error:
        fit(tmp_path / "run", Faulty(fault=fault), workers=workers)
    assert "\n" not in str(error.value)
    done = progress(tmp_path / "run")["step"]
    assert (
        (0 < done <= before(BAD)) if fault is killed else (done == before(BAD))
    )  # it takes what it has read for later along
    assert str(error.value).endswith(f"{done} steps are saved in {tmp_path / 'run'}: resume=true continues")
    assert multiprocessing.active_children() == []
    fit(tmp_path / "run", Faulty([]), resume=True)
    assert_same(state(tmp_path / "run"), state(unbroken))
    assert lines(tmp_path / "run") == lines(unbroken)


def none() -> Any:
    return None


def no_tensor() -> Any:
    return {"x0": lambda: 0}  # could not even be sent


def too_few() -> Any:
    return {"x0": torch.zeros(1, 1, 8, 8)}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("odd", [none, dict, str, no_tensor, too_few])
def test_what_is_no_batch_is_an_error_of_the_data(
    odd: Callable[[], Any], workers: int, tmp_path: Path
) -> None:
    """At once, in one line, though a worker could not send it."""

    class Odd(Faulty):
        def __getitems__(self, indices: Sequence[int]) -> Batch:
            return cast(Batch, odd()) if BAD in indices else super().__getitems__(indices)

    with pytest.raises(
        ValueError, match=r"TypeError while data was read: .* a row for each of 2 samples, x0 among them, not"
    ) as error:
        fit(tmp_path, Odd([]), workers=workers)
    assert "\n" not in str(error.value)
    assert progress(tmp_path)["step"] == before(BAD)


def test_a_stop_does_not_wait_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that reads for ever: Ctrl-C saves the steps before, and the run goes on."""
    stalled, waits, wait = before(BAD), [], Batches._wait

    def waiting(source: Batches) -> Any:
        waits.append(0)
        if len(waits) == stalled + 1:  # for the batch that never comes
            threading.Timer(0.2, interrupt).start()
        return wait(source)

    monkeypatch.setattr(Batches, "_wait", waiting)
    model, data = fresh(), Faulty(fault=lambda: time.sleep(3600))
    assert not train(
        model, denoising(model), data, TrainParams(**{**SMALL, "workers": 1}), tmp_path, progress=False
    )
    assert progress(tmp_path)["step"] == stalled
    assert multiprocessing.active_children() == []


def test_errors_in_the_order_of_samples_are_their_own() -> None:
    """Here no process has died."""

    def order() -> Iterator[list[int]]:
        yield [0, 1]
        raise RuntimeError("lost")

    with read_batches(Faulty([]), order(), 1, "refuse", 0, pin=False) as batches:
        assert len(batches.next_step()) == 1
        with pytest.raises(RuntimeError, match=r"^lost$"):
            batches.next_step()


def test_a_sample_of_the_same_class_stands_in() -> None:
    """The next one of the class, around the end if need be; of another class where none is left."""
    labels = torch.tensor([0, 1, 0, 1, 2, 1])
    data = TensorData(torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 1, 8, 8), labels, 3)

    def skipping(bad: set[int]) -> list[int]:
        read = data.__getitems__

        def fails(indices: Sequence[int]) -> Batch:
            if bad & set(indices):
                raise OSError("cannot be read")
            return read(indices)

        with (
            pytest.MonkeyPatch.context() as patch,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            patch.setattr(data, "__getitems__", fails)
            with read_batches(data, iter([[0, 1, 2, 3, 4, 5]]), 1, "skip", 0, pin=False) as batches:
                (batch,) = batches.next_step()
        return batch["x0"][:, 0, 0, 0].int().tolist()

    assert skipping({0, 3}) == [2, 1, 2, 5, 4, 5]
    assert skipping({2, 5}) == [0, 1, 0, 3, 4, 1]
    assert skipping({4}) == [0, 1, 2, 3, 5, 5]


def test_a_list_of_what_cannot_be_read_is_short(tmp_path: Path) -> None:
    """However many samples there are, and however long each message."""
    data = TensorData(torch.zeros(2000, 1, 8, 8))
    read = data.__getitems__

    def fails(indices: Sequence[int]) -> Batch:
        if 0 not in indices:
            raise ValueError(f"{indices[0]}.png cannot be read: {'x' * 1000}")
        return read(indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "__getitems__", fails)
        with pytest.raises(
            ValueError, match=r"^1999 of 2000 samples cannot be read: 1\.png .* and 1987 more$"
        ) as error:
            check_readable(data, 100, "refuse", 0, progress=False)
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"loss": 1}\n',
            "metrics.jsonl is damaged in line 1.*; the run can go on without this file: move it elsewhere",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "metrics.jsonl is damaged in line 1"),
        ("metrics.jsonl", '{"step": "a"}\n', "metrics.jsonl is damaged in line 1"),
        ("config.json", '{"data": "x", "objective": OBJECTIVE}', "was trained with data='x', not"),
        ("config.json", '{"data": null, "objective": OBJECTIVE}', "config.json is damaged: its data is None"),
        ("provenance.json", '{"resumed": "x"}', "provenance.json is damaged"),
    ],
)
def test_odd_files_of_a_run_are_named(
    name: str, text: str, message: str, begun: Path, tmp_path: Path
) -> None:
    """When it is resumed, in one line."""
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    (folder / name).write_text(
        text.replace("OBJECTIVE", json.dumps(read_json(folder / "config.json")["objective"]))
    )
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        run(config(folder, "resume=true", "train.steps=4"))
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    if "damaged" in message:
        (folder / name).unlink()
        assert run(config(folder, "resume=true", "train.steps=4"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, from a configuration."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert run(config(folder, "train.steps=2"))
    return folder


def test_captioned_pictures_are_not_skipped(tmp_path: Path) -> None:
    """They are all read before the first step, and refused there: the setting would do nothing."""
    settings = {**config(tmp_path / "run"), "data": str(tmp_path), "train": {"on_error": "skip"}}
    with pytest.raises(ValueError, match=r"train.on_error=skip .* captioned"):
        run(settings)


class Ending(Faulty):
    """Ends the run where the bad sample's turn comes."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if BAD in indices:
            raise self.error
        return super().__getitems__(indices)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_whatever_ends_the_loop_saves(error: BaseException, unbroken: Path, tmp_path: Path) -> None:
    """Also what is no error of the data; it goes on as it is, and the run goes on bit for bit."""
    with (
        pytest.raises(type(error)),
        pytest.warns(UserWarning, match=f"the {before(BAD)} steps before the error are saved in") as said,
    ):
        fit(tmp_path, Ending(error))
    assert said[0].filename == __file__  # not a line of the library's own
    assert progress(tmp_path)["step"] == before(BAD)
    fit(tmp_path, Faulty([]), resume=True)
    assert_same(state(tmp_path), state(unbroken))


@pytest.mark.parametrize(
    "found", [crash, lambda: {"a": "text"}, lambda: None, lambda: 0.5, lambda: {"a": torch.zeros(2)}]
)
def test_an_evaluation_that_fails_loses_no_step(found: Callable[[], Any], tmp_path: Path) -> None:
    """Whether it raises, or returns what cannot be logged: that is a ValueError which names it."""
    model = fresh()
    params = TrainParams(**{**SMALL, "steps": 5, "evaluate_every": 3})

    def evaluate(model: Model) -> Any:
        assert progress(tmp_path)["step"] == 3  # before it begins: it may take the process along
        return found()

    with pytest.raises(
        RuntimeError if found is crash else ValueError,
        match=None if found is crash else "evaluate must return",
    ):
        train(model, denoising(model), Faulty([]), params, tmp_path, evaluate=evaluate, progress=False)


def test_what_could_not_be_saved_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that ended the run stays, and it is said which checkpoint is left."""

    def full(*_: object) -> None:
        raise OSError("cannot write: No space left on device")

    model = fresh()
    act = at_call(
        4, crash, at_call(3, lambda: monkeypatch.setattr(TrainState, "save", full), denoising(model))
    )
    params, left = TrainParams(**{**SMALL, "save_every": 2}), "the last good checkpoint, of step 2, is in"
    with (
        pytest.raises(RuntimeError, match=r"^crash$"),
        pytest.warns(
            UserWarning,
            match=f"the steps up to 3 are not saved, for cannot write: No space left on device; {left}",
        ),
    ):
        train(model, act, Faulty([]), params, tmp_path, progress=False)
    assert progress(tmp_path)["step"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_interrupts_where_it_may(number: signal.Signals) -> None:
    """The first one is a request, whichever it is."""
    for may in (False, True):
        stop = _StopRequest(lambda may=may: may)  # type: ignore[misc]  # bound in the loop
        with stop:
            signal.raise_signal(number)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt) if may else contextlib.nullcontext():
                signal.raise_signal(number)


def test_ctrl_c_twice_does_not_halve_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second one comes as the weights are updated, that step is finished and saved."""
    update = EMA.update

    def interrupted(self: EMA, network: torch.nn.Module) -> None:
        for _ in range(2):
            interrupt()
        update(self, network)

    monkeypatch.setattr(EMA, "update", interrupted)
    fit(tmp_path, Faulty([]))
    assert progress(tmp_path)["step"] == 1


@pytest.mark.parametrize("times", [1, 2])
def test_no_signal_interrupts_a_save(times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the one that a first signal asks for, nor the one after a second, which has interrupted a
    step."""
    write = native.write

    def interrupted(*arguments: Any) -> None:
        for _ in range(2):
            interrupt()
        write(*arguments)

    def stop() -> None:
        for _ in range(times):
            interrupt()

    monkeypatch.setattr(native, "write", interrupted)
    model = fresh()
    with pytest.raises(KeyboardInterrupt) if times == 2 else contextlib.nullcontext():
        assert not train(
            model,
            at_call(3, stop, denoising(model)),
            Faulty([]),
            TrainParams(**SMALL),
            tmp_path,
            progress=False,
        )
    assert progress(tmp_path)["step"] == {1: 3, 2: 2}[times]


def test_half_a_step_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the optimiser has moved the weights, and the average has not followed: the checkpoint before
    stays."""
    update, calls = EMA.update, []

    def failing(self: EMA, network: torch.nn.Module) -> None:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(self, network)

    monkeypatch.setattr(EMA, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, Faulty([]), save_every=2)
    assert progress(tmp_path)["step"] == 2


def test_an_error_before_the_first_step_leaves_a_folder_that_can_be_used_again(tmp_path: Path) -> None:
    """Nothing is there to be saved."""
    with pytest.raises(ValueError, match=r"^\d+\.png cannot be read as a picture$"):
        fit(tmp_path, Faulty(range(16)))
    fit(tmp_path, Faulty([]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_is_skipped_is_replaced_by_the_next(workers: int, tmp_path: Path) -> None:
    """The run is that of a data set in which the next readable sample stands there too, also when it is
    resumed in between."""
    bad = [BAD, BAD + 1, 15]
    expected = Faulty([])
    assert expected.labels is not None
    labels, good = expected.labels.tolist(), [j for j in range(16) if j not in bad]
    stand_in = [min(good, key=lambda j: (labels[j] != labels[i], (j - i) % 16)) for i in bad]
    expected.images[bad], expected.labels[bad] = expected.images[stand_in], expected.labels[stand_in]
    fit(tmp_path / "expected", expected, steps=24, log_every=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for stop in (7, 0):
            fit(
                tmp_path / "skipping",
                Faulty(bad),
                resume=True,
                stop=stop,
                steps=24,
                log_every=4,
                on_error="skip",
                workers=workers,
            )
    assert_same(state(tmp_path / "skipping", "network."), state(tmp_path / "expected", "network."))
    found = lines(tmp_path / "skipping")
    assert sum(line.pop("replaced_samples", 0) for line in found) == 3 * len(bad)  # in three epochs
    assert found == lines(tmp_path / "expected")
    once = [str(warning.message) for warning in said if "cannot be read" in str(warning.message)]
    assert {f"{i}.png" for i in bad} == {re.findall(r"\d+\.png", text)[0] for text in once}
    assert len(once) <= 2 * len(bad)  # once in each of the two


def test_what_is_no_fault_of_a_sample_is_not_skipped(tmp_path: Path) -> None:
    """Running out of memory; or none of them can be read."""
    with pytest.raises(ValueError, match="MemoryError while data was read"):
        fit(tmp_path / "memory", Faulty(fault=memory_error), on_error="skip")
    with pytest.raises(ValueError, match=r"none of the 16 samples can be read: \d+\.png cannot"):
        fit(tmp_path / "none", Faulty(range(16)), on_error="skip")


@pytest.mark.parametrize("workers", [0, 2])
def test_all_data_can_be_checked_before_the_first_step(workers: int, tmp_path: Path) -> None:
    """Every sample that cannot be read is named, and counted, in one line; with on_error=skip that is a
    warning."""
    found = (
        "3 of 16 samples cannot be read: 2.png cannot be read as a picture; 3.png cannot .*; 11.png cannot"
    )
    with pytest.raises(ValueError, match=found) as error:
        fit(tmp_path / "refused", Faulty((2, 3, 11)), check_data=True, workers=workers)
    assert "\n" not in str(error.value)
    assert {path.name for path in (tmp_path / "refused").iterdir()} == {LOCK}
    with pytest.warns(UserWarning, match=found):
        fit(tmp_path / "skipped", Faulty((2, 3, 11)), check_data=True, workers=workers, on_error="skip")
    fit(tmp_path / "whole", Faulty([]), check_data=True, workers=workers)
    assert steps(tmp_path / "whole") == list(range(1, 10))


def pair() -> tuple[World, World]:
    """Two processes that share a store, and are in no process group: any collective operation would raise."""
    store = HashStore()
    first, second = (World(rank, 2, torch.device("cpu"), store) for rank in (0, 1))
    return first, second


def test_others_wait_for_what_one_process_does() -> None:
    """As long as it takes, without a collective operation, several times; its result is known to itself
    alone."""
    first, second = pair()
    found: list[Any] = []

    def wait() -> None:
        for _ in range(2):
            found.append(second.on_leader(lambda: "never called"))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    for number in range(2):
        waiting.join(0.2)
        assert len(found) == number
        assert first.on_leader(lambda: "found") == "found"
    waiting.join(10)
    assert found == [None, None]


@pytest.mark.parametrize("error", [OSError("no space\nleft"), KeyboardInterrupt(), MemoryError()])
def test_an_error_of_the_one_ends_the_others(error: BaseException) -> None:
    """At once, in one line that says whose it was."""
    first, second = pair()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        first.on_leader(fail)
    reason = " ".join(str(error).split()) or type(error).__name__
    with pytest.raises(PeerError, match=f"process 0 has failed: {reason}$"):
        second.on_leader(fail)


def test_those_who_come_first_wait_for_the_others() -> None:
    """Several times, in no collective operation; and where another has ended with an error they end with its
    line."""
    first, second = pair()
    met: list[int] = []

    def wait() -> None:
        for number in range(2):
            second.barrier()
            met.append(number)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    for number in range(2):
        waiting.join(0.2)
        assert len(met) == number
        first.barrier()
    waiting.join(10)
    assert met == [0, 1]
    first.explain(ValueError("no such\npicture"))
    for wait_for_first in (second.barrier, lambda: second.on_leader(lambda: None)):
        with pytest.raises(PeerError, match=r"process 0 has failed: no such picture$"):
            wait_for_first()


def test_who_has_failed_says_why_though_others_end_before() -> None:
    """They say whose error it was, and it is still raised by the one whose it is."""
    first, second = pair()
    error = ValueError("no such picture")
    first.report_error(error)
    told = second.reported_error()
    assert second.explain(told) is told
    assert first.explain(error) is error
    broken = RuntimeError("connection closed by peer")
    assert str(second.explain(broken)) == "process 0 has failed: no such picture"


RANK = """
from pathlib import Path
import signal, sys
from train.world import PeerError, world

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as torchrun sends it when the other has ended
try:
    with world("cpu") as where:
        where.any(True)
        if where.rank == 1:
            raise RuntimeError("out of\\nmemory")
        where.any(True)
except PeerError as error:
    Path(sys.argv[1]).write_text(str(error))
"""


def test_an_error_of_one_process_ends_a_collective_operation_of_the_others(tmp_path: Path) -> None:
    """Whatever it is: the others say whose it was, in a line, as soon as they find the connection closed."""
    (tmp_path / "rank.py").write_text(RANK)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "rank.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*launch, str(tmp_path / "said")], env=environment, capture_output=True, timeout=100)
    assert (tmp_path / "said").read_text() == "process 1 has failed: out of memory"


FOREIGN: dict[str, dict[str, str]] = {
    "model": {
        "config.json": '{"_class_name": "UNet2DConditionModel"}',
        "diffusion_pytorch_model.safetensors": "weights",
    },
    "weights": {"model.safetensors": "weights"},
    "metrics": {"metrics.jsonl": '{"step": 1, "loss": 0.3}\n'},
    "damaged": {"config.json": "{"},
    "no object": {"config.json": "[1]"},
    "provenance": {"provenance.json": "{}"},
    "pictures": {"cat/1.png": "picture"},
    "notes": {"notes.txt": "do not touch"},
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("files", FOREIGN.values(), ids=list(FOREIGN))
def test_a_folder_of_somebody_else_is_refused(files: dict[str, str], resume: bool, tmp_path: Path) -> None:
    """By the name of what is in it, before anything is written."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    first = sorted(path.name for path in tmp_path.iterdir())[0]
    with pytest.raises(ValueError, match=rf"{tmp_path} holds {first}.*, which no training run writes: run="):
        run(config(tmp_path, f"resume={str(resume).lower()}"))
    assert {
        str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    } == files


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file of that name, or in its way, a link that leads nowhere: the line names the folder."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    for name in ("file", "file/run", "link"):
        with pytest.raises(OSError, match=rf"^cannot make the run folder {tmp_path / name}: "):
            go(tmp_path / name)


def test_leftovers_do_not_block(tmp_path: Path) -> None:
    """Hidden files, a lock, logs that a shell writes there, and a run that was killed before its first
    checkpoint."""
    for name in (
        ".hydra/config.yaml",
        ".DS_Store",
        LOCK,
        "train.log",
        "slurm-1.out",
        ".config.json.tmp/x/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert run(config(tmp_path, "train.steps=2"))
    for name in (native.FILE_NAME, "config.json"):
        (tmp_path / name).unlink()
    assert run(config(tmp_path, "train.steps=2"))
    (tmp_path / native.FILE_NAME).unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert run(config(tmp_path, "train.steps=2", "resume=true"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_training_at_a_time(tmp_path: Path) -> None:
    """A second one in the same folder is refused while the first is at work, and nothing of it changes."""
    go(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with locked(tmp_path / LOCK):
        for second in (
            lambda: go(tmp_path, resume=True, steps=8),
            lambda: run(config(tmp_path, "resume=true")),
        ):
            refused = rf"another training is using {tmp_path} \(process {os.getpid()} on "
            with pytest.raises(
                ValueError,
                match=refused if second.__code__.co_names[0] == "go" else "was trained with|another training",
            ):
                second()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    go(tmp_path, resume=True, steps=8)


def test_without_locks_a_warning_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"):
        go(tmp_path)


def damage(file: Path, place: float) -> None:
    """Change one bit at that share of a file."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 7, and saved at 3 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    model = fresh()
    go(folder, at_call(7, interrupt, denoising(model)), model, steps=9, log_every=2)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is not."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    go(folder, steps=9, log_every=2)
    return folder


@pytest.fixture
def stopped(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("place", [0.0001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.99999])
def test_a_damaged_checkpoint_is_noticed(place: float, stopped: Path, uninterrupted: Path) -> None:
    """One bit, wherever it is; the run goes on from the checkpoint before, says so, and ends as one that was
    never damaged."""
    damage(stopped / native.FILE_NAME, place)
    with pytest.warns(
        UserWarning, match=rf"{native.FILE_NAME}.*: going on from step 6, of {re.escape(PREVIOUS)}"
    ):
        go(stopped, resume=True, steps=9, log_every=2)
    assert_same(state(stopped), state(uninterrupted))
    assert lines(stopped) == lines(uninterrupted)
    assert native.read(stopped / PREVIOUS)[1]["progress"]["step"] == 6  # the damaged one was not kept


def test_zeros_in_place_of_pages(stopped: Path) -> None:
    """As after a crash of the machine; and a last checkpoint that is gone."""
    content = bytearray((stopped / native.FILE_NAME).read_bytes())
    middle = len(content) // 8192 * 4096
    content[middle : middle + 4096] = bytes(4096)
    (stopped / native.FILE_NAME).write_bytes(content)
    with pytest.warns(UserWarning, match="its contents do not match its checksum: going on from step 6"):
        go(stopped, resume=True, steps=8)
    (stopped / native.FILE_NAME).unlink()
    with pytest.warns(UserWarning, match="is gone: going on from step 6"):
        go(stopped, resume=True, steps=8)


def test_both_checkpoints_damaged(stopped: Path) -> None:
    """One line, and no file changes."""
    for name in (native.FILE_NAME, PREVIOUS):
        damage(stopped / name, 0.5)
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(
        ValueError, match=r"do not match its checksum.* no checkpoint is left to resume from"
    ) as error:
        go(stopped, resume=True, steps=8)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in stopped.iterdir() if path.name != LOCK} == {
        k: v for k, v in before.items() if k != LOCK
    }


def test_a_checkpoint_of_an_earlier_version_goes_on(stopped: Path, uninterrupted: Path) -> None:
    """It has no checksum, says how many processes there were, and keeps no sums."""
    tensors, metadata = native.read(stopped)
    del metadata["checksum"], metadata["progress"]["window"]
    settings = metadata["settings"]
    settings["train"]["accumulate"], settings["processes"] = settings.pop("parts"), 1
    native.write(stopped / native.FILE_NAME, tensors, metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(stopped, resume=True, steps=9)
    assert_same(state(stopped), state(uninterrupted))


def test_the_previous_checkpoint_is_the_one_before(tmp_path: Path) -> None:
    """Of a run that saves at 3 and 6."""
    go(tmp_path)
    assert [native.read(tmp_path / name)[1]["progress"]["step"] for name in (PREVIOUS, native.FILE_NAME)] == [
        3,
        6,
    ]


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """An optimiser that is lost while loss and gradient are finite: the last checkpoint stays, and is what
    the message says it is."""
    model = fresh()
    found: list[torch.optim.Optimizer] = []
    plain = torch.optim.AdamW.__init__

    class Kept(torch.optim.AdamW):
        def __init__(self, *args: Any, **settings: Any) -> None:
            plain(self, *args, **settings)
            found.append(self)

    def poison() -> None:
        next(iter(found[0].state.values()))["exp_avg_sq"].fill_(
            math.inf
        )  # that weight no longer moves, and everything else is finite

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Kept)
        with pytest.raises(
            FloatingPointError,
            match=r"after step 6 optimizer\.0\.exp_avg_sq .* good checkpoint, of step 3, is in",
        ):
            go(tmp_path, at_call(5, poison, denoising(model)), model, steps=20)
    assert progress(tmp_path)["step"] == 3
    assert all(value.isfinite().all() for value in state(tmp_path).values())


def square_root_at_zero(denoiser: Denoiser, batch: Batch) -> Tensor:
    """Its value is finite and its gradient is not."""
    loss = reconstruction(denoiser, batch)
    return loss + (loss - loss.detach()).sqrt()


@pytest.mark.parametrize("length", [20, 200])
def test_fp16_that_never_steps_is_an_error(length: int, tmp_path: Path) -> None:
    """After fifty steps in a row, or where a shorter run ends without any; nothing is saved, and
    metrics.jsonl is strict JSON."""
    with pytest.raises(
        FloatingPointError,
        match=rf"the last {min(length, 60)} steps up to .* fp16 trained nothing.*: use bf16 or fp32",
    ):
        go(tmp_path, square_root_at_zero, precision="fp16", steps=length, log_every=20, save_every=1000)
    assert not (tmp_path / native.FILE_NAME).exists()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["skipped_steps"] == 20


def test_fp16_that_looks_for_its_scale_is_none(tmp_path: Path) -> None:
    """A loss so large that the first steps are skipped: the gradient's norm is the mean of those that count,
    and the run ends well."""

    def large(denoiser: Denoiser, batch: Batch) -> Tensor:
        return reconstruction(denoiser, batch) * 2.0**20

    go(tmp_path, large, precision="fp16", steps=40, log_every=40, save_every=40)
    (line,) = lines(tmp_path)
    assert 5 < line["skipped_steps"] < 35
    assert math.isfinite(line["grad_norm"])


def test_fp16_whose_gradient_is_lost_is_an_error(tmp_path: Path) -> None:
    """Where its scale, after steps that overflowed, is so small that every gradient is 0: such a run would
    end, and train nothing."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor, factor: float) -> Tensor:
            context.factor = factor
            return x.clone()

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> Any:
            return gradients[0] * context.factor, None

    calls = 0

    def objective(denoiser: Denoiser, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return cast(Tensor, Scaled.apply(reconstruction(denoiser, batch), math.inf if calls <= 49 else 1.0))

    with pytest.raises(
        FloatingPointError, match=r"infinite or 0 in each of the last 60 steps up to 60.*: use bf16 or fp32"
    ):
        go(tmp_path, objective, precision="fp16", steps=200, log_every=20, save_every=1000)


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    """Scores that are not finite are left out; the others of the line stay."""
    model = fresh()
    params = TrainParams(**{**QUICK, "evaluate_every": 6})
    scores = {"a": math.nan, "b": math.inf, "c": 0.5}
    train(model, denoising(model), digits(), params, tmp_path, evaluate=lambda model: scores, progress=False)
    found = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert {"step": 6, "c": 0.5} in found


@pytest.mark.parametrize("stop", [interrupt, crash], ids=["stopped", "failed"])
def test_an_evaluation_that_was_cut_short_is_made_up_for(stop: Callable[[], None], tmp_path: Path) -> None:
    """The metrics of a run that stops as it evaluates, and goes on, are those of one that never stopped."""

    def go_on(folder: Path, *acts: Callable[[], None]) -> None:
        left = list(acts)

        def evaluate(model: Model) -> dict[str, float]:
            if left:
                left.pop()()
            return {"score": float(sum(p.detach().sum() for p in model.network.parameters()))}

        params = TrainParams(**{**QUICK, "evaluate_every": 3, "log_every": 2})
        for _ in range(2 if acts else 1):
            model = fresh()
            try:
                train(
                    model,
                    denoising(model),
                    digits(),
                    params,
                    folder,
                    evaluate=evaluate,
                    resume=True,
                    progress=False,
                )
            except RuntimeError:
                assert acts

    go_on(tmp_path / "whole")
    go_on(tmp_path / "parts", stop)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [2, 3, 4, 6, 6]


def test_other_parts_of_a_batch_go_on_with_a_warning(tmp_path: Path) -> None:
    """The batches and their order stay; the noise does not."""
    go(tmp_path, reconstruction, accumulate=2, steps=3)
    with pytest.warns(
        UserWarning, match=r"in 2 parts \(processes x train.accumulate\), and goes on with 1: .* other noise"
    ):
        go(tmp_path, reconstruction, resume=True)
    go(tmp_path / "whole", reconstruction)
    for name, value in state(tmp_path, "network.").items():
        torch.testing.assert_close(value, state(tmp_path / "whole")[name], rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id is kept in the run's folder; another run has another."""
    begun: list[dict[str, Any]] = []

    def init(**settings: Any) -> Any:
        begun.append(settings)
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, login=lambda **_: False))
    for folder, more in (("a", []), ("a", ["resume=true", "train.steps=4"]), ("b", [])):
        assert run(config(tmp_path / folder, "wandb=true", "train.steps=2", *more))
    first, second, other = begun
    assert (
        first["id"] == second["id"] == read_json(tmp_path / "a" / "provenance.json")["wandb"] != other["id"]
    )
    assert {settings["resume"] for settings in begun} == {"allow"}
    assert {settings["mode"] for settings in begun} == {"offline"}


def test_params_say_what_they_take() -> None:
    """on_error is one of two."""
    assert {field.name for field in dataclasses.fields(TrainParams)} >= {"on_error", "check_data"}
    with pytest.raises(ValueError, match=r"train.on_error must be .*refuse.*skip"):
        run(config(Path("unused"), "train.on_error=ignore"))
