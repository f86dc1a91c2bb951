"""The base class for reading prompts with one kind of text encoder, and for its files.

CLIP and T5 have a module each with their subclass; the modules of families use them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.files.table import Part

Pieces = Sequence[tuple[str, float]]  # pieces of a prompt, each with its weight
Tokens = list[tuple[int, float]]  # token ids, each with its weight
R = TypeVar("R", bound="Reader")


class Reading(NamedTuple):
    """The output of a text encoder for B prompts.

    states  (B, L, D), for the context; D is 0 if the family does not use them
    mask    (B, L) bool, rows that the network attends to; None: all
    pooled  (B, P), for the vector; None if the family does not use it
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Reader(ABC):
    """How one text encoder reads prompts, as data. `TextEncoder` holds networks and tokenizers.

    network  its network's parameters, with `width`, `vocab` and `layers`; the network's token table is
             `token`
    kind     the name of the subclass in descriptions
    """

    network: Any
    kind: str = ""

    NETWORK: ClassVar[Any]  # the Kind of its network
    FOLDER_FIELDS: ClassVar[frozenset[str]] = frozenset()  # fields that only diffusers' folders hold
    chunked: ClassVar[bool] = False  # whether long prompts can be read in chunks
    default_vocab: ClassVar[int] = 0  # tokens of the default tokenizer

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of states of a chunk."""

    @property
    @abstractmethod
    def chunk_tokens(self) -> int:
        """Number of a prompt's tokens in a chunk."""

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """Width of the states; 0 if they are not used."""

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled output; 0 if it is not used."""
        return 0

    @property
    def max_clip_skip(self) -> int | None:
        """The largest clip_skip; None if it has no meaning."""
        return None

    @abstractmethod
    def tokenize(self, tokenizer: Any, pieces: Pieces) -> Tokens:
        """All tokens of a prompt, without BOS, EOS and padding, which `read` adds to each chunk."""

    @abstractmethod
    def read(
        self, network: Any, tokenizer: Any, batch: Sequence[Tokens], chunks: int, clip_skip: int
    ) -> Reading:
        """The states of prompts in `chunks` chunks each, with the mask and the pooled output.

        clip_skip  blocks to leave out beyond those that the family leaves out; 0 if `max_clip_skip` is None
        A chunk always has `rows` rows. Shorter prompts are padded, with a mask if the network was trained
        with one.
        """

    # Its tokenizer, which has `size`, `detokenize` and `describe`

    @abstractmethod
    def tokenizer(self, own: Any) -> Any:
        """`own`, the tokenizer that came with the weights, or the default one; ValueError without one."""

    def check(self, name: str, own: Any) -> None:
        """ValueError if the tokenizer has more tokens than the network. name: for the message."""
        size, rows = own.size if own else self.default_vocab, self.network.vocab
        if size > rows:
            sizes = f"the tokenizer of {name} has {size} tokens, and this tower {rows}"
            raise ValueError(f"{sizes}: load the tokenizer that came with the tower")

    @staticmethod
    @abstractmethod
    def is_tokenizer(path: Path) -> bool:
        """Whether a file or folder is a tokenizer of this kind."""

    @staticmethod
    @abstractmethod
    def open_tokenizer(description: Any) -> Any:
        """The tokenizer from the plain values of its `describe`. ValueError for anything else."""

    @staticmethod
    def miniature_tokenizer() -> Any:
        """A tokenizer of letters for miniatures; None if the default tokenizer needs no files."""
        return None

    @classmethod
    @abstractmethod
    def find_tokenizers(
        cls, parts: Mapping[str, Part], paths: Sequence[Path], notes: list[str]
    ) -> dict[str, Any]:
        """Tokenizers of a model's text encoders of this kind, from `paths` or next to the weights."""

    @classmethod
    def assign_tokenizers(cls, tokenizers: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The tokenizers for the text encoders of these names; those without an entry use the default one."""
        return tokenizers

    def learned_words(self, own: Any) -> Any:
        """Learned words in plain values; None for a published tokenizer."""
        return None

    # In published files

    def from_files(self: R, part: Part, tokenizer: Any) -> R:
        """The reader for these weights, config.json and tokenizer. ValueError if they do not fit."""
        return replace(self, network=part.params)

    def single_file_problem(self, name: str, own: Any, usual: Any) -> str | None:
        """Why single files cannot hold it; None if they can. `usual`: the family's reader."""
        return None

    def tokenizer_json(self, own: Any) -> str | None:
        """Text of the tokenizer.json to write next to a single file; None if readers do not need it."""
        return None

    @abstractmethod
    def to_diffusers(
        self, network: Any, own: Any, identity: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its config.json and tensors in a diffusers folder; `identity`: see `families.family.Tower`."""

    @abstractmethod
    def write_tokenizer(self, own: Any, folder: Path) -> str | None:
        """Writes its tokenizer into a diffusers folder; returns transformers' class, or None without one."""


def token_ids(rows: Sequence[Tokens], network: Any) -> Tensor:
    """Token ids (B, L) on the network's device."""
    ids = torch.tensor([[token for token, _ in row] for row in rows])
    return ids.to(network.token.weight.device, non_blocking=True)


def apply_weights(states: Tensor, rows: Sequence[Tokens], empty: Callable[[], Tensor]) -> Tensor:
    """empty + weight * (states - empty) for states (B, L, D); empty() is the empty prompt's (1, L, D)."""
    weights = torch.tensor([[weight for _, weight in row] for row in rows])
    if (weights == 1).all():
        return states
    # torch.lerp is exact at weight 1.
    return torch.lerp(empty(), states, weights.to(states.device, states.dtype, non_blocking=True)[..., None])
