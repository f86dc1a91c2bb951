"""Prompts and the pictures they belong to: every format, and no prompt that silently goes to another
picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion.messages import MAX_LINE
from train.data.captions import prompts_for, read_prompts

NAMES = ["a.png", "b.png", "cats/c.png"]
NUMBERED = ["a1.png", "a2.png", "a3.png"]
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
        ("c.TXT", "\n".join(PROMPTS) + "\n\n \r\n"),
        ("a.jsonl", "\n\n".join(map(json.dumps, entries("prompt")))),
        ("b.jsonl", "\n".join(map(json.dumps, entries("text"))) + "\n"),
        ("a.json", json.dumps(entries("caption"))),
        ("b.json", json.dumps(PAIRS, ensure_ascii=False)),
        ("0.csv", 'prompt\na bird\n"a ""dog"", wet\u2028and\u2028glad"\nun\u2028café\n'),
        (
            "b.csv",
            'prompt,file_name\nun\u2028café,cats/c.png\na bird,a.png\n"a ""dog"", '
            'wet\u2028and\u2028glad",b.png\n',
        ),
    ],
    ids=lambda value: value if len(value) < 9 else "",
)
def test_every_format_gives_the_same_prompts(name: str, text: str, tmp_path: Path) -> None:
    """In the order of the pictures, white space around them cut, whatever the order in the file."""
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    names = NAMES if "a.png" in text else NUMBERED
    assert read_prompts(tmp_path / name, names) == prompts_for(tmp_path / name, names) == PROMPTS
    assert prompts_for(PROMPTS, NUMBERED) == prompts_for(PAIRS, NAMES) == PROMPTS


def test_one_prompt_may_belong_to_several_pictures(tmp_path: Path) -> None:
    """Captions need not differ, and a prompt of a csv file may span lines."""
    (tmp_path / "a.csv").write_text('file_name,prompt\na,"two\nlines"\nb,"two\nlines"\n')
    assert read_prompts(tmp_path / "a.csv", ["b", "a"]) == ["two\nlines"] * 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a\nb\n", "has 2 prompts for 3 pictures: give one each, or a .jsonl file that names the "
                            "pictures"),
        ("a.txt", "a\nb\nc\nd", "has 4 prompts for 3 pictures"),
        ("a.txt", "", "has 0 prompts for 3 pictures"),
        ("a.txt", "a\n \nc\n", "prompt 2 of the 3 in {} is empty: write one, or leave out its picture"),
        ("a.csv", "prompt\na\nb\n", "has 2 prompts for 3 pictures"),
        ("a.csv", "name;prompt\na;b\n", "needs the columns file_name and prompt, or prompt, not "
                                        "name;prompt"),
        ("a.csv", "", "not none"),
        ("a.csv", "prompt\na dog, wet\nb\nc\n", "row 1 of {} has more than 1 columns: put quotes around "
                                                "prompts with commas in them"),
        ("a.csv", 'prompt\n"a" dog\n', "{} is not comma-separated text: "),
        ("a.csv", "file_name,prompt\na.png,a\nb.png\ncats/c.png,c", "prompt 2 of the 3 in {} is empty"),
        ("a.json", '{"a.png": "a", "b.png": "b"}', "has 2 prompts for 3 pictures, and none for "
                                                   "cats/c.png: add what is missing"),
        ("a.json", '{"a.png": "a", "b.png": "b", "c.png": "c"}', "has a prompt for c.png, which is none "
                                                                 "of the 3 pictures; did you mean"),
        ("a.json", '{"a.png": "a", "b.png": ""}', "prompt 2 of the 2 in {} is empty"),
        ("a.json", '{"a.png": 1}', 'must hold {"cat.png": "a cat", ...} or a list'),
        ("a.json", '["a", "b", "c"]', '{}, entry 1 must be like {"file_name": "cat.png", "prompt": "a '
                                      'cat"}, not "a"'),
        ("a.json", "{", "is not JSON: "),
        ("a.jsonl", '{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": "b"}',
            "2 prompts, and more than one for a.png"),
        ("a.jsonl", '{"file_name": "a.png", "text": "a", "caption": "b"}',
            "{}, line 1 has both text and caption: keep one"),
        ("a.jsonl", '\n{"file_name": "a.png", "title": "a"}', "{}, line 2 must be like"),
        ("a.jsonl", '{"file_name": "zebra.jpeg", "text": "a"}', "which is none of the 3 pictures; the "
                                                                "first is a.png"),
        ("a.jsonl", "a bird", "{}, line 1 is not JSON: "),
        ("a.yaml", "", "no kind of file with prompts named '.yaml'; known: .txt, .jsonl, .json, .csv"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    """Too few, too many, empty, unknown, twice, or not as it should be: one line with both numbers and what
    to do."""
    (tmp_path / name).write_text(text)
    said = refusal(lambda: read_prompts(tmp_path / name, NAMES))
    assert message.replace("{}", str(tmp_path / name)) in said


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Missing, and no text; a list is held to the same as a file."""
    assert (
        refusal(lambda: read_prompts(tmp_path / "a.txt", NAMES), OSError)
        == f"no such file of prompts: {tmp_path / 'a.txt'}"
    )
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path / 'a.txt'} is not UTF-8 text" in refusal(
        lambda: read_prompts(tmp_path / "a.txt", NAMES)
    )
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
        [f"{number}-{slug}-512x512.png" for number, slug in zip(BARE, SLUGS, strict=True)],
        [f"{slug}_seed{int(number) + 41}_{number}.png" for number, slug in zip(BARE, SLUGS, strict=True)],
        [f"sd15_cfg-7.5-{number}.png" for number in BARE],
        [f"1.5.{number}.png" for number in BARE],
        [f"img.{number}.png" for number in BARE],
        [f"{int(number) // 5}/{number}.png" for number in PADDED],
        [f"{number}_of_12.png" for number in BARE],
        [f"{'9' * 5000}{number}.png" for number in PADDED],
        [f"{int(number):0{1 + int(number) % 3}d}.png" for number in BARE],
        [f"{2 * int(number):04d}.png" for number in BARE],
        ["1.png", "2.png", "10.png"],
        ["v1.9.png", "v1.10.png"],
        [f"render_v2.{i}.png" for i in (9, 10, 11)],
        [f"epoch1.{i}.png" for i in range(12)],
        [f"img_0.{i}.png" for i in (8, 9, 10, 11)],
        ["1.1.png", "1.5.png", "1.10.png"],
        ["1-v0.9.png", "2-v0.10.png", "3-v0.10.png"],
        ["0.5.png", "0.6.png", "0.8.png"],
        ["0.05.png", "0.10.png", "0.25.png"],
        [f"0.{'9' * 5000}{i}.png" for i in (1, 2)],
    ],
    ids=lambda names: names[-1][-40:],
)
def test_prompts_in_order_go_to_the_pictures_of_their_numbers(names: list[str], tmp_path: Path) -> None:
    """Line i is of the i-th picture by number, however numbers are written, wherever they begin, and whatever
    order the source has."""
    lines = LINES[: len(names)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("\n".join(["prompt", *lines]))
    wanted = dict(zip(names, lines, strict=True))
    for order in (names, sorted(names)):
        assert (
            read_prompts(tmp_path / "a.txt", order)
            == read_prompts(tmp_path / "a.csv", order)
            == [wanted[name] for name in order]
        )


@pytest.mark.parametrize(
    "names",
    [
        [*(f"{number}.png" for number in BARE), "overview.png"],
        ["1.jpg", "1.png", "2.png"],
        ["1/7.png", "2/5.png", "10/3.png"],
        ["cat-1.png", "cat-2.png", "dog-1.png"],
        ["0-0.png", "0-1.png", "1-0.png", "1-1.png"],
        ["prompt-003_seed-2.png", "prompt-005_seed-0.png", "prompt-007_seed-1.png"],
        ["00000-99.png", "00001-5.png", "00002-77.png"],
        ["a-red-cat_seed42.png", "a-blue-dog_seed42.png"],
        ["a-red-cat-512x512.png", "a-blue-dog-512x512.png"],
        ["sdxl_a-red-cat.png", "sdxl_a-blue-dog.png"],
        ["cat.png", "bird.png", "owl.png"],
        ["dog, cat.png", "a-cat.png"],
        ["7-dogs.png", "3-cats.png"],
        ["3_cats.png", "1_dog.png", "2_owls.png", "2-eels.png"],
        ["y.png", "z.png", "aa.png", "ab.png"],
        ["x\u00b9.png", "x\u00b2.png", "x\u00b3.png"],
        ["\uff11.png", "\uff12.png"],
        ["i.png", "v.png", "ix.png"],
        ["jan.png", "feb.png"],
        ["03-jan.png", "01-feb.png"],
        ["Screenshot 9.00 AM.png", "Screenshot 1.00 PM.png"],
        ["1PM.png", "2AM.png"],
        ["s0.25.png", "s0.5.png", "s1.0.png"],
        ["0.25.png", "0.5.png"],
        ["0.1.png", "0.2.png", "0.15.png"],
        ["0.01.png", "0.2.png", "0.03.png"],
        ["cfg0.25_1.png", "cfg0.5_0.png"],
        ["-2.png", "0.png", "1.png"],
        ["f3.png", "0a.png", "99.png"],
        ["8b1f.png", "a3e9.png", "c07d.png"],
        ["image.png", "image (1).png"],
    ],
    ids=str,
)
def test_prompts_whose_order_is_in_doubt_are_refused(names: list[str], tmp_path: Path) -> None:
    """No number, several that disagree, one that comes back, that only some have, or that may be part of a
    prompt: one line."""
    names = sorted(names)
    lines = [f"prompt {name}" for name in names]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("\n".join(["prompt", *map(json.dumps, lines)]))
    for file in (tmp_path / "a.txt", tmp_path / "a.csv"):
        said = refusal(lambda file=file: read_prompts(file, names))  # type: ignore[misc]
        assert f"{file} names no pictures" in said
        assert f'.jsonl file, {{"file_name": "{names[0]}"' in said
    assert "the list of prompts names no pictures" in refusal(lambda: prompts_for(lines, names))
    wanted = dict(zip(names, lines, strict=True))
    (tmp_path / "a.json").write_text(json.dumps(wanted))
    assert read_prompts(tmp_path / "a.json", names) == prompts_for(wanted, names) == lines


def test_a_list_in_python_is_never_dealt_out_anew(tmp_path: Path) -> None:
    """Who gives a list has seen the order of the names: where numbers have another one, it is refused, and a
    mapping is asked for."""
    said = refusal(lambda: prompts_for(["x", "y", "z"], ["1.png", "10.png", "2.png"]))
    assert said.endswith("give them by name, {'1.png': prompt, ...}")
    assert prompts_for(["x"], ["cat.png"]) == ["x"]


def test_names_written_elsewhere_are_found(tmp_path: Path) -> None:
    """é in one character or in two (macOS), "./" before a name; where both forms are there, each is its
    own."""
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
        (
            "a.txt",
            "a red cat\n".encode("utf-16-le"),
            "is not UTF-8 text: it holds NUL characters, as UTF-16 does",
        ),
        ("a.csv", b"prompt\na\0b\n", "is not UTF-8 text: it holds NUL characters"),
        (
            "a.jsonl",
            b'{"file_name": "a.png", "prompt": "a", "prompt": "b"}',
            "line 1 is not JSON: two entries for prompt",
        ),
        ("a.json", b'{"a.png": "a", "a.png": "b"}', "is not JSON: two entries for a.png"),
        (
            "a.csv",
            b"file_name,prompt,prompt\na.png,a,b\n",
            "has two columns of one name: file_name, prompt, prompt",
        ),
        (
            "a.csv",
            b'prompt\n"' + b"x" * 200_000 + b'"\n',
            "is not comma-separated text: field larger than field limit",
        ),
        ("a.json", b"[" * 100_000, "is not JSON: "),
        (
            "a.jsonl",
            json.dumps({"file_name": "b\n" * 9999, "prompt": "a"}).encode(),
            "has a prompt for b b b",
        ),
    ],
    ids=["utf-16", "nul", "jsonl twice", "json twice", "csv twice", "long field", "deep", "long name"],
)
def test_odd_lists_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """What would otherwise be read as something else, or fill the screen: one line that names the file."""
    (tmp_path / name).write_bytes(content)
    said = refusal(lambda: read_prompts(tmp_path / name, ["a.png"]))
    assert said.startswith(str(tmp_path / name))
    assert message in said
    assert len(said) < MAX_LINE + 200


def test_lists_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    """A file of 4 GB, most of it a hole: refused by its size."""
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2**32)
    assert "has 4,294,967,296 bytes, more than the 268,435,456" in refusal(
        lambda: read_prompts(tmp_path / "a.txt", ["a.png"])
    )
