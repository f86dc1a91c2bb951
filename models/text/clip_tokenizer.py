"""CLIP's tokenizer: byte-pair encoding with OpenAI's or a model's own vocabulary (Radford et al. 2021, 2.4).

OpenAI's vocabulary comes with open_clip. With it, texts are cleaned as in CLIP's training: mojibake and
typographic variants are repaired (ftfy), HTML entities decoded, white space merged, and letters lowered.
transformers does not do the first two. A model's own vocabulary is read as transformers reads it, since its
words were learned in such a pipeline; so is OpenAI's vocabulary in another tower of that model, so that both
towers see the same tokens.
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

BOS = 49406  # start of text; BOS and EOS are the last two tokens of OpenAI's vocabulary
BEGIN, END = "<|startoftext|>", "<|endoftext|>"  # their names in published folders
WORD_END = "</w>"  # suffix of tokens at the end of a word
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LONG_TEXT = 10_000  # characters, longer than any prompt
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")  # of transformers
# Special tokens with their defaults.
ROLES = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
MAX_LENGTH = 100_000  # tokens of a text; transformers writes 1e30 for "no limit"


@dataclass(frozen=True)
class Vocabulary:
    """The description of a `CLIPTokenizer`.

    added            words in addition to, or in place of, entries of the table, by id; new ids follow the
                     table's
    bos, eos, unk    names of the tokens for begin and end of a text, and for unknown text
    pad              name of the padding token
    length           tokens that are read at once; None: not recorded
    tokens, merges   the id of each token, and the pairs to merge, in order; None: OpenAI's
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
            raise ValueError(f"it has {len(self.merges):,} merges: at most {MAX_TOKENS:,} are allowed")
        if len({token.content for token in self.added}) < len(self.added):
            raise ValueError("it has an added word twice")


class CLIPTokenizer:
    """Encodes texts with a vocabulary. ValueError if that lacks its special tokens.

    clean  cleans a text before it is split; None: normalise it as transformers does
    """

    def __init__(self, vocabulary: Vocabulary, clean: Callable[[str], str] | None = None) -> None:
        self.vocabulary, self._clean = vocabulary, clean
        v, (tokens, merges) = vocabulary, openai_tables()
        self.tokens = tokens if v.tokens is None else v.tokens
        self.merges = merges if v.merges is None else [(a, b) for a, b in v.merges]
        known = self.tokens | {token.content: token.id for token in v.added}
        for name in (v.bos, v.eos, v.unk, v.pad):
            if name not in known:
                raise ValueError(f"its special token {brief(name)} is not among its tokens")
        self.bos, self.eos, self.pad = known[v.bos], known[v.eos], known[v.pad]
        self.size = max(known.values()) + 1

    @property
    def is_openai(self) -> bool:
        """Whether this is OpenAI's vocabulary without added words."""
        v, special = self.vocabulary, {BEGIN: BOS, END: EOS, self.vocabulary.pad: self.pad}
        words = [token for token in v.added if special.get(token.content) != token.id]
        return not words and (v.tokens, v.merges, v.bos, v.eos) == (None, None, BEGIN, END)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_backend"}

    @classmethod
    def from_description(cls, description: Any) -> CLIPTokenizer:
        """The tokenizer from the plain values of `describe`. ValueError for anything else."""
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
        text = text if self._clean is None else self._clean(text)
        return list(call_library(self._backend.encode, text, add_special_tokens=False).ids)

    def expand(self, ids: Sequence[int]) -> list[int]:
        """Adds the other vectors of learned words: "<cat>_1", "<cat>_2", ... after "<cat>", if missing."""
        expanded: list[int] = []
        for i, token in enumerate(ids):
            expanded.append(token)
            vectors = self._vectors.get(token, [])
            if list(ids[i + 1 : i + 2]) != vectors[:1]:
                expanded += vectors
        return expanded

    def detokenize(self, ids: Sequence[int]) -> str:
        """The lower-case text of token ids, with spaces between words. ValueError for an unknown id."""
        for token in ids:
            if token not in self._names:
                raise ValueError(f"{token} is not a token: ids are 0 to {self.size - 1}")
        added = {token.id for token in self.vocabulary.added}
        names = {token: self._names[token] for token in ids}
        parts = [f" {names[token]} ".encode() if token in added else _bytes(names[token]) for token in ids]
        return " ".join(b"".join(parts).decode(errors="replace").split())

    @cached_property
    def _names(self) -> dict[int, str]:
        names = {number: token for token, number in self.tokens.items()}
        return names | {token.id: token.content for token in self.vocabulary.added}

    @cached_property
    def _vectors(self) -> dict[int, list[int]]:
        """The other vectors of each added word, by its first."""
        ids = {token.content: token.id for token in self.vocabulary.added}
        vectors: dict[int, list[int]] = {}
        for name, first in ids.items():
            vectors[first] = []
            while (other := f"{name}_{len(vectors[first]) + 1}") in ids:
                vectors[first].append(ids[other])
        return vectors

    @cached_property
    def _backend(self) -> Any:
        """As transformers builds it, but a word that is also the padding, such as "!", stays a word."""
        v, kit = self.vocabulary, tokenizers_library()
        pre, normal = kit.pre_tokenizers, kit.normalizers
        names = {} if self._clean is None else {BEGIN: "<start_of_text>", END: "<end_of_text>"}  # open_clip's
        tokens = {names.get(token, token): number for token, number in self.tokens.items()}
        added = v.added + tuple(AddedToken(tokens[name], name, normalized=False) for name in names.values())
        options = {"continuing_subword_prefix": "", "end_of_word_suffix": WORD_END, "fuse_unk": False}
        options |= {"vocab": tokens, "merges": self.merges, "unk_token": names.get(v.unk, v.unk)}
        backend = kit.Tokenizer(call_library(kit.models.BPE, **options))
        if self._clean is None:
            spaces = normal.Replace(kit.Regex(r"\s+"), " ")
            backend.normalizer = normal.Sequence([normal.NFC(), spaces, normal.Lowercase()])
        split = pre.Split(kit.Regex(SPLIT), behavior="removed", invert=True)
        backend.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False)])
        word = v.pad if v.pad in self.tokens and v.pad not in (v.bos, v.eos, v.unk) else None
        for token in (token for token in added if token.content != word):
            flags = {name: value for name, value in asdict(token).items() if name not in ("id", "content")}
            call_library(backend.add_tokens, [kit.AddedToken(token.content, **flags)])
            if (number := backend.token_to_id(token.content)) != token.id:
                raise ValueError(f"its word {brief(token.content)} must have the id {number}, not {token.id}")
        return backend


@cache
def openai_tokenizer() -> CLIPTokenizer:
    """OpenAI's. As in open_clip, "<start_of_text>" and "<end_of_text>" in a text are BOS and EOS."""
    return CLIPTokenizer(Vocabulary(), _clean)


@cache
def uncleaned_tokenizer() -> CLIPTokenizer:
    """OpenAI's, as transformers reads it."""
    bos, eos = (AddedToken(i, name, normalized=False, special=True) for i, name in ((BOS, BEGIN), (EOS, END)))
    return CLIPTokenizer(Vocabulary(added=(bos, eos)))


def tokenize(text: str) -> list[int]:
    """Token ids of a text in OpenAI's vocabulary."""
    return openai_tokenizer().tokenize(text)


def detokenize(ids: Sequence[int]) -> str:
    """The text of token ids of OpenAI's vocabulary."""
    return openai_tokenizer().detokenize(ids)


@cache
def openai_tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The id of each token, and the merges, as in vocab.json and merges.txt of published folders."""
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ValueError("prompts need the vocabulary that comes with open_clip: pip install open-clip-torch")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : EOS - 2 * 256]  # the published vocabulary does not use the rest
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    letters = list(_letters())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}, merges


@cache
def _letters() -> dict[str, int]:
    """The 256 letters for bytes, in the order of the first tokens; printable bytes are their own letters."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes(token: str) -> bytes:
    """The bytes of a token, with a space at the end of a word."""
    letters, word = _letters(), token.removesuffix(WORD_END)
    data = b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in word)
    return data + b" " if word != token else data


def _clean(text: str) -> str:
    """The text, cleaned as CLIP's training texts were."""
    import html  # here, since its table of 2,231 names takes time to load

    try:
        import ftfy
    except ImportError as error:
        remedy = "pip install --force-reinstall open-clip-torch"
        raise ValueError(f"prompts are cleaned with ftfy ({error}): {remedy}") from error
    if len(text) > LONG_TEXT:  # Python would sort many combining marks in quadratic time
        text = str(tokenizers_library().normalizers.NFC().normalize_str(text))
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def check_table(tokens: Any) -> None:
    """ValueError unless this is a table of tokens, {"a": 0, ...}, unambiguous and safe for the library."""
    check_type("its table of tokens", tokens, dict)
    for name, number in tokens.items():
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            limit = f"ids are whole numbers below {MAX_TOKENS:,}"
            raise ValueError(f"its token {brief(name)} has the id {brief(number)}: {limit}")
    if len(set(tokens.values())) < len(tokens):
        raise ValueError("two of its tokens have the same id")
    if (longest := max(map(len, tokens), default=0)) > MAX_TOKEN_LENGTH:
        limit = f"at most {MAX_TOKEN_LENGTH:,} are allowed"
        raise ValueError(f"it has a token of {longest:,} characters: {limit}")


# Files ------------------------------------------------------------------------------------------------------


def is_clip(path: Path) -> bool:
    """Whether a tokenizer's file or folder is of CLIP's kind: byte pairs with an end-of-word suffix."""
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        return (path / TABLE).is_file()
    return file.suffix == ".json" and read_model_entry(file).get("end_of_word_suffix") == WORD_END


def find_clip_tokenizer(part: Part, paths: Sequence[Path], second: bool | None) -> CLIPTokenizer | None:
    """The tokenizer of a CLIP: the last of `paths`, or one next to the weights; None without one.

    second  whether this is the second of two text encoders, which takes given folders named tokenizer_2;
            None: there is only one
    """

    def is_second(path: Path) -> bool:
        return (path if path.is_dir() else path.parent).name.endswith("_2")

    neighbour, home = folders_beside(part)
    places = [path for path in reversed(paths) if second in (None, is_second(path))]
    if neighbour != home and any((neighbour / name).is_file() for name in (WHOLE, TABLE, CONFIG)):
        places.append(neighbour)
    if is_clip(home):
        places.append(home)
    return open_clip_tokenizer(places[0]) if places else None


def open_clip_tokenizer(path: Path) -> CLIPTokenizer:
    """The tokenizer in a transformers folder or a tokenizer.json. ValueError that names the path."""
    folder, whole = (path, path / WHOLE) if path.is_dir() else (path.parent, path)
    try:
        tokenizer = CLIPTokenizer(_read_vocabulary(folder, whole))
        if not tokenizer.is_openai:
            tokenizer.tokenize(TRIAL)
        return tokenizer
    except ValueError as error:
        named = str(error).startswith(str(path))
        raise ValueError(f"{error}" if named else f"{path}: this tokenizer cannot be used: {error}") from None


def _read_vocabulary(folder: Path, whole: Path) -> Vocabulary:
    """CLIP's vocabulary; tokenizer.json comes before vocab.json, as in transformers."""
    config = read_object(folder / CONFIG)
    if (kind := config.get("tokenizer_class")) not in (None, *CLASSES):
        raise ValueError(f"{CONFIG} must say tokenizer_class='CLIPTokenizer', not {brief(kind)}")
    length = config.get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, (int, float, type(None))):  # 1e30 may be an integer
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
    """The ids of tokens, the merges, and the added tokens of a tokenizer.json."""
    if whole.is_file():
        with name_in_errors(whole.name):
            content = parse_tokenizer_json(read_text(whole, MAX_FILE))
            model, added = content["model"], content.get("added_tokens")
            tokens, merges = model.get("vocab"), model.get("merges", [])
            check_table(tokens)
            check_type("its list of merges", merges, list)
            check_type("its list of added tokens", added, list | None)
            return tokens, _split_merges(merges), added or []
    if missing := [name for name in (TABLE, MERGES) if not (folder / name).is_file()]:
        raise ValueError(f"{missing[0]} is missing: {WHOLE} is needed, or {TABLE} and {MERGES}")
    if {name: read_text(folder / name, MAX_FILE) for name in (TABLE, MERGES)} == _openai_texts():
        return *openai_tables(), []  # as we save it: comparing is faster than parsing
    tokens, lines = read_object(folder / TABLE), read_text(folder / MERGES, MAX_FILE).split("\n")
    with name_in_errors(TABLE):
        check_table(tokens)
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    with name_in_errors(MERGES):
        return tokens, _split_merges(merges), []


def _split_merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Pairs of tokens. A merge is ["a", "b"], or "a b" in older versions."""
    if merges == _openai_merges():  # most are, and comparing is faster than splitting
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
    """The two tables as in files."""
    pairs = "".join(f"{a} {b}\n" for a, b in merges)
    return {TABLE: json.dumps(tokens), MERGES: f"#version: 0.2\n{pairs}"}


def write_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path, pad: int, length: int) -> None:
    """Writes a folder for transformers' CLIPTokenizer. pad: the padding's id; length: model_max_length."""
    texts = _openai_texts() if tokenizer.is_openai else _texts(tokenizer.tokens, tokenizer.merges)
    for file, text in texts.items():
        write_text(folder / file, text)
    v = Vocabulary() if tokenizer.is_openai else tokenizer.vocabulary
    names = {token.id: token.content for token in v.added}
    names |= {number: token for token, number in tokenizer.tokens.items()}
    config = {
        "tokenizer_class": CLASSES[0],
        "bos_token": v.bos,
        "eos_token": v.eos,
        "unk_token": v.unk,
        "pad_token": names[pad],
        "model_max_length": length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    if v.added:
        entries = {str(token.id): asdict(token) for token in v.added}
        config[DECODER] = {
            number: {k: x for k, x in each.items() if k != "id"} for number, each in entries.items()
        }
        new = {token.content: token.id for token in v.added if token.content not in tokenizer.tokens}
        write_json(folder / ADDED, new)  # for older versions
    write_json(folder / CONFIG, config)
