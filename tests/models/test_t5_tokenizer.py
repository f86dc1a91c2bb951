"""T5's tokens: ids as sentencepiece and transformers give them, from either file; and files that are
something else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from models import T5Tokenizer
from models.files.stored import TensorFile
from models.files.table import Part
from models.text.t5 import transformers
from models.text.t5_tokenizer import EOS, PAD, find_t5_tokenizer
from tests.models.test_tokenizer import ALPHABETS, corpus
from tests.models.text_peers import spiece, t5_in_folder

NEL, ZWNJ = "\x85", "\u200c"
WIDE = "\uff43\uff41\uff54"  # "cat" in full-width letters
DISPUTED = [
    NEL,
    ZWNJ,
    *map(chr, range(0x302A, 0x3030)),
]  # what transformers reads otherwise than sentencepiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds spiece.model, and in json/ the tokenizer.json that transformers saves of it."""
    path = tmp_path_factory.mktemp("tokenizer")
    t5_in_folder(path).save_pretrained(path / "json")
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> T5Tokenizer:
    return T5Tokenizer.open(folder / "spiece.model")


def wild(count: int) -> list[str]:
    """Texts of letters of all kinds, blanks of all kinds and controls, up to 30 of them."""
    draw = random.Random(0)
    ranges = (
        range(0x300),
        range(0x2000, 0x2070),
        range(0x3000, 0x3100),
        range(0xFF00, 0xFFEF),
        [0xFEFF, 0x1680, 0x180E, 0x1F600, 0xFFFD],
    )
    symbols = [chr(c) for part in ranges for c in part] + list("astronaut cat   ▁▁") * 20
    return ["".join(draw.choices(symbols, k=draw.randrange(31))) for _ in range(count)]


TEXTS = [text for alphabet in ALPHABETS for text in corpus(alphabet)] + wild(2000)
TEXTS += [
    "",
    " ",
    "  a  cat  ",
    "a\n\ncat\t\r\ndog",
    WIDE,
    "e\u0301 café",
    "👩\u200d🚀 astronaut",
    "▁a▁",
    "x" * 300,
    "½ ﬁ",
    "宇宙飛行士",
]


def test_ids_equal_sentencepiece(ours: T5Tokenizer) -> None:
    """On every text without the characters that transformers reads otherwise, which the next test but one
    shows."""
    peer = sentencepiece.SentencePieceProcessor(model_proto=spiece())
    texts = [text for text in TEXTS if not any(c in text for c in DISPUTED)]
    assert len(texts) > 2000
    assert [text for text in texts if ours.tokenize(text) != peer.encode(text)] == []


@pytest.mark.parametrize("name", ["spiece.model", "json/tokenizer.json"])
def test_ids_equal_transformers(folder: Path, name: str) -> None:
    """From either file those of T5TokenizerFast, which published pipelines use; marks in the text are the
    tokens of that name."""
    peer, ours = t5_in_folder(folder), T5Tokenizer.open(folder / name)
    texts = [*TEXTS, "a </s> cat", "<pad>", "cat<unk>dog", "a<extra_id_0> <extra_id_99>", "<extra_id_100>"]
    assert [
        text for text in texts if ours.tokenize(text) != peer(text, add_special_tokens=False).input_ids
    ] == []
    assert [[*ours.tokenize(text), EOS] for text in texts] == peer(texts).input_ids
    assert ours.size == len(peer)
    assert (peer.pad_token_id, peer.eos_token_id) == (PAD, EOS)


def beside(size: int, **entry: Any) -> dict[str, dict[str, Any]]:
    """An added token as tokenizer_config.json has it."""
    return {
        "1": {"content": "</s>", "special": True},
        str(size): {"content": "<cat>", "normalized": True, **entry},
    }


WORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "added": lambda size: {"added_tokens.json": {"<cat>": size, "<extra_id_0>": size - 1}},
    "decoder": lambda size: {
        "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "added_tokens_decoder": beside(size)}
    },
    "flags": lambda size: {
        "tokenizer_config.json": {"added_tokens_decoder": beside(size, single_word=True, lstrip=True)}
    },
    "special": lambda size: {
        "tokenizer_config.json": {"additional_special_tokens": ["<cat>", "<extra_id_0>"]}
    },
    "names": lambda size: {
        "special_tokens_map.json": {"additional_special_tokens": ["<cat>"]},
        "added_tokens.json": {"<cat>": size},
    },
}


@pytest.mark.parametrize("kind", WORDS)
def test_words_beside_it_are_tokens(kind: str, ours: T5Tokenizer, tmp_path: Path) -> None:
    """Which spiece.model has no place for: learned words, as transformers reads them."""
    for name, content in WORDS[kind](ours.size).items():
        (tmp_path / name).write_text(json.dumps(content))
    peer, texts = (
        t5_in_folder(tmp_path),
        ["a <cat> red", "A <CAT>!", "x<cat>y  <cat>", "<extra_id_0> dog", "</s>", ""],
    )
    words = find_t5_tokenizer(part_of(tmp_path), [tmp_path], [])
    assert words is not None
    assert words.size == ours.size + 1
    for each in (words, T5Tokenizer.from_json(words.to_json())):
        assert [each.tokenize(text) for text in texts] == [
            peer(text, add_special_tokens=False).input_ids for text in texts
        ]


def test_words_beside_it_that_do_not_fit_are_refused(ours: T5Tokenizer, tmp_path: Path) -> None:
    """In one line that names the folder; those of another kind of tokenizer are left alone."""
    (tmp_path / "spiece.model").write_bytes(spiece())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat>": ours.size + 5}))
    with pytest.raises(
        ValueError,
        match=rf"^[^\n]*{tmp_path.name}[^\n]*'<cat>' must have the id {ours.size}, not {ours.size + 5}$",
    ):
        find_t5_tokenizer(part_of(tmp_path), [tmp_path], [])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    found = find_t5_tokenizer(part_of(tmp_path), [tmp_path], [])
    assert found is not None
    assert found.size == ours.size


def part_of(folder: Path) -> Part:
    """A T5 in that folder, as far as finding its tokenizer goes."""
    return Part(
        "text", "T5 text encoder", None, transformers(), TensorFile(folder / "model.safetensors", {}), {}
    )


def test_where_sentencepiece_and_transformers_disagree(folder: Path, ours: T5Tokenizer) -> None:
    """Here published pipelines are followed, which use transformers.

    U+0085, next line: no blank to sentencepiece, but one to the pattern by which transformers splits words.
    U+200C, which sentencepiece makes a blank, and combining marks: transformers normalises what is one letter
    to a reader at once, and drops what follows a letter that is to be mended.
    """
    peer, theirs = sentencepiece.SentencePieceProcessor(model_proto=spiece()), t5_in_folder(folder)
    for text in (f"a{NEL}cat", f"a cat{NEL}", f"ʴ{ZWNJ}cat", "\xba\u302f"):
        assert ours.tokenize(text) == theirs(text, add_special_tokens=False).input_ids != peer.encode(text)


def test_a_tokenizer_json_is_taken_at_its_word(tmp_path: Path, ours: T5Tokenizer) -> None:
    """Published ones were made by transformers 4, which joins and strips blanks where its version 5 splits at
    them.

    Version 5 puts its own rules in their place. Both give the same ids, except that the former leave U+0085
    in its word. Truncation and padding that a file asks for are not its vocabulary's business: lengths are
    the family's.
    """
    written = json.loads(ours.to_json())
    backend = Tokenizer(models.Unigram([tuple(row) for row in written["model"]["vocab"]], unk_id=2))
    charsmap = Tokenizer.from_str(ours.to_json()).normalizer
    backend.normalizer = normalizers.Sequence(
        [charsmap, normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    other = T5Tokenizer.open(tmp_path / "tokenizer.json")
    assert [text for text in TEXTS if NEL not in text and other.tokenize(text) != ours.tokenize(text)] == []
    assert other.tokenize(f"a{NEL}cat") != ours.tokenize(f"a{NEL}cat")


def test_comes_back_from_json(ours: T5Tokenizer) -> None:
    """What is saved is the same tokenizer."""
    other = T5Tokenizer.from_json(ours.to_json())
    assert [other.tokenize(text) for text in TEXTS] == [ours.tokenize(text) for text in TEXTS]
    assert other.to_json() == ours.to_json()


def test_text_comes_back_normalised(ours: T5Tokenizer) -> None:
    """As sentencepiece decodes it: blanks joined, forms mended; what is in no piece shows as <unk>."""
    peer = sentencepiece.SentencePieceProcessor(model_proto=spiece())
    for text in ["", "a photo  of café", f" {WIDE},  dog! ", "don't (x)"]:
        assert ours.detokenize(ours.tokenize(text)) == peer.decode(peer.encode(text))
    assert ours.detokenize(ours.tokenize("cat ☃ dog")) == "cat <unk> dog"
    for token in (-1, ours.size):
        with pytest.raises(ValueError, match=f"{token} is not a token: ids are 0 to {ours.size - 1}"):
            ours.detokenize([5, token])


def test_ends_are_where_tokens_end(ours: T5Tokenizer) -> None:
    """Counted in characters of the text as it was given, whatever normalisation makes of them, and never
    falling."""
    text = f"{WIDE}  dog… e\u0301 👩\u200d🚀 x"
    ends = ours.tokenize_with_ends(text)
    assert [token for token, _ in ends] == ours.tokenize(text)
    pieces = [(ours.detokenize([token]), end) for token, end in ends]
    assert ("dog", 8) in pieces
    assert [end for piece, end in pieces if piece == "."] == [9, 9, 9]
    for text in TEXTS:
        stops = [end for _, end in ours.tokenize_with_ends(text)]
        assert stops == sorted(stops)
        assert all(0 <= end <= len(text) for end in stops)


# ---- files that are something else


def other_json(model: Any) -> bytes:
    return str(Tokenizer(model).to_str()).encode()


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it holds no pieces"),
    "web page": (
        lambda: b"<!DOCTYPE html><html><body>404</body></html>",
        "neither JSON nor a sentencepiece model",
    ),
    "text": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "neither JSON nor a sentencepiece model",
    ),
    "zip": (lambda: b"PK\x03\x04" + bytes(range(256)), "neither JSON nor a sentencepiece model"),
    "half a model": (lambda: spiece()[: len(spiece()) // 2], "truncated"),
    "half a json": (lambda: b'{"model": {"type": "Uni', "it has no model"),
    "other json": (lambda: b'{"architectures": ["T5EncoderModel"]}', "it has no model"),
    "json of no model": (lambda: b'{"model": 3}', "it has no model"),
    "unigram without pieces": (lambda: b'{"model": {"type": "Unigram"}}', "it is damaged"),
    "BPE": (lambda: other_json(models.BPE()), "its model must be 'Unigram', as T5's is, not 'BPE'"),
    "WordPiece": (lambda: other_json(models.WordPiece()), "'Unigram', as T5's is, not 'WordPiece'"),
    "another's unigram": (
        lambda: other_json(models.Unigram([("<s>", 0.0), ("a", -1.0), ("<unk>", 0.0)], unk_id=2)),
        "must be T5's <pad> and </s>, not '<s>' and 'a'",
    ),
    "unigram without <unk>": (
        lambda: other_json(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("a", -1.0)])),
        "it is damaged",
    ),
    "BPE of sentencepiece": (lambda: spiece(model_type="bpe"), "not a unigram model"),
    "sentencepiece with other first tokens": (
        lambda: spiece(pad_id=1, eos_id=0),
        "must be T5's <pad> and </s>, not '</s>' and '<pad>'",
    ),
    "sentencepiece with <unk> elsewhere": (lambda: spiece(pad_id=2, unk_id=0), "with <unk> as token 2"),
    "sentencepiece with bytes": (lambda: spiece(byte_fallback=True, vocab_size=400), "not a unigram model"),
    "no blank before the text": (lambda: spiece(add_dummy_prefix=False), "it keeps spaces"),
    "blanks kept": (lambda: spiece(remove_extra_whitespaces=False), "it keeps spaces"),
}


@pytest.mark.parametrize("kind", FILES)
def test_refuses_files_of_another_kind(tmp_path: Path, kind: str) -> None:
    """One line that names the file and what is wrong with it."""
    make, message = FILES[kind]
    path = tmp_path / "spiece.model"
    path.write_bytes(make())
    with pytest.raises(
        ValueError, match=r"^[^\n]*spiece\.model is not a spiece\.model or tokenizer\.json of T5: "
    ) as caught:
        T5Tokenizer.open(path)
    assert message in str(caught.value)


def test_refuses_damaged_files(tmp_path: Path, ours: T5Tokenizer) -> None:
    """Files cut or with bytes changed give one line, or a tokenizer that reads all texts: never another kind
    of error."""
    draw, refused, path = random.Random(0), 0, tmp_path / "file"
    for i in range(60):
        data = bytearray((spiece(), ours.to_json().encode())[i % 2])
        if i % 3:
            for _ in range(500):
                data[draw.randrange(len(data))] = draw.randrange(256)
        else:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            damaged = T5Tokenizer.open(path)
        except ValueError:
            refused += 1
        else:
            for text in TEXTS[::100]:
                damaged.tokenize(text)
    assert refused > 40


def test_refuses_what_is_no_text(tmp_path: Path, ours: T5Tokenizer) -> None:
    """A prompt that is none, and a file that is not there."""
    with pytest.raises(ValueError, match="a prompt is a text, not 7"):
        ours.tokenize(7)  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"nothing\.model"):
        T5Tokenizer.open(tmp_path / "nothing.model")


def test_the_package_is_asked_for_when_it_is_needed(tmp_path: Path) -> None:
    """`import models` does without tokenizers; opening a file says what to install."""
    (tmp_path / "spiece.model").write_bytes(spiece())
    program = f"""
import sys
sys.modules["tokenizers"] = None
import models
try:
    models.T5Tokenizer.open({str(tmp_path / "spiece.model")!r})
except ValueError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install tokenizers" in out
