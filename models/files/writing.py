"""Writes files that are complete at any moment, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

if sys.platform != "win32":
    import fcntl

_UMASK = os.umask(0)  # reading it sets it, so this is done once, before there are threads
os.umask(_UMASK)


@contextmanager
def replacing(path: str | Path, previous: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path to write to; after the block, the file replaces `path` and is flushed to disk.

    Readers see the old file or the new one, never a part, even after a crash. If there are several writers,
    the last one wins, and none fails because of another. The next write to the path removes what a crash
    left. Creates missing folders. OSError, which names the path, if it cannot be written.

    previous  the old file is moved here, if there is one: at any moment one of the two exists
    """
    path = Path(path)
    with _draft(path) as temporary:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # some writers make files that nobody else may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, temporary.with_name("previous"), previous)
        os.replace(temporary, path)


def check_writable(path: str | Path) -> None:
    """OSError unless a file can be written there, to be called before hours of work."""
    path = Path(path)
    with _draft(path) as temporary:
        temporary.touch()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")


@contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Hold a lock on this file, which is created if missing, until the block or the process ends.

    Yields False if the platform or the file system has no locks. BlockingIOError if another process or thread
    holds it.
    """
    lock = _lock(Path(path))
    try:
        yield lock is not None
    finally:
        _unlock(lock)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A path to write to in this writer's own folder, .NAME.tmp/*/, which is removed after the block."""
    box = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own, lock = _own_folder(box)
        try:
            yield own / path.name
        finally:
            shutil.rmtree(own, ignore_errors=True)
            _unlock(lock)
            with suppress(OSError):  # another writer may use it
                box.rmdir()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def _own_folder(box: Path) -> tuple[Path, int | None]:
    """A new folder within the box, and the lock that shows its use. Removes abandoned folders."""
    while True:
        with suppress(FileExistsError):  # exist_ok would look again, and another writer may remove it between
            box.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):  # another writer removed the box or the folder
            for left in list(box.iterdir()):
                _remove_unless_locked(left)
            own = Path(mkdtemp(dir=box))
            lock = _lock(own / "lock")
            if lock is None or (own / "lock").exists():
                return own, lock
            _unlock(lock)


def _remove_unless_locked(folder: Path) -> None:
    try:
        lock = _lock(folder / "lock")
    except OSError:
        return
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _keep(path: Path, link: Path, previous: Path) -> None:
    """Give the file at `path` the name `previous` too; on a file system without links, only that name."""
    try:
        os.link(path, link)
        os.replace(link, previous)
    except OSError:
        os.replace(path, previous)


def _lock(path: Path) -> int | None:
    """An open file that holds the lock, None without support for locks. BlockingIOError if it is held."""
    if sys.platform == "win32":
        return None
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _LOCKS.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        _unlock(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(errno.EWOULDBLOCK, "it is locked", str(path)) from None
        return None
    return file


def _unlock(lock: int | None) -> None:
    if lock is not None:
        _LOCKS.discard(lock)
        os.close(lock)


_LOCKS: set[int] = set()


def _close_locks() -> None:
    """Called in a forked process, which shares open files and must not keep its parent's locks."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locks)
