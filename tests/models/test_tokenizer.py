"""CLIP's tokens: ids as published, as open_clip and as transformers give them, and the vocabulary without the
packages around it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from models.text import clip_tokenizer
from models.text.clip_tokenizer import BOS, EOS, detokenize, openai_tables, tokenize
from tests.models.text_peers import padded, transformers_tokenizer
from tests.peers import open_clip, transformers

ALPHABETS = {
    "ascii": [chr(c) for c in range(32, 127)],
    "words": [
        "cat ",
        "Dog ",
        "don't ",
        "we'll ",
        "I'M ",
        "it's",
        "they've",
        "1984 ",
        "4k ",
        "f/1.8 ",
        "(red:1.3)",
        "--",
        "...",
        ", ",
    ],
    "accents": [chr(c) for c in range(0xC0, 0x250) if c not in (0x130, 0x149)]
    + ["e\u0301", "A\u030a"],  # also decomposed ones
    "greek and cyrillic": [chr(c) for c in range(0x391, 0x450) if chr(c).isalpha() and chr(c) != "Σ"],
    "cjk": [chr(c) for c in range(0x4E00, 0x4F00)]
    + [chr(c) for c in range(0x3041, 0x3097)]
    + list("、。「」한국어"),
    "emoji": [*"😀🎉☕✨👍🏽🇫🇷", "👩\u200d🚀", "❤\ufe0f"],
    "html": ["&amp;", "&lt;b&gt;", "&amp;quot;", "&eacute;", "&#233;", "&nope;", " & ", "a<b "],
    "spaces and controls": [
        "a",
        "b ",
        "\t",
        "\n",
        "\r\n",
        "\x00",
        "\x07",
        "\x1b[31m",
        "\x7f",
        "\xa0",
        "\u2028",
        "\u3000",
        "\ufeff",
    ],
    "typography": [
        "\u2019tis ",
        "\u201cso\u201d ",
        "ﬁne ",
        "\uff57\uff49\uff44\uff45 ",
        "—",
        "…",
        "schÃ¶n ",
        "â€™",
    ],
}


def corpus(alphabet: str) -> list[str]:
    """Texts of 0 to 60 symbols, spaces among them, the same in every run."""
    draw = random.Random(alphabet)
    symbols = ALPHABETS[alphabet] + [" "] * (len(ALPHABETS[alphabet]) // 5)
    return ["".join(draw.choices(symbols, k=draw.randrange(61))) for _ in range(60)]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),  # in the examples of both packages' documentation
        ("Hello,   WORLD!", [3306, 267, 1002, 256]),
    ],
)
def test_known_ids(text: str, ids: list[int]) -> None:
    """Prompts whose ids are widely published."""
    assert tokenize(text) == ids


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_ids_equal_open_clip(alphabet: str) -> None:
    """BOS, our ids, EOS and zeros are what open_clip.tokenize gives, which cuts at 77."""
    texts = corpus(alphabet)
    rows = [[BOS, *tokenize(text)[:75], EOS] for text in texts]
    assert [row + [0] * (77 - len(row)) for row in rows] == padded(texts).tolist()


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_ids_equal_transformers_on_clean_text(alphabet: str) -> None:
    """Once a text is cleaned as CLIP's training texts were, transformers' tokenizer, an implementation of its
    own, gives our ids."""
    peer = transformers_tokenizer()
    for text in corpus(alphabet):
        assert peer(open_clip.tokenizer.basic_clean(text)).input_ids == [BOS, *tokenize(text), EOS], repr(
            text
        )


@pytest.mark.parametrize("alphabet", ["ascii", "words", "greek and cyrillic", "cjk", "emoji"])
def test_ids_equal_transformers_on_any_text_in_common_use(alphabet: str) -> None:
    """Where there is nothing to clean but white space and capitals, they do without."""
    peer = transformers_tokenizer()
    for text in corpus(alphabet):
        assert peer(text).input_ids == [BOS, *tokenize(text), EOS], repr(text)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("tom &amp; jerry", "tom & jerry"),  # transformers reads "& amp ;"
        ("it\u2019s a \u201ctest\u201d", 'it\'s a "test"'),  # transformers keeps typographic quotes
        ("ﬁne schÃ¶n", "fine schön"),
        ("a\x00b\x07c", "abc"),
    ],
)
def test_cleans_where_transformers_does_not(text: str, same: str) -> None:
    """Peers differ: open_clip and OpenAI's CLIP, with which the towers were trained, mend and unescape first.
    We follow them."""
    peer = transformers_tokenizer()
    assert tokenize(text) == tokenize(same)
    assert peer(text).input_ids != peer(same).input_ids


def test_names_of_special_tokens_are_those_of_open_clip() -> None:
    """Peers differ: transformers reads <|endoftext|> as the end of text, open_clip <end_of_text>; to each the
    other is text."""
    peer = transformers_tokenizer()
    for text, ours, theirs in [("a <|endoftext|> b", False, True), ("a <end_of_text> b", True, False)]:
        assert (EOS in tokenize(text)) == ours == (EOS in open_clip.tokenize(text)[0, :4])
        assert (EOS in peer(text).input_ids[:-1]) == theirs
    assert tokenize("<start_of_text>") == [BOS]


def test_an_exclamation_mark_is_no_padding() -> None:
    """Peers differ: OpenCLIP's towers are padded with token 0, whose text is "!". In transformers, which pads
    by a text, every "!" in a prompt becomes padding; open_clip reads it as the word it is, and so do we.
    """
    assert tokenize("hello!") == open_clip.tokenize("hello!")[0, 1:3].tolist() == [3306, 256]
    assert transformers_tokenizer("!")("hello!").input_ids == [BOS, 3306, 0, EOS]


def test_long_words_and_long_prompts() -> None:
    """There is no limit of length here: ids are open_clip's beyond the 77 that it cuts at."""
    text = "x" * 1500 + " the quick brown fox" * 200
    assert (
        tokenize(text)
        == open_clip.tokenize(text, context_length=3000)[0].tolist()[1 : len(tokenize(text)) + 1]
    )
    assert len(tokenize(text)) > 900


def test_detokenize_is_the_inverse_up_to_spelling() -> None:
    """Lower case, one space after each word; reading that again gives the same ids."""
    assert detokenize(tokenize("A photo of a Cat's hat, 8K")) == "a photo of a cat 's hat , 8 k"
    assert detokenize([]) == ""
    for alphabet in ("ascii", "words", "cjk", "emoji"):
        for text in corpus(alphabet):
            assert detokenize(tokenize(text)).replace(" ", "") == "".join(text.lower().split()), repr(text)


def test_detokenize_refuses_what_is_no_token() -> None:
    """An id outside the vocabulary raises, also one before its first."""
    with pytest.raises(ValueError, match="49408 is not a token: ids are 0 to 49407"):
        detokenize([320, 49408])
    own = clip_tokenizer.Vocabulary(bos="a", eos="a", unk="a", pad="a", tokens={"a": 1}, merges=())
    with pytest.raises(ValueError, match="0 is not a token: ids are 0 to 1"):
        clip_tokenizer.CLIPTokenizer(own).detokenize([1, 0])


def test_tokenize_refuses_what_is_no_text() -> None:
    """Anything but a text raises."""
    with pytest.raises(ValueError, match="a prompt is a text, not 7"):
        tokenize(7)  # type: ignore[arg-type]


def test_vocabulary_is_that_of_published_folders(tmp_path: Path) -> None:
    """49408 tokens with BOS and EOS under their published names; vocab.json and merges.txt written from it
    load in transformers."""
    tokens, merges = openai_tables()
    assert sorted(tokens.values()) == list(range(49408))
    assert (tokens["!"], tokens["a</w>"], tokens["<|startoftext|>"], tokens["<|endoftext|>"]) == (
        0,
        320,
        BOS,
        EOS,
    )
    assert (len(merges), merges[0]) == (48894, ("i", "n"))
    (tmp_path / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    (tmp_path / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}'
    )
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    text = "A photograph of an astronaut riding a horse, 35mm"
    assert peer(text).input_ids == [BOS, *tokenize(text), EOS]


def test_needs_nothing_of_open_clip_but_its_one_file(tmp_path: Path) -> None:
    """Tokens come without the open_clip package, torchvision or transformers being imported, even where those
    are broken."""
    for name in ("torchvision", "transformers", "timm"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} is broken')\n")
    script = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(clip_tokenizer.__file__).parents[2])!r}]
from models.text.clip_tokenizer import tokenize
assert not sys.modules.keys() & {{"open_clip", "ftfy", "regex"}}
assert tokenize("a photo of a cat") == [320, 1125, 539, 320, 2368]
assert not sys.modules.keys() & {{"open_clip", "torchvision", "transformers", "timm"}}
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without open_clip, and with one that lacks a package, there is one error that names the remedy."""
    clip_tokenizer.openai_tokenizer.cache_clear()
    clip_tokenizer.openai_tables.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(clip_tokenizer, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install open-clip-torch"):
            tokenize("a cat")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ftfy", None)
        with pytest.raises(
            ValueError, match=r"ftfy \(.*ftfy.*\): pip install --force-reinstall open-clip-torch"
        ):
            tokenize("a cat")
    assert tokenize("a cat") == [320, 2368]
