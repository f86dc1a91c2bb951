"""Prompts and the pictures they belong to: every format, and no prompt that silently goes to another picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.images.prompts import prompts_for, read_prompts

NAMES = ["a.png", "b.png", "cats/c.png"]
PROMPTS = ["a bird", 'a "dog", wet\u2028and\u2028glad', "un\u2028café"]
PAIRS = dict(zip(NAMES, PROMPTS, strict=True))


def refusal(open_it: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """What is said, in one line."""
    with pytest.raises(kind) as said:
        open_it()
    assert "\n" not in str(said.value)
    return str(said.value)


def entries(key: str) -> list[dict[str, str]]:
    """In another order than the pictures."""
    return [{"file_name": name, key: PAIRS[name], "other": "x"} for name in reversed(NAMES)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\n".join(PROMPTS)),
        ("b.txt", "\ufeff" + "".join(f" {prompt} \r\n" for prompt in PROMPTS)),
        ("c.TXT", "\n".join(PROMPTS) + "\n"),
        ("a.jsonl", "\n\n".join(map(json.dumps, entries("prompt")))),
        ("b.jsonl", "\n".join(map(json.dumps, entries("text"))) + "\n"),
        ("a.json", json.dumps(entries("caption"))),
        ("b.json", json.dumps(PAIRS, ensure_ascii=False)),
        ("0.csv", 'prompt\na bird\n"a ""dog"", wet\u2028and\u2028glad"\nun\u2028café\n'),
        ("b.csv", 'prompt,file_name\nun\u2028café,cats/c.png\na bird,a.png\n"a ""dog"", wet\u2028and\u2028glad",b.png\n'),
    ],
    ids=lambda value: value if len(value) < 9 else "",
)
def test_every_format_gives_the_same_prompts(name: str, text: str, tmp_path: Path) -> None:
    """In the order of the pictures, white space around them cut, whatever the order in the file."""
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name, NAMES) == PROMPTS
    assert prompts_for(tmp_path / name, NAMES) == prompts_for(PROMPTS, NAMES) == PROMPTS


def test_one_prompt_may_belong_to_several_pictures(tmp_path: Path) -> None:
    """Captions need not differ, and a prompt of a csv file may span lines."""
    (tmp_path / "a.csv").write_text('file_name,prompt\na,"two\nlines"\nb,"two\nlines"\n')
    assert read_prompts(tmp_path / "a.csv", ["b", "a"]) == ["two\nlines"] * 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a\nb\n", "has 2 prompts for 3 pictures: give one each, or a .jsonl file that names the pictures"),
        ("a.txt", "a\nb\nc\nd", "has 4 prompts for 3 pictures"),
        ("a.txt", "", "has 0 prompts for 3 pictures"),
        ("a.txt", "a\n \nc\n", "prompt 2 of the 3 in {} is empty: write one, or leave out its picture"),
        ("a.csv", "prompt\na\nb\n", "has 2 prompts for 3 pictures"),
        ("a.csv", "name;prompt\na;b\n", "must have the columns file_name and prompt, or prompt alone, not name;prompt"),
        ("a.csv", "", "not none"),
        ("a.csv", "prompt\na dog, wet\nb\nc\n", "row 1 of {} has more than 1 columns: put quotes around prompts with commas in them"),
        ("a.csv", 'prompt\n"a" dog\n', "{} is no comma-separated text: "),
        ("a.csv", "file_name,prompt\na.png,a\nb.png\ncats/c.png,c", "prompt 2 of the 3 in {} is empty"),
        ("a.json", '{"a.png": "a", "b.png": "b"}', "has 2 prompts for 3 pictures, and none for cats/c.png: add what is missing"),
        ("a.json", '{"a.png": "a", "b.png": "b", "c.png": "c"}', "has a prompt for c.png, which is none of the 3 pictures; did you mean"),
        ("a.json", '{"a.png": "a", "b.png": ""}', "prompt 2 of the 2 in {} is empty"),
        ("a.json", '{"a.png": 1}', 'must hold {"cat.png": "a cat", ...} or a list'),
        ("a.json", '["a", "b", "c"]', '{}, entry 1 must be like {"file_name": "cat.png", "prompt": "a cat"}, not "a"'),
        ("a.json", "{", "is no JSON: "),
        ("a.jsonl", '{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": "b"}', "2 prompts, and more than one for a.png"),
        ("a.jsonl", '{"file_name": "a.png", "text": "a", "caption": "b"}', "{}, line 1 has both text and caption: keep one"),
        ("a.jsonl", '\n{"file_name": "a.png", "title": "a"}', "{}, line 2 must be like"),
        ("a.jsonl", '{"file_name": "zebra.jpeg", "text": "a"}', "which is none of the 3 pictures; the first is a.png"),
        ("a.jsonl", "a bird", "{}, line 1 is no JSON: "),
        ("a.yaml", "", "no kind of file with prompts named '.yaml'; known: .txt, .jsonl, .json, .csv"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    """Too few, too many, empty, unknown, twice, or not as it should be: one line with both numbers and what to do."""
    (tmp_path / name).write_text(text)
    said = refusal(lambda: read_prompts(tmp_path / name, NAMES))
    assert message.replace("{}", str(tmp_path / name)) in said


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Missing, and no text; a list is held to the same as a file."""
    assert refusal(lambda: read_prompts(tmp_path / "a.txt", NAMES), OSError) == f"no such file of prompts: {tmp_path / 'a.txt'}"
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path / 'a.txt'} is no UTF-8 text" in refusal(lambda: read_prompts(tmp_path / "a.txt", NAMES))
    assert "the list of prompts has 1 prompts for 3 pictures" in refusal(lambda: prompts_for(["a"], NAMES))
    assert "prompt 2 of the 3 in the prompts is empty" in refusal(lambda: prompts_for(["a", " ", "c"], NAMES))


@pytest.mark.parametrize(
    ("names", "doubtful"),
    [
        (["1.png", "10.png", "2.png"], ("10.png", "2.png")),
        (["img_1.png", "img_10.jpg", "img_2.png"], ("img_10.jpg", "img_2.png")),
        (["1/7.png", "10/3.png", "2/5.png"], ("10/3.png", "2/5.png")),
        (["1.png", "2.png", "3.png"], None),
        (["000001.png", "000002.png", "000010.png"], None),
        (["seed 9", "seed 10", "seed 11"], None),
        (["a10.png", "a2.png", "b.png"], None),
        (["000001.png", "000002.png", "1000000.png"], None),
    ],
    ids=str,
)
def test_prompts_in_order_need_an_order_without_doubt(names: list[str], doubtful: tuple[str, str] | None, tmp_path: Path) -> None:
    """10.png before 2.png: prompts written in the order of the numbers would go to other pictures. Named ones are not in doubt."""
    (tmp_path / "a.txt").write_text("x\ny\nz\n")
    (tmp_path / "a.csv").write_text("prompt\nx\ny\nz\n")
    (tmp_path / "a.json").write_text(json.dumps(dict(zip(names, "xyz", strict=True))))
    for file in (tmp_path / "a.txt", tmp_path / "a.csv"):
        if doubtful is None:
            assert read_prompts(file, names) == ["x", "y", "z"]
        else:
            said = refusal(lambda file=file: read_prompts(file, names))  # type: ignore[misc]
            assert f"{file} names no pictures, and {doubtful[0]} comes before {doubtful[1]}, so that the order of the prompts is" in said
            assert '.jsonl file, {"file_name": "' + doubtful[1] in said
    assert read_prompts(tmp_path / "a.json", names) == ["x", "y", "z"]
