"""The folder of a run: whether it holds a run or something else, and a lock for one training at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

from diffusion.messages import warn
from models.files.text import read_json, read_json_lines
from models.files.writing import locked
from models.layouts import native
from train.logbook import METRICS, TENSORBOARD
from train.state import PREVIOUS
from train.world import World

NEEDED = ("run", "data", "model", "objective", "train")  # in a configuration
LOCK = ".lock"
LOGS = (".log", ".out", ".err")  # output of shells and clusters, which may exist before a run begins

_CLAIMED: ContextVar[frozenset[Path]] = ContextVar("claimed", default=frozenset())


def has_checkpoint(folder: Path, resume: bool) -> bool:
    """Whether the folder holds one. ValueError if it does and is not resumed, or holds something else."""
    begun = any((folder / name).exists() for name in (native.FILE_NAME, PREVIOUS))
    if begun and not resume:
        raise ValueError(f"{folder} holds a trained run: resume=true continues it, run=... starts another")
    if not begun:
        _check_is_run(folder)
    return begun


@contextmanager
def claim(folder: Path, world: World) -> Iterator[None]:
    """Lock the folder for this run within the block. Make it if missing. ValueError if another run has it.

    A block within the block shares the lock, and so do the processes of one torchrun.
    """
    path = folder.resolve()
    if path in _CLAIMED.get():
        yield
        return
    with ExitStack() as stack:
        world.on_leader(lambda: _lock(folder, stack))
        token = _CLAIMED.set(_CLAIMED.get() | {path})
        try:
            yield
        finally:
            _CLAIMED.reset(token)


def _lock(folder: Path, stack: ExitStack) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the run folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to the run folder {folder}")
    lock = folder / LOCK
    try:
        supported = stack.enter_context(locked(lock))
    except BlockingIOError:
        owner = lock.read_text().strip()
        raise ValueError(
            f"another training is using {folder} ({owner}): run=... starts one elsewhere, or wait until it "
            "has ended"
        ) from None
    if supported:
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    else:
        warn(f"the file system of {folder} has no locks: make sure that no other training uses this folder")


def _check_is_run(folder: Path) -> None:
    """ValueError for a folder with files that no run writes. A run need not have a checkpoint yet."""
    if not folder.is_dir() or _has_keys(folder / "config.json", *NEEDED):
        return
    foreign = sorted(path.name for path in folder.iterdir() if not _belongs_to_run(path))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{folder} holds {foreign[0]}{more}, which no training run writes: run=... names a new or an "
            "empty folder"
        )


def _belongs_to_run(path: Path) -> bool:
    """Whether a run may have written this before its first checkpoint. Hidden files and logs count too."""
    if path.name.startswith(".") or path.suffix in LOGS or path.name in ("wandb", TENSORBOARD):
        return True
    if path.name == "provenance.json":
        return _has_keys(path, "plain-diffusion", "command")
    if path.name == METRICS:
        return _is_metrics_log(path)
    return path.match("latents-*.safetensors")


def _is_metrics_log(path: Path) -> bool:
    try:
        lines = read_json_lines(path)
    except (ValueError, OSError):
        return False
    return not lines or any(line.keys() >= {"step", "loss", "lr", "samples_per_second"} for line in lines)


def _has_keys(path: Path, *keys: str) -> bool:
    """Whether it is a JSON file with these entries."""
    try:
        return path.is_file() and set(keys) <= read_json(path).keys()
    except (ValueError, OSError):
        return False
