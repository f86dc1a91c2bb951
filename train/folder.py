"""The folder of a run: whose it is, and that one training at a time is at work in it."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

from models.checkpoints import native
from models.files import locked, read_json, read_json_lines
from train.logbook import METRICS
from train.state import PREVIOUS
from train.world import World

NEEDED = ("run", "data", "model", "objective", "train")  # of a configuration
LOCK = ".lock"
LOGS = (".log", ".out", ".err")  # where shells and clusters are told to write, before anything is in the folder

_CLAIMED: ContextVar[frozenset[Path]] = ContextVar("claimed", default=frozenset())


def is_begun(folder: Path, resume: bool) -> bool:
    """Whether the folder holds a checkpoint. ValueError where it does and is not to be resumed, or where it holds something else."""
    begun = any((folder / name).exists() for name in (native.FILE_NAME, PREVIOUS))
    if begun and not resume:
        raise ValueError(f"{folder} already holds a trained run: resume=true goes on with it, run=... starts another")
    if not begun:
        _check_ours(folder)
    return begun


@contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Within the block the folder, made if missing, is this run's alone, until its process ends. ValueError where another run has it.

    Blocks within the block are part of it, and so are the processes of one torchrun.
    """
    own = folder.resolve()
    if own in _CLAIMED.get():
        yield
        return
    with ExitStack() as stack:
        world.lead(lambda: _lock(folder, stack))
        token = _CLAIMED.set(_CLAIMED.get() | {own})
        try:
            yield
        finally:
            _CLAIMED.reset(token)


def _lock(folder: Path, stack: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to the run folder {folder}")
    lock = folder / LOCK
    try:
        held = stack.enter_context(locked(lock))
    except BlockingIOError:
        owner = lock.read_text().strip()
        raise ValueError(
            f"another training is at work in {folder} ({owner}): run=... starts one elsewhere, or wait until that has ended"
        ) from None
    if held:
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    else:
        warnings.warn(f"the file system of {folder} has no locks: see to it that no other training uses this folder", stacklevel=2)


def _check_ours(folder: Path) -> None:
    """ValueError for a folder of somebody else's. One of a run that was killed before its first checkpoint is ours."""
    if not folder.is_dir() or _has_keys(folder / "config.json", *NEEDED):
        return
    strange = sorted(path.name for path in folder.iterdir() if not _may_be_there(path))
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(f"{folder} holds {strange[0]}{more}, which is not of a training run: run=... names a new or an empty folder")


def _may_be_there(path: Path) -> bool:
    """What is hidden, logs, and what a run begins with."""
    if path.name.startswith(".") or path.suffix in LOGS or path.name == "wandb":
        return True
    if path.name == "provenance.json":
        return _has_keys(path, "plain-diffusion", "command")
    if path.name == METRICS:
        return _is_our_log(path)
    return path.match("latents-*.safetensors")


def _is_our_log(path: Path) -> bool:
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
