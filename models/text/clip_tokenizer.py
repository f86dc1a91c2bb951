"""CLIP's tokens: byte-pair encoding (Radford et al. 2021, section 2.4), with OpenAI's vocabulary or a model's
own.

OpenAI's comes with open_clip. With it a text is cleaned as it was when the towers were trained: mojibake and
typographic variants are mended (ftfy), HTML entities read, white space joined, capitals lowered. Pipelines
built on transformers leave the first two out. A vocabulary of a model's own is read as transformers reads it,
for it was such a pipeline that its words were learned in. So is OpenAI's in a model that has one of its own
too: contexts of two towers stand side by side, token by token.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.messages import brief
from diffusion.spec import check_type, make_params
from models.files.text import read_text, write_json, write_text
from models.networks.clip import EOS as EOS
from models.text.vocabulary import (
    ADDED,
    CONFIG,
    DECODER,
    MAX_FILE,
    MAX_TOKEN_LENGTH,
    MAX_TOKENS,
    MERGES,
    TABLE,
    TRIAL,
    WHOLE,
    AddedToken,
    added_tokens,
    call_library,
    folders_beside,
    name_in_errors,
    parse_tokenizer_json,
    read_model_entry,
    read_object,
    special_tokens,
    tokenizers_library,
)

if TYPE_CHECKING:
    from models.files.table import Part

BOS = 49406  # the begin of text; it and EOS are the last two of OpenAI's vocabulary
BEGIN, END = "<|startoftext|>", "<|endoftext|>"  # their names in published folders
WORD_END = "</w>"  # how a token ends that ends a word
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LONG_TEXT = 10_000  # characters, more than prompts have
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")  # of transformers
ROLES = {
    "bos_token": BEGIN,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
}  # special tokens, with defaults
MAX_LENGTH = 100_000  # tokens of a text; transformers writes 1e30 for "no limit"


@dataclass(frozen=True)
class Vocabulary:
    """The description of a `CLIPTokenizer`.

    added            beside or in place of entries of the table, in the order of their ids, which count on
                     behind the table's
    bos, eos, unk    names of the tokens that begin and end a text, and that stand for what is in no token
    pad              the name of the token behind the end
    length           how many tokens are read at once, None where that is not said
    tokens, merges   every token's id, and the pairs that are joined, first ones first; None for OpenAI's
    """

    added: tuple[AddedToken, ...] = ()
    bos: str = BEGIN
    eos: str = END
    unk: str = END
    pad: str = END
    length: int | None = None
    tokens: dict[str, int] | None = None
    merges: tuple[tuple[str, str], ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check_table(self.tokens)
        if self.merges is not None and len(self.merges) > MAX_TOKENS:
            raise ValueError(f"it has {len(self.merges):,} merges: known ones have up to {MAX_TOKENS:,}")
        if len({token.content for token in self.added}) < len(self.added):
            raise ValueError("one of its added words stands there twice")


class CLIPTokenizer:
    """Encodes texts with a vocabulary. ValueError for one without its special tokens.

    clean  what is done with a text before it is split; None: what transformers does
    """

    def __init__(self, of: Vocabulary, clean: Callable[[str], str] | None = None) -> None:
        self.vocabulary, self._clean = of, clean
        tokens, merges = openai_tables()
        self.tokens = tokens if of.tokens is None else of.tokens
        self.merges = merges if of.merges is None else [(a, b) for a, b in of.merges]
        known = self.tokens | {token.content: token.id for token in of.added}
        for name in (of.bos, of.eos, of.unk, of.pad):
            if name not in known:
                raise ValueError(f"it names the special token {brief(name)}, which is not among its tokens")
        self.bos, self.eos, self.pad = known[of.bos], known[of.eos], known[of.pad]
        self.size = max(known.values()) + 1

    @property
    def is_openai(self) -> bool:
        """Whether this is OpenAI's vocabulary without added words."""
        of, usual = self.vocabulary, {BEGIN: BOS, END: EOS, self.vocabulary.pad: self.pad}
        words = [token for token in of.added if usual.get(token.content) != token.id]
        return not words and (of.tokens, of.merges, of.bos, of.eos) == (None, None, BEGIN, END)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_backend"}

    @classmethod
    def from_description(cls, description: Any) -> CLIPTokenizer:
        """The tokenizer that `describe` described. ValueError for anything else."""
        check_type("a tokenizer's description", description, dict)
        tokenizer = cls(make_params("tokenizer", Vocabulary, description))
        tokenizer.tokenize(TRIAL)
        return tokenizer

    def describe(self) -> dict[str, Any]:
        """The vocabulary in plain values, for files."""
        return {name: value for name, value in asdict(self.vocabulary).items() if value is not None}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text of any length, without BOS, EOS and padding."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a text, not {text!r}")
        return list(
            call_library(
                self._backend.encode,
                text if self._clean is None else self._clean(text),
                add_special_tokens=False,
            ).ids
        )

    def expand(self, ids: Sequence[int]) -> list[int]:
        """With all vectors of learned words that have several: behind "<cat>" "<cat>_1", "<cat>_2", ...,
        unless they are there."""
        found: list[int] = []
        for i, token in enumerate(ids):
            found.append(token)
            vectors = self._vectors.get(token, [])
            if list(ids[i + 1 : i + 2]) != vectors[:1]:
                found += vectors
        return found

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids: lower case, with a space after every word. ValueError for an id outside the
        vocabulary."""
        for token in ids:
            if token not in self._names:
                raise ValueError(f"{token} is no token: ids are 0 to {self.size - 1}")
        added = {token.id for token in self.vocabulary.added}
        parts = [
            f" {self._names[token]} ".encode() if token in added else _bytes(self._names[token])
            for token in ids
        ]
        return " ".join(b"".join(parts).decode(errors="replace").split())

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: token for token, number in self.tokens.items()} | {
            token.id: token.content for token in self.vocabulary.added
        }

    @cached_property
    def _vectors(self) -> dict[int, list[int]]:
        """The further vectors of each added word, by its first."""
        ids = {token.content: token.id for token in self.vocabulary.added}
        vectors: dict[int, list[int]] = {}
        for name, first in ids.items():
            vectors[first] = []
            while (other := f"{name}_{len(vectors[first]) + 1}") in ids:
                vectors[first].append(ids[other])
        return vectors

    @cached_property
    def _backend(self) -> Any:
        """As transformers builds it, except that padding named by a word of the vocabulary, such as "!",
        leaves that word what it is."""
        of, kit = self.vocabulary, tokenizers_library()
        before, normal = kit.pre_tokenizers, kit.normalizers
        marks = (
            {} if self._clean is None else {BEGIN: "<start_of_text>", END: "<end_of_text>"}
        )  # open_clip's names
        tokens = {marks.get(token, token): number for token, number in self.tokens.items()}
        added = of.added + tuple(AddedToken(tokens[name], name, normalized=False) for name in marks.values())
        backend = kit.Tokenizer(
            call_library(
                kit.models.BPE, vocab=tokens, merges=self.merges, unk_token=marks.get(of.unk, of.unk),
                continuing_subword_prefix="", end_of_word_suffix=WORD_END, fuse_unk=False,
            )
        )  # fmt: skip
        if self._clean is None:
            backend.normalizer = normal.Sequence(
                [normal.NFC(), normal.Replace(kit.Regex(r"\s+"), " "), normal.Lowercase()]
            )
        split = before.Split(kit.Regex(SPLIT), behavior="removed", invert=True)
        backend.pre_tokenizer = before.Sequence([split, before.ByteLevel(add_prefix_space=False)])
        word = of.pad if of.pad in self.tokens and of.pad not in (of.bos, of.eos, of.unk) else None
        for token in (token for token in added if token.content != word):
            flags = {name: value for name, value in asdict(token).items() if name not in ("id", "content")}
            call_library(backend.add_tokens, [kit.AddedToken(token.content, **flags)])
            if (number := backend.token_to_id(token.content)) != token.id:
                raise ValueError(
                    f"its word {brief(token.content)} has the id {token.id}, where {number} comes next"
                )
        return backend


@cache
def openai_tokenizer() -> CLIPTokenizer:
    """OpenAI's. "<start_of_text>" and "<end_of_text>" in a text are its begin and end, as for open_clip."""
    return CLIPTokenizer(Vocabulary(), _cleaned)


@cache
def uncleaned_tokenizer() -> CLIPTokenizer:
    """OpenAI's as transformers reads it."""
    names = (
        AddedToken(number, name, normalized=False, special=True)
        for name, number in ((BEGIN, BOS), (END, EOS))
    )
    return CLIPTokenizer(Vocabulary(added=tuple(names)))


def tokenize(text: str) -> list[int]:
    """Token ids of a text in OpenAI's vocabulary."""
    return openai_tokenizer().tokenize(text)


def detokenize(ids: Sequence[int]) -> str:
    """The text of token ids of OpenAI's vocabulary."""
    return openai_tokenizer().detokenize(ids)


@cache
def openai_tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Every token's id, and the merges in their order, as vocab.json and merges.txt of published folders hold
    them."""
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "prompts need the vocabulary that open_clip brings along: pip install open-clip-torch"
        )
    with gzip.open(
        Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8"
    ) as file:
        lines = file.read().split("\n")[
            1 : EOS - 2 * 256
        ]  # the file goes on, the published vocabulary does not
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    letters = list(_letters())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}, merges


@cache
def _letters() -> dict[str, int]:
    """The 256 letters that stand for bytes in the vocabulary, in the order of its first tokens: printable
    ones stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes(token: str) -> bytes:
    """The bytes of a token, with a space at the end of a word."""
    letters, word = _letters(), token.removesuffix(WORD_END)
    return b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in word) + b" " * (
        word != token
    )


def _cleaned(text: str) -> str:
    """The text, cleaned as CLIP's training texts were."""
    import html  # with its table of 2,231 names, which few texts hold

    try:
        import ftfy
    except ImportError as error:
        raise ValueError(
            f"prompts are cleaned with ftfy ({error}): pip install --force-reinstall open-clip-torch"
        ) from error
    if len(text) > LONG_TEXT:  # of many combining marks, which Python would sort in quadratic time
        text = str(tokenizers_library().normalizers.NFC().normalize_str(text))
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def check_table(tokens: Any) -> None:
    """ValueError unless this is a table of tokens, {"a": 0, ...}, that is unambiguous and does not crash the
    library."""
    check_type("its table of tokens", tokens, dict)
    if wrong := next(
        (name for name, number in tokens.items() if type(number) is not int or not 0 <= number < MAX_TOKENS),
        None,
    ):
        raise ValueError(
            f"its token {brief(wrong)} has the id {brief(tokens[wrong])}, and ids are whole numbers below "
            f"{MAX_TOKENS:,}"
        )
    if len(set(tokens.values())) < len(tokens):
        raise ValueError("two of its tokens have the same id")
    if (longest := max(map(len, tokens), default=0)) > MAX_TOKEN_LENGTH:
        raise ValueError(
            f"it has a token of {longest:,} characters, and no known one has over {MAX_TOKEN_LENGTH:,}"
        )


# ---- in files


def is_clip(path: Path) -> bool:
    """Whether a tokenizer's file or folder is CLIP's kind: byte pairs with an end-of-word suffix."""
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        return (path / TABLE).is_file()
    return file.suffix == ".json" and read_model_entry(file).get("end_of_word_suffix") == WORD_END


def find_clip_tokenizer(part: Part, given: Sequence[Path], second: bool | None) -> CLIPTokenizer | None:
    """The tokenizer of a CLIP text encoder: the last of the given paths that is one, or one beside the
    weights; None without one.

    second  whether this is the second of two text encoders, to which a given folder named tokenizer_2
            belongs; None: there is only one
    """
    neighbour, home = folders_beside(part)
    places = [
        path
        for path in reversed(given)
        if second in (None, (path if path.is_dir() else path.parent).name.endswith("_2"))
    ]
    if neighbour != home and any((neighbour / name).is_file() for name in (WHOLE, TABLE, CONFIG)):
        places.append(neighbour)
    if is_clip(home):
        places.append(home)
    return open_clip_tokenizer(places[0]) if places else None


def open_clip_tokenizer(path: Path) -> CLIPTokenizer:
    """The tokenizer in a transformers folder, or in a single tokenizer.json. ValueError in one line that
    names the path."""
    try:
        tokenizer = CLIPTokenizer(
            _read_vocabulary(path if path.is_dir() else path.parent, path if path.is_file() else path / WHOLE)
        )
        if not tokenizer.is_openai:
            tokenizer.tokenize(TRIAL)
        return tokenizer
    except ValueError as error:
        raise ValueError(
            str(error)
            if str(error).startswith(str(path))
            else f"{path}: this tokenizer cannot be used: {error}"
        ) from None


def _read_vocabulary(folder: Path, whole: Path) -> Vocabulary:
    """CLIP's vocabulary, with transformers' precedence: tokenizer.json before vocab.json."""
    config = read_object(folder / CONFIG)
    if (kind := config.get("tokenizer_class")) not in (None, *CLASSES):
        raise ValueError(
            f"{CONFIG} says tokenizer_class={brief(kind)}, and the text encoders here read the tokens of a "
            "CLIPTokenizer"
        )
    length = config.get("model_max_length")
    if length is not None and (
        isinstance(length, bool) or not isinstance(length, (int, float))
    ):  # 1e30 may be written as a whole number
        raise ValueError(f"model_max_length in {CONFIG} must be a number, not {brief(length)}")
    tokens, merges, described = _read_table(folder, whole)
    roles, more = special_tokens(folder, config, ROLES)
    added = added_tokens(folder, config, described, [*roles.values(), *more], tokens)
    openai = (tokens, merges) == openai_tables()
    return Vocabulary(
        added=tuple(added),
        bos=roles["bos_token"].content,
        eos=roles["eos_token"].content,
        unk=roles["unk_token"].content,
        pad=roles["pad_token"].content,
        length=int(length) if length is not None and 2 < length < MAX_LENGTH else None,
        tokens=None if openai else tokens,
        merges=None if openai else tuple(merges),
    )


def _read_table(folder: Path, whole: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[Any]]:
    """The ids of tokens, the merges, and the added tokens as tokenizer.json describes them."""
    if whole.is_file():
        with name_in_errors(whole.name):
            content = parse_tokenizer_json(read_text(whole, MAX_FILE))
            tokens, merges, added = (
                content["model"].get("vocab"),
                content["model"].get("merges", []),
                content.get("added_tokens"),
            )
            check_table(tokens)
            check_type("its list of merges", merges, list)
            check_type("its list of added tokens", added, list | None)
            return tokens, _split_merges(merges), added or []
    if missing := [name for name in (TABLE, MERGES) if not (folder / name).is_file()]:
        raise ValueError(f"{missing[0]} is not there: {WHOLE} holds the tokens, or {TABLE} and {MERGES} do")
    if {name: read_text(folder / name, MAX_FILE) for name in (TABLE, MERGES)} == _openai_texts():
        return *openai_tables(), []  # as we save it: parsing takes longer than comparing
    tokens, lines = read_object(folder / TABLE), read_text(folder / MERGES, MAX_FILE).split("\n")
    with name_in_errors(TABLE):
        check_table(tokens)
    with name_in_errors(MERGES):
        return (
            tokens,
            _split_merges([line for line in lines if line.strip() and not line.startswith("#version")]),
            [],
        )


def _split_merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Pairs of tokens. A merge is ["a", "b"], or "a b" as older versions write it."""
    if merges == _openai_merges():  # as most are, and splitting takes longer than comparing
        return openai_tables()[1]
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"its merges are damaged: {brief(merge)} is not a pair of tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


@cache
def _openai_merges() -> list[str]:
    return [f"{a} {b}" for a, b in openai_tables()[1]]


@cache
def _openai_texts() -> dict[str, str]:
    return _texts(*openai_tables())


def _texts(tokens: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The two tables as files hold them."""
    pairs = "".join(f"{a} {b}\n" for a, b in merges)
    return {TABLE: json.dumps(tokens), MERGES: f"#version: 0.2\n{pairs}"}


def write_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path, pad: int, length: int) -> None:
    """Write a folder that transformers' CLIPTokenizer opens. pad: the id of the padding token; length: tokens
    of a text."""
    texts = _openai_texts() if tokenizer.is_openai else _texts(tokenizer.tokens, tokenizer.merges)
    for file, text in texts.items():
        write_text(folder / file, text)
    of = Vocabulary() if tokenizer.is_openai else tokenizer.vocabulary
    names = {token.id: token.content for token in of.added} | {
        number: token for token, number in tokenizer.tokens.items()
    }
    config = {
        "tokenizer_class": CLASSES[0],
        "bos_token": of.bos,
        "eos_token": of.eos,
        "unk_token": of.unk,
        "pad_token": names[pad],
        "model_max_length": length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    if of.added:
        config[DECODER] = {
            str(token.id): {key: value for key, value in asdict(token).items() if key != "id"}
            for token in of.added
        }
        # For older versions.
        write_json(
            folder / ADDED,
            {token.content: token.id for token in of.added if token.content not in tokenizer.tokens},
        )
    write_json(folder / CONFIG, config)
