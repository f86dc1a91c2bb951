"""Words of a model's own: read as transformers reads them, kept in every layout that can hold them, and
refused where they do not fit."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import models
from models.networks.clip import CLIPTextParams
from models.presets import TINY_TOWERS, miniature, tiny_description
from models.text.clip_tokenizer import (
    EOS,
    Vocabulary,
    open_clip_tokenizer,
    openai_tables,
    openai_tokenizer,
    write_clip_tokenizer,
)
from models.text.clip_tokenizer import CLIPTokenizer as Ours
from tests.models.files.pipelines import NUMBERS
from tests.peers import diffusers, transformers

PROMPTS = ["a photo of <cat-toy>, 35mm", "A <Cat-Toy>! (<sks>) x<sks>y [V] don't", "plain text with café", ""]


pytestmark = pytest.mark.usefixtures("quietly")


def learned(family: str, folder: Path, words: list[Any], second: list[Any] | None = None) -> Any:
    """A pipeline of diffusers whose towers have learned words, saved in a folder."""
    models.save(miniature(family), folder / "base", layout="diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "base")
    for suffix, added in (("", words), ("_2", second)):
        if added is not None:
            tokenizer, tower = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
            tokenizer.add_tokens(added)
            tower.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    pipe.save_pretrained(folder / "learned")
    return diffusers.DiffusionPipeline.from_pretrained(folder / "learned")


def flagged() -> list[Any]:
    token = transformers.tokenization_utils_base.AddedToken
    return [
        "<cat-toy>",
        token("<sks>", single_word=True),
        token("[V]", lstrip=True, rstrip=True, normalized=False),
        token("Ünicode", normalized=False, special=True),
        "two words",
    ]


def test_ids_equal_transformers(tmp_path: Path) -> None:
    """Of texts with the words in capitals, within others, beside blanks and punctuation; and after saving and
    opening again."""
    peer = learned("sd1", tmp_path, flagged()).tokenizer
    model = models.load(tmp_path / "learned")
    draw, symbols = (
        random.Random(0),
        [
            "<cat-toy>",
            "<CAT-toy>",
            "<sks>",
            "[V]",
            "[v]",
            "Ünicode",
            "ünicode",
            "two words",
            "two",
            *" !,.aé1'\n\t",
            "cat",
            "\u2019s",
            "&amp;",
        ],
    )
    texts = [*PROMPTS, *("".join(draw.choices(symbols, k=draw.randrange(12))) for _ in range(500))]
    models.save(model, tmp_path / "again", layout="diffusers")
    models.save(model, tmp_path / "native.safetensors")
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again/tokenizer")
    for opened in (
        model,
        models.load(tmp_path / "again"),
        models.load(tmp_path / "native.safetensors"),
        copy.deepcopy(model),
        model.unpacked(torch.float32),
    ):
        ours = opened.require("text").tokenizer("clip_l")
        assert [
            text for text in texts if [ours.bos, *ours.tokenize(text), ours.eos] != peer(text).input_ids
        ] == []
        assert opened.fingerprint == model.fingerprint
    assert [text for text in texts if again(text).input_ids != peer(text).input_ids] == []


def test_context_and_vector_equal_diffusers(tmp_path: Path) -> None:
    """Each tower of SDXL reads its own words. "!" stays a word for the tower that is padded with it, which
    diffusers makes padding."""
    peer = learned("sdxl", tmp_path, ["<cat-toy>"], ["<other>", "<cat-toy>"])
    model = models.load(tmp_path / "learned")
    text = model.require("text")
    assert [text.tokenizer(name).tokenize("<cat-toy>") for name in ("clip_l", "clip_g")] == [
        [EOS + 1],
        [EOS + 2],
    ]
    prompt = "a <cat-toy> and <other>"
    context, _, pooled, _ = peer.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    ours = text.encode([prompt], numbers=NUMBERS).condition
    assert torch.allclose(ours.context, context, atol=1e-5)
    assert torch.allclose(ours.vector[:, : pooled.shape[1]], pooled, atol=1e-5)
    assert text.tokenizer("clip_g").tokenize("hi!") == openai_tokenizer().tokenize("hi!")
    assert [reader.pad for reader in text.params.readers.values()] == [EOS, 0]


@pytest.mark.parametrize("words", [(["<cat-toy>"], None), ([], ["<cat-toy>"])])
def test_both_towers_read_one_text_where_one_has_words(words: tuple[list[Any], Any], tmp_path: Path) -> None:
    """OpenAI's vocabulary beside it is read as transformers reads it too, without mending: contexts stand
    side by side."""
    peer = learned("sdxl", tmp_path, *words)
    text = models.load(tmp_path / "learned").require("text")
    for prompt in (
        "it\u2019s a \u201cred\u201d cat &amp; dog",
        "a <|endoftext|> <|startoftext|> café, 35MM  x",
        "",
    ):
        ids = {name: text.tokenizer(name).tokenize(prompt) for name in ("clip_l", "clip_g")}
        assert ids["clip_l"] == ids["clip_g"] == peer.tokenizer(prompt, add_special_tokens=False).input_ids
        context, _, _, _ = peer.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        assert torch.allclose(text.encode([prompt], numbers=NUMBERS).condition.context, context, atol=1e-5)


def test_words_of_several_vectors_are_read_whole(tmp_path: Path) -> None:
    """As diffusers' pipelines do: behind the first vector come the others, unless they stand there already;
    weights hold for all."""
    peer = learned("sd1", tmp_path, ["<cat>", "<cat>_1", "<cat>_2"])
    text = models.load(tmp_path / "learned").require("text")
    right = peer.encode_prompt("a <cat> on a mat", "cpu", 1, False)[0]
    for prompt in ("a <cat> on a mat", "a <cat> <cat>_1 <cat>_2 on a mat"):
        assert torch.allclose(text.encode([prompt]).condition.context, right, atol=1e-5)
    plain, empty = right[0], text.encode([""]).condition.context[0]
    weighted = text.encode(["a (<cat>:1.5) on a mat"], weighted=True).condition.context[0]
    expected = plain.clone()
    expected[2:5] = empty[2:5] + 1.5 * (plain[2:5] - empty[2:5])
    assert torch.allclose(weighted, expected, atol=1e-5)


def test_a_table_of_its_own(tmp_path: Path) -> None:
    """Other tokens, other ids for begin and end, from vocab.json and merges.txt, or from tokenizer.json,
    whichever is there."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    table = {
        name: i
        for i, name in enumerate(
            ["<s>", "</s>", "<pad>", *letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>"]
        )
    }
    own = Ours(
        Vocabulary(
            bos="<s>", eos="</s>", unk="</s>", pad="<pad>", tokens=table, merges=(("c", "a"), ("ca", "t</w>"))
        )
    )
    write_clip_tokenizer(own, tmp_path / "files", table["<pad>"], 77)
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "files")
    peer.save_pretrained(tmp_path / "json")
    model = miniature("sd1")
    models.save(model, tmp_path / "base", layout="diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.text_encoder.resize_token_embeddings(len(table), mean_resizing=False)
    pipe.text_encoder.config.eos_token_id = table["</s>"]
    for kind in ("files", "json"):
        pipe.tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / kind)
        pipe.save_pretrained(tmp_path / f"model-{kind}")
        text = models.load(tmp_path / f"model-{kind}").require("text")
        assert (
            text.tokenizer("clip_l").tokenize("cat cab")
            == peer("cat cab", add_special_tokens=False).input_ids
        )
        right = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
        assert torch.allclose(text.encode(["a cat"]).condition.context, right, atol=1e-5)
        assert text.encode(["cat " * 100], long="cut").dropped == (" ".join(["cat"] * 25),)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """In one line when loading: more words than rows, another kind of tokenizer, damage; and when saving what
    has no place for them."""
    learned("sd1", tmp_path, ["<cat-toy>"])
    folder = tmp_path / "learned"
    model = models.load(folder)
    for layout in ("ldm", "separate"):
        with pytest.raises(
            ValueError, match=r"learned words of clip_l \(<cat-toy>\): use layout='diffusers' or 'native'"
        ):
            models.save(model, tmp_path / "out.safetensors", cast(Any, layout))
    (folder / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(
        ValueError, match="has 49409 tokens, and OpenAI's tokenizer 49408: load the folder of its own"
    ):
        models.load(folder)
    assert models.load(folder, tmp_path / "tokenizer").require("text").tokenizer("clip_l").tokenize(
        "<cat-toy>"
    ) == [EOS + 1]
    (tmp_path / "tokenizer").rename(folder / "tokenizer")
    config = folder / "tokenizer/tokenizer_config.json"
    whole = json.loads(config.read_text())
    gap = {"49408": {"content": "<cat-toy>"}, "60000": {"content": "<x>"}}
    many = {str(EOS + 1 + i): {"content": f"<{i}>"} for i in range(3)}
    damages = {
        "tokenizer_class='CLIPTokenizer', not 'BertTokenizer'": json.dumps(
            {**whole, "tokenizer_class": "BertTokenizer"}
        ),
        "tokenizer_config.json is damaged": "{",
        "60000": json.dumps({**whole, "added_tokens_decoder": gap}),
        "tokenizer of clip_l has 49411 tokens, and this tower 49409": json.dumps(
            {**whole, "added_tokens_decoder": many}
        ),
    }
    for message, content in damages.items():
        config.write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            models.load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "#version: 0.2\nonly-one\n", "is not a pair of tokens"),
        ("merges.txt", "qqqq zzzz\n", "it is damaged"),
        ("vocab.json", "[1, 2]", "does not hold a JSON object"),
        ("vocab.json", '{"a": "b"}', "ids are whole numbers"),
        ("vocab.json", '{"a": 0, "b": 0}', "same id"),
        ("vocab.json", '{"a": 0}', "it is damaged"),
        ("vocab.json", "\ud800".encode("utf-16", "surrogatepass"), "not UTF-8 text"),
        ("merges.txt", None, r"merges\.txt"),
    ],
)
def test_damaged_tables_are_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    """Never a panic of the library, never a traceback."""
    models.save(miniature("sd1"), tmp_path / "m", layout="diffusers")
    file = tmp_path / "m/tokenizer" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, OSError), match=message) as caught:
        models.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


CONFIG, ADDED, MAP, TABLE, WHOLE = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "tokenizer.json",
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG, [], "does not hold a JSON object"),
        (CONFIG, {"tokenizer_class": ["CLIPTokenizer"]}, "tokenizer_class"),
        (CONFIG, {"model_max_length": "77"}, "model_max_length"),
        (CONFIG, {"added_tokens_decoder": None}, "added_tokens_decoder must be a mapping"),
        (CONFIG, {"added_tokens_decoder": [{"content": "<x>"}]}, "added_tokens_decoder must be a mapping"),
        (CONFIG, {"added_tokens_decoder": {"49408": "<x>"}}, "an added token must be a mapping"),
        (CONFIG, {"added_tokens_decoder": {"x": {"content": "<x>"}}}, "added token.id must be"),
        (CONFIG, {"added_tokens_decoder": {"49408": {"content": 3}}}, "added token.content must be"),
        (
            CONFIG,
            {"added_tokens_decoder": {"49408": {"content": "<x>", "lstrip": "yes"}}},
            "added token.lstrip must be",
        ),
        (CONFIG, {"pad_token": ["!"]}, "pad_token"),
        (CONFIG, {"pad_token": False}, "pad_token"),
        (CONFIG, {"unk_token": {"content": None}}, "unk_token"),
        (CONFIG, {"extra_special_tokens": "<x>"}, "extra_special_tokens"),
        (CONFIG, {"additional_special_tokens": ["<x>", 1]}, "additional_special_tokens"),
        (
            CONFIG,
            {"additional_special_tokens": [{"content": "<x>", "special": 1}]},
            "added token.special must be",
        ),
        (MAP, {"eos_token": 3}, "eos_token"),
        (MAP, 3, "does not hold a JSON object"),
        (ADDED, [], "does not hold a JSON object"),
        (ADDED, {"<x>": None}, "added token.id must be"),
        (TABLE, {"a": "b"}, "whole numbers"),
        (TABLE, None, "does not hold a JSON object"),
        (WHOLE, {"model": {"vocab": [], "merges": []}}, "table of tokens"),
        (WHOLE, {"model": {"vocab": {"a": 0.5}, "merges": []}}, "whole numbers"),
        (WHOLE, {"model": {"vocab": {"a": 0}, "merges": None}}, "list of merges"),
        (WHOLE, {"model": {"vocab": {"a": 0}, "merges": [3]}}, "pair of tokens"),
        (WHOLE, {"model": {"vocab": {"a": 0}}, "added_tokens": 3}, "list of added tokens"),
        (WHOLE, {"model": {"vocab": {"a": 0}}, "added_tokens": ["<x>"]}, "an added token must be a mapping"),
        (WHOLE, {"model": []}, "it has no model"),
        (WHOLE, [], "it has no model"),
    ],
)
def test_wrong_types_are_one_line_that_names_the_file(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    """In each file of a tokenizer's folder."""
    write_clip_tokenizer(openai_tokenizer(), tmp_path, EOS, 77)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"{tmp_path.name}.*{name}.*{message}|{tmp_path.name}.*{message}.*{name}"
    ) as caught:
        open_clip_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [("vocab.json", "merges.txt"), ("vocab.json",), ("merges.txt",)])
def test_a_folder_without_its_tokens_says_which_file_lacks(tmp_path: Path, missing: tuple[str, ...]) -> None:
    write_clip_tokenizer(openai_tokenizer(), tmp_path, EOS, 77)
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*{missing[0]} is missing: tokenizer\.json"):
        open_clip_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        {"extra_special_tokens": {"mark": "<x>"}},
        {"additional_special_tokens": ["<y>"], "extra_special_tokens": ["<x>"]},
        {"additional_special_tokens": ["<x>"], "pad_token": ""},
        {"model_max_length": 1e30, "additional_special_tokens": [{"__type": "AddedToken", "content": "<x>"}]},
        {"model_max_length": 10**30, "extra_special_tokens": None},
        {
            "extra_special_tokens": ["<x>"],
            ADDED: {"<x>": EOS + 1, "<y>": EOS + 2},
        },  # the first is special, and so not found in capitals
    ],
)
def test_special_tokens_are_those_of_transformers(tmp_path: Path, entries: dict[str, Any]) -> None:
    write_clip_tokenizer(openai_tokenizer(), tmp_path, EOS, 77)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(
        json.dumps(config | {key: value for key, value in entries.items() if key != ADDED})
    )
    (tmp_path / ADDED).write_text(json.dumps(entries.get(ADDED, {})))
    ids = transformers.CLIPTokenizer.from_pretrained(tmp_path)(
        "a <x> <y> <X> <Y> cat", add_special_tokens=False
    ).input_ids
    assert open_clip_tokenizer(tmp_path).tokenize("a <x> <y> <X> <Y> cat") == ids


def test_rows_beyond_the_words_of_a_folder_stay(tmp_path: Path) -> None:
    """A table made a multiple of 64 long, beside OpenAI's tokenizer; single files would not say that these
    are its words."""
    towers = {**TINY_TOWERS, "clip_l": replace(cast(CLIPTextParams, TINY_TOWERS["clip_l"]), vocab=49472)}
    model = models.build(tiny_description("sd1", towers))
    models.save(model, tmp_path / "m", layout="diffusers")
    model = models.load(tmp_path / "m")
    models.save(model, tmp_path / "native.safetensors")
    assert models.load(tmp_path / "native.safetensors").fingerprint == model.fingerprint
    for layout in ("ldm", "separate"):
        with pytest.raises(
            ValueError, match="do not hold the 49472 tokens of clip_l: use layout='diffusers' or 'native'"
        ):
            models.save(model, tmp_path / "out.safetensors", cast(Any, layout))


def test_a_native_file_with_damaged_words_is_one_line(tmp_path: Path) -> None:
    """What the metadata say is checked as files are."""
    model = miniature("sd1")
    model.require("text").tokenizers["clip_l"] = Ours(Vocabulary())
    path = tmp_path / "m.safetensors"
    for description in (
        3,
        {"tokens": {"a": "b"}},
        {"added": [{"id": 7, "content": "<x>"}]},
        {"tokens": {"<|startoftext|>": 0, "<|endoftext|>": 10**12}},
    ):
        tensors = model.state_dict()
        models.layouts.native.write(
            path, tensors, {"model": model.spec, "tokenizers": {"clip_l": description}}
        )
        with pytest.raises(ValueError, match=r"m\.safetensors: its tokenizers cannot be used: ") as caught:
            models.load(path)
        assert "\n" not in str(caught.value)


def test_openai_vocabulary_needs_no_words_of_its_own(tmp_path: Path) -> None:
    """Our own folders, and those that transformers writes of them, are read as before: cleaned, and with
    open_clip's names."""
    models.save(miniature("sdxl"), tmp_path / "ours", layout="diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    pipe.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        model = models.load(tmp_path / name)
        assert model.require("text").tokenizers == {}
        assert model.spec["text"] == miniature("sdxl").spec["text"]
        assert model.fingerprint == miniature("sdxl").fingerprint
    assert len(openai_tables()[0]) == EOS + 1
