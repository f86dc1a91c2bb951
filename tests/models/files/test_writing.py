"""Files that are whole at any moment, and the JSON beside runs."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.files import writing
from models.files.text import read_json, read_json_lines, write_json
from models.files.writing import check_writable, locked, replacing


def test_replaces_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content, before in (("old", None), ("new", "old")):
        with replacing(path) as temporary:
            temporary.write_text(content)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_error_within_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


# models/ as a package without its __init__.py: importing that takes seconds.
ALONE = f"""
import sys
from types import ModuleType
sys.modules["models"] = models = ModuleType("models")
models.__path__ = [{str(Path(writing.__file__).parents[1])!r}]
"""
KILLED = (
    ALONE
    + """
import os, signal
from models.files.writing import replacing

with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half a file, and longer than the next")
    os.kill(os.getpid(), signal.SIGKILL)
"""
)


def test_what_a_crash_left_behind_is_removed(tmp_path: Path) -> None:
    """A process that was killed within the block cannot clean up; the next write of that path does, so that
    remains do not pile up."""
    path = tmp_path / "file"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
        assert [each.name for each in tmp_path.iterdir()] == [".file.tmp"]
        assert len(list((tmp_path / ".file.tmp").iterdir())) == 1
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "whole"}


WRITER = (
    ALONE
    + """
import os
from threading import Thread
from models.files import writing
from models.files.text import read_json, write_json
from models.files.writing import check_writable

os.fsync = lambda file: None  # the disk is not what is tried here, and slow
def write(number):
    for i in range(40):
        write_json(sys.argv[1], {"writer": number, "numbers": [number] * (500 + 100 * i)})
        check_writable(sys.argv[1])
        found = read_json(sys.argv[1])
        assert set(found["numbers"]) == {found["writer"]}
        done.append(i)

done = []
threads = [Thread(target=write, args=(2 * int(sys.argv[2]) + i,)) for i in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(done))
"""
)


def test_many_writers_of_one_path(tmp_path: Path) -> None:
    """Three processes with two threads each: no write fails because of another, no reader sees a mixture,
    nothing is left behind."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file.json")]
    writers = [subprocess.Popen([*command, str(i)], stdout=-1, stderr=-1, text=True) for i in range(3)]
    assert [writer.communicate() for writer in writers] == [("80\n", "")] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_writer_within_the_block_of_another(tmp_path: Path) -> None:
    """Both finish; the one that ends last is what stays. A writer may also replace the temporary file by
    another one."""
    with replacing(tmp_path / "file") as outer:
        outer.write_text("outer")
        with replacing(tmp_path / "file") as inner:
            (tmp_path / "elsewhere").write_text("inner")
            os.replace(tmp_path / "elsewhere", inner)
        assert (tmp_path / "file").read_text() == "inner"
        assert outer.read_text() == "outer"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "outer")]


@pytest.mark.parametrize("links", [True, False])
def test_the_previous_file_is_kept(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its other name; also where the file system has no links. A failed write changes neither."""
    file, previous = tmp_path / "file", tmp_path / "previous"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.rmdir(file))  # raises OSError, as it is no folder
    for content in "abc":
        with replacing(file, previous) as temporary:
            temporary.write_text(content)
    with pytest.raises(ZeroDivisionError), replacing(file, previous):
        raise ZeroDivisionError
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"file": "c", "previous": "b"}


HOLDER = (
    ALONE
    + """
import os, time
from models.files.writing import locked

with locked(sys.argv[1]) as held:
    if os.fork() == 0:  # such as a process that decodes images, which may outlive this one
        print(held, flush=True)  # says that this one has begun: until then it shares the lock
        time.sleep(20)
        os._exit(0)
    time.sleep(20)
"""
)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """It is refused to others, within this process too, until its holder is killed, whatever processes that
    one has started."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=-1, text=True, start_new_session=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path / "lock") as held, pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        assert held
        os.killpg(holder.pid, signal.SIGKILL)
    with locked(tmp_path / "lock"):
        pass


def test_without_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems: a lock is not held, and what others have left is not touched."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for content in "ab":
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text(content)
    with locked(tmp_path / "lock") as held:
        assert not held
    assert (tmp_path / "file").read_text() == "b"


def test_unwritable_path_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"cannot write .*file.r\.html"),
        replacing(tmp_path / "file" / "r.html"),
    ):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*folder"), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_json_lines_without_the_one_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    first, second = read_json_lines(path)
    assert first == {"step": 1, "loss": 0.5}
    assert second["step"] == 2
    assert math.isnan(second["loss"])


@pytest.mark.parametrize("line", ['{"step": 1, "lo', "[1, 2]", "3"])
def test_json_lines_with_another_bad_line_are_refused(line: str, tmp_path: Path) -> None:
    """Only the last line can have been cut short; anything else was not written by us, and must not vanish in
    silence."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 2"):
        read_json_lines(path)


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    """Also where their writer makes them private, as safetensors does."""
    (tmp_path / "plain").write_text("")
    with replacing(tmp_path / "file") as temporary:
        temporary.touch(mode=0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", {})
    assert read_json_lines(tmp_path / "a.jsonl") == [{}]
    write_json(tmp_path / "b.json", {"loss": 0.5, "names": ["a"]})
    assert read_json(tmp_path / "b.json") == {"loss": 0.5, "names": ["a"]}


def test_json_is_strict(tmp_path: Path) -> None:
    """Numbers that are not finite are null wherever they stand; other readers than Python's refuse NaN and
    Infinity."""
    write_json(tmp_path / "a.json", {"a": math.inf, "b": [1.5, (-math.inf, {"c": math.nan})]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.5, [None, {"c": None}]]}


def test_a_place_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    """And looking leaves nothing there."""
    check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(OSError, match=r"cannot write .*new: it is a folder"):
        check_writable(tmp_path / "new")
    (tmp_path / "new" / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file.x"):
        check_writable(tmp_path / "new" / "file" / "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": 1', r"b\.json is damaged"), ("[1]", r"b\.json does not hold a JSON object")],
)
def test_a_file_without_an_object_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "b.json")
