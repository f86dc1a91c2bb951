"""Files that are whole at any moment, and the JSON beside runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from models.files import read_json, read_json_lines, replacing, write_json


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


def test_what_a_crash_left_behind_is_taken_over(tmp_path: Path) -> None:
    """A process that was killed within the block cannot clean up; its remains do not pile up."""
    path = tmp_path / "file"
    killed = replacing(path)
    killed.__enter__().write_text("half a file, and longer than the next")
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "whole")]


def test_unwritable_path_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file.r\.html"), replacing(tmp_path / "file" / "r.html"):
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
    """Only the last line can have been cut short; anything else was not written by us, and must not vanish in silence."""
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


@pytest.mark.parametrize(("content", "message"), [('{"a": 1', r"b\.json is damaged"), ("[1]", r"b\.json holds no JSON object")])
def test_a_file_without_an_object_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "b.json")
