"""Files that are whole at any moment, whatever happens while they are written."""

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
    """Within the block, a temporary path to write to; at its end that file takes the place of `path`, flushed
    to disk.

    A reader finds the old file or the new one, never a part, also after a crash; of several writers the last
    one wins, and none fails because of another. What a crash leaves behind, the next write of that path
    removes. Makes the folders it needs.

    previous  where the old file is kept, if there is one: at every moment one of the two is there

    Raises OSError that names the path where it cannot be written.
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
    """OSError unless a file can be written there: for what is found out before hours of work."""
    path = Path(path)
    with _draft(path) as temporary:
        temporary.touch()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")


@contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Hold the lock that is this file (made if missing) within the block; it ends with the process, however
    that ends.

    Yields False where the platform or the file system has no such locks. BlockingIOError where another
    process or thread holds it.
    """
    lock = _lock(Path(path))
    try:
        yield lock is not None
    finally:
        _unlock(lock)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A path to write to in a folder of this writer's own, .NAME.tmp/*/, which is gone after the block."""
    box = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own, lock = _own_folder(box)
        try:
            yield own / path.name
        finally:
            shutil.rmtree(own, ignore_errors=True)
            _unlock(lock)
            with suppress(OSError):  # another writer may be in it
                box.rmdir()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def _own_folder(box: Path) -> tuple[Path, int | None]:
    """A new folder within the box, and the lock that shows others that it is in use; those in use no longer
    are removed."""
    while True:
        try:
            box.mkdir()
        except FileExistsError:
            if box.is_file():  # a temporary file of an earlier version of this library
                with suppress(OSError):
                    box.unlink()
        with suppress(FileNotFoundError, BlockingIOError):  # somebody else was tidying up
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
    """Give the file that is at `path` the name `previous` too; where a file system has no links, that name
    alone."""
    try:
        os.link(path, link)
        os.replace(link, previous)
    except OSError:
        os.replace(path, previous)


def _lock(path: Path) -> int | None:
    """An open file that holds the lock, None where there are no locks. BlockingIOError where it is held
    already."""
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
    """In a process that was forked: it shares open files with its parent, and must not hold on to a lock when
    that has ended."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locks)
