"""Files that are whole at any moment, and the JSON that accompanies runs and results."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

if sys.platform != "win32":
    import fcntl

MAX_JSON = 2**24  # bytes, of configurations, indices and results
MAX_JSON_LINES = 2**30  # bytes, of a run's metrics
_UMASK = os.umask(0)  # reading it sets it, so this is done once, before there are threads
os.umask(_UMASK)


@contextmanager
def replacing(path: str | Path, previous: Path | None = None) -> Iterator[Path]:
    """Within the block, a temporary path to write to; at its end that file takes the place of `path`, flushed to disk.

    A reader finds the old file or the new one, never a part, also after a crash; of several writers the last one wins, and none fails
    because of another. What a crash leaves behind, the next write of that path removes. Makes the folders it needs.

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
    """Hold the lock that is this file (made if missing) within the block; it ends with the process, however that ends.

    Yields False where the platform or the file system has no such locks. BlockingIOError where another process or thread holds it.
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
    """A new folder within the box, and the lock that shows others that it is in use; those in use no longer are removed."""
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
    """Give the file that is at `path` the name `previous` too; where a file system has no links, that name alone."""
    try:
        os.link(path, link)
        os.replace(link, previous)
    except OSError:
        os.replace(path, previous)


def _lock(path: Path) -> int | None:
    """An open file that holds the lock, None where there are no locks. BlockingIOError where it is held already."""
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
    """In a process that was forked: it shares open files with its parent, and must not hold on to a lock when that has ended."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locks)


def strict(value: Any) -> Any:
    """Plain values as strict JSON can hold them: numbers that are not finite become None, tuples lists, keys text."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """One object, indented for people; paths as text, numbers that are not finite as null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(strict(content), indent=2, default=str, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. ValueError where it is none, or nested too deeply."""
    return _parsed(text)


def parse_strict_json(text: str) -> Any:
    """What `parse_json` does; also ValueError for numbers that are not finite, by name or by size, and for whole ones beyond 64 bits."""
    return _parsed(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)


def _parsed(text: str | bytes, **numbers: Callable[[str], float]) -> Any:
    try:
        return json.loads(text, **numbers)  # type: ignore[arg-type]  # whose annotations know no mapping of them
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text:.40}, where a finite number is meant")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError(f"it holds {text:.40}, which is too large a number")
    return number


def read_bytes(path: str | Path, most: int) -> bytes:
    """What a file holds that has at most so many bytes. ValueError that names it where it has more, or is no file but a folder or pipe."""
    path = Path(path)
    if not path.is_file() and path.exists():
        raise ValueError(f"{path} cannot be read: it is a {'folder' if path.is_dir() else 'device or pipe'}, not a file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have")
        return file.read(size)


def read_text(path: str | Path, most: int) -> str:
    """What a file of at most so many bytes says (`decode_text`). ValueError as in `read_bytes` too."""
    return decode_text(path, read_bytes(path, most))


def decode_text(source: object, content: bytes) -> str:
    """UTF-8 as text, with line ends of any system. ValueError that names its source where it is something else."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text: {error}") from None
    if "\0" in text:
        raise ValueError(f"{source} is no UTF-8 text: it holds NUL characters, as UTF-16 does; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, most: int = MAX_JSON) -> dict[str, Any]:
    """One object, of a file of at most so many bytes. ValueError that names the file where it holds none."""
    text = read_text(path, most)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_json_lines(path: str | Path) -> list[dict[str, float]]:
    """A file of one JSON object per line, such as a run's metrics.jsonl; a last line that a crash cut short is left out.

    ValueError that names file and line for any other that is no object.
    """
    text = read_text(path, MAX_JSON_LINES)
    lines = text.splitlines()
    objects: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(dict(parse_json(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise ValueError(f"{path} is damaged in line {number}: {error}") from None
    return objects


def sha256_of_file(path: str | Path) -> str:
    """Of its bytes, in hexadecimal. FileNotFoundError where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
