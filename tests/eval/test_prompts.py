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


SLUGS = [
    "red-cat",
    "blue-cat",
    "wet-owl",
    "dry-fox",
    "old-dog",
    "new-hen",
    "big-ant",
    "low-eel",
    "hot-bee",
    "odd-cow",
    "shy-yak",
    "far-elk",
]
PADDED, BARE = [f"{i:04d}" for i in range(1, 13)], [str(i) for i in range(1, 13)]
LINES = [f"a {slug.replace('-', ' ')}" for slug in SLUGS]


@pytest.mark.parametrize(
    "names",
    [
        [f"{number}.png" for number in PADDED],
        [f"{number}.png" for number in BARE],
        [f"{number}.jfif" for number in BARE],
        [str(int(number) - 1) for number in BARE],
        [f"{int(number) + 41}.png" for number in BARE],
        [f"seed {int(number) + 91}" for number in BARE],
        [f"img_{number}_final.png" for number in BARE],
        [f"{number}-{slug}.png" for number, slug in zip(BARE, SLUGS, strict=True)],
        [f"{slug}_{number}.png" for number, slug in zip(BARE, SLUGS, strict=True)],
        [f"{slug}_{number}.png" for number, slug in zip(PADDED, SLUGS, strict=True)],
        [f"{number}-{3871 * int(number) % 1009}.png" for number in BARE],
        [f"{3871 * int(number) % 1009:04d}-{number}.png" for number in PADDED],
        [f"sd15_cfg-7.5-{number}.png" for number in BARE],
        [f"{int(number) % 3}/{number}.png" for number in PADDED],
        [f"{number}_of_12_{int(number) % 4}-cats.png" for number in BARE],
        [f"{int(number):0{1 + int(number) % 3}d}.png" for number in BARE],
        [f"{2 * int(number):04d}.png" for number in BARE],
        [f"{int(number) // 3:02d}_{int(number) % 3}.png" for number in BARE],
        [f"{slug}.png" for slug in sorted(SLUGS)],
    ],
    ids=lambda names: names[-1],
)
def test_prompts_in_order_go_to_the_pictures_of_their_numbers(names: list[str], tmp_path: Path) -> None:
    """Line i is of the i-th picture by number, however numbers are written, wherever they begin, and whatever order the source has."""
    lines = [f"a {name.split('.')[0]}" for name in names] if not any(map(str.isdigit, "".join(names))) else LINES
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("\n".join(["prompt", *lines]))
    wanted = dict(zip(names, lines, strict=True))
    for order in (names, sorted(names)):
        assert read_prompts(tmp_path / "a.txt", order) == read_prompts(tmp_path / "a.csv", order) == [wanted[name] for name in order]


@pytest.mark.parametrize(
    ("names", "doubtful"),
    [
        ([*(f"{number}.png" for number in BARE), "overview.png"], ("10.png", "2.png")),
        ([*(f"{slug}_{number}.png" for number, slug in zip(PADDED, SLUGS, strict=True)), "overview.png"], ("big-ant_0007", "red-cat_0001")),
        (["1.png", "2.png", "10.png"], ("10.png", "2.png")),
        (["1.jpg", "1.png", "2.png"], ("1.jpg", "1.png")),
        (["1/7.png", "10/3.png", "2/5.png"], ("10/3.png", "2/5.png")),
        (["a10.png", "a2.png", "b.png"], ("a10.png", "a2.png")),
        (["cat-1.png", "cat-2.png", "dog-1.png"], ("cat-1.png", "dog-1.png")),
        (["cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png"], ("cat/000.png", "dog/000.png")),
        (["8b1f.png", "a3e9.png", "c07d.png"], ("8b1f.png", "a3e9.png")),
        (["1-3.png", "2-1.png", "3-2.png"], ("1-3.png", "2-1.png")),
        (["Zebra.png", "apple.png"], ("Zebra.png", "apple.png")),
        (["an-owl.png", "a-red-cat.png"], ("a-red-cat.png", "an-owl.png")),
        (["cat-big/a.png", "cat/z.png"], ("cat/z.png", "cat-big/a.png")),
    ],
    ids=str,
)
def test_prompts_whose_order_is_in_doubt_are_refused(names: list[str], doubtful: tuple[str, str], tmp_path: Path) -> None:
    """Orders that disagree, numbers with gaps that sort as text, that come back, that only some have: one line says how to name them."""
    names = sorted(names, key=lambda name: name.split("/"))
    lines = [f"prompt {name}" for name in names]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("\n".join(["prompt", *lines]))
    for file in (tmp_path / "a.txt", tmp_path / "a.csv"):
        said = refusal(lambda file=file: read_prompts(file, names))  # type: ignore[misc]
        assert f"{file} names no pictures" in said
        assert all(name in said for name in doubtful)
        assert '.jsonl file, {"file_name": "' in said
    assert "the list of prompts names no pictures" in refusal(lambda: prompts_for(lines, names))
    wanted = dict(zip(names, lines, strict=True))
    (tmp_path / "a.json").write_text(json.dumps(wanted))
    assert read_prompts(tmp_path / "a.json", names) == prompts_for(wanted, names) == lines


def test_names_that_read_like_other_prompts_are_refused(tmp_path: Path) -> None:
    """Pictures called by their prompts, and prompts in another order than the names: nothing but the words tells."""
    (tmp_path / "a.txt").write_text("a red cat, sleeping\na blue dog\n")
    said = refusal(lambda: read_prompts(tmp_path / "a.txt", ["a-blue-dog.png", "a-red-cat.png"]))
    assert "its order gives a-blue-dog.png another prompt than 'a blue dog'" in said
    (tmp_path / "a.txt").write_text("a blue dog\na red cat, sleeping\n")
    assert read_prompts(tmp_path / "a.txt", ["a-blue-dog.png", "a-red-cat.png"])[0] == "a blue dog"


def test_a_list_in_python_is_never_dealt_out_anew(tmp_path: Path) -> None:
    """Who gives a list has seen the order of the names: where numbers have another one, it is refused, and a mapping is asked for."""
    said = refusal(lambda: prompts_for(["x", "y", "z"], ["1.png", "10.png", "2.png"]))
    assert said.endswith("which of 10.png and 2.png comes first: give them by name, {'2.png': prompt, ...}")


def test_names_written_elsewhere_are_found(tmp_path: Path) -> None:
    """é in one character or in two (macOS), "./" before a name; where both forms are there, each is its own."""
    one, two = "caf\u00e9.png", "cafe\u0301.png"
    for names, written in (([one], two), ([two], one), ([two], f"./{one}")):
        (tmp_path / "a.json").write_text(json.dumps({written: "a"}))
        assert read_prompts(tmp_path / "a.json", names) == ["a"]
    (tmp_path / "a.json").write_text(json.dumps({one: "a", two: "b"}))
    assert read_prompts(tmp_path / "a.json", [two, one]) == ["b", "a"]
    assert "more than one for caf" in refusal(lambda: read_prompts(tmp_path / "a.json", [one]))
    (tmp_path / "a.json").write_text(json.dumps({"Cat.PNG": "a"}))
    assert "has a prompt for Cat.PNG, which is none of the 1 pictures; did you mean cat.png?" in refusal(
        lambda: read_prompts(tmp_path / "a.json", ["cat.png"])
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a red cat\n".encode("utf-16-le"), "is no UTF-8 text: it holds NUL characters, as UTF-16 does"),
        ("a.csv", b"prompt\na\0b\n", "is no UTF-8 text: it holds NUL characters"),
        ("a.jsonl", b'{"file_name": "a.png", "prompt": "a", "prompt": "b"}', "line 1 is no JSON: two entries for prompt"),
        ("a.json", b'{"a.png": "a", "a.png": "b"}', "is no JSON: two entries for a.png"),
        ("a.csv", b"file_name,prompt,prompt\na.png,a,b\n", "has two columns of one name: file_name, prompt, prompt"),
        ("a.csv", b'prompt\n"' + b"x" * 200_000 + b'"\n', "is no comma-separated text: field larger than field limit"),
        ("a.json", b"[" * 100_000, "is no JSON: "),
        ("a.jsonl", json.dumps({"file_name": "b\n" * 9999, "prompt": "a"}).encode(), "has a prompt for b b b"),
    ],
    ids=["utf-16", "nul", "jsonl twice", "json twice", "csv twice", "long field", "deep", "long name"],
)
def test_odd_lists_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """What would otherwise be read as something else, or fill the screen: one line that names the file."""
    (tmp_path / name).write_bytes(content)
    said = refusal(lambda: read_prompts(tmp_path / name, ["a.png"]))
    assert said.startswith(str(tmp_path / name))
    assert message in said
    assert len(said) < 600


def test_lists_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    """A file of 4 GB, most of it a hole: refused by its size."""
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2**32)
    assert "has 4,294,967,296 bytes, more than the 268,435,456" in refusal(lambda: read_prompts(tmp_path / "a.txt", ["a.png"]))
