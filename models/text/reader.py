"""How prompts are read by one text encoder, and what files hold of it.

Each kind of text encoder (CLIP, T5) has a file beside this one, and a family's file uses it.
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

Pieces = Sequence[tuple[str, float]]  # a prompt in pieces, each with its weight
Tokens = list[tuple[int, float]]  # token ids, each with its weight
R = TypeVar("R", bound="Reader")


class Reading(NamedTuple):
    """What is read of B prompts.

    states  (B, L, D), for the context; D is 0 where the family takes none of it
    mask    (B, L) bool, which of these rows the network attends to; None: all
    pooled  (B, P), for the vector, None where the family takes none of it
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Reader(ABC):
    """How prompts are read by one text encoder, as data; a subclass for each kind. Networks and tokenizers
    are the `TextEncoder`'s.

    network  parameters of its network: they have `width`, `vocab` and `layers`, and the network its table of
             tokens as `token`
    kind     the name of the subclass in descriptions
    """

    network: Any
    kind: str = ""

    NETWORK: ClassVar[Any]  # the Kind of its network
    FOLDER_FIELDS: ClassVar[frozenset[str]] = (
        frozenset()
    )  # its fields that diffusers' folders say, and single files do not
    chunked: ClassVar[bool] = (
        False  # whether a longer prompt can be read in chunks, whose states follow each other
    )
    default_vocab: ClassVar[int] = 0  # tokens of the tokenizer that stands in where none came along

    @property
    @abstractmethod
    def rows(self) -> int:
        """Length of the states of a chunk."""

    @property
    @abstractmethod
    def chunk_tokens(self) -> int:
        """How many tokens of a prompt are read in a chunk."""

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """Width of the states, 0 where they are not for the context."""

    @property
    def pooled_dim(self) -> int:
        """Width of its part of the vector."""
        return 0

    @property
    def max_clip_skip(self) -> int | None:
        """How many blocks more can be left out (clip skip); None where that has no meaning."""
        return None

    @abstractmethod
    def tokenize(self, tokenizer: Any, pieces: Pieces) -> Tokens:
        """All tokens of a prompt, of which `read` takes the first of each chunk and puts begin and end around
        them."""

    @abstractmethod
    def read(
        self, network: Any, tokenizer: Any, batch: Sequence[Tokens], chunks: int, clip_skip: int
    ) -> Reading:
        """The states of prompts, in so many chunks each, with the mask and the pooled output.

        clip_skip  blocks to leave out beyond those that the family leaves out; 0 if `max_clip_skip` is None
        A batch always has `rows` rows a chunk: shorter prompts are filled up, and a mask says so where the
        network was trained with one.
        """

    # Its tokenizer, which has `size`, `detokenize` and `describe`

    @abstractmethod
    def tokenizer(self, own: Any) -> Any:
        """The one that came with its weights, or another in its place where none did; ValueError that says
        what to load."""

    def check(self, name: str, own: Any) -> None:
        """ValueError where its network does not know all tokens that it would read. name: for the message."""
        size, rows = own.size if own else self.default_vocab, self.network.vocab
        if size > rows:
            raise ValueError(
                f"the tokenizer of {name} has {size} tokens and this tower knows {rows}: load the one that "
                "it came with"
            )

    @staticmethod
    @abstractmethod
    def is_tokenizer(path: Path) -> bool:
        """Whether a file or folder holds a tokenizer of this kind."""

    @staticmethod
    @abstractmethod
    def open_tokenizer(description: Any) -> Any:
        """The tokenizer that its `describe` described in plain values. ValueError for anything else."""

    @staticmethod
    def miniature_tokenizer() -> Any:
        """A tokenizer that spells, for miniatures; None where one is at hand without files."""
        return None

    @classmethod
    @abstractmethod
    def find_tokenizers(
        cls, parts: Mapping[str, Part], given: Sequence[Path], notes: list[str]
    ) -> dict[str, Any]:
        """Those of all text encoders of this kind in a model, by name: among paths that were given, or beside
        their weights."""

    @classmethod
    def assign_tokenizers(cls, found: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The tokenizers that the text encoders of these names have, from those that were found; the others
        read the usual one."""
        return found

    def learned_words(self, own: Any) -> Any:
        """Added words, which change images, in plain values; None for a published tokenizer."""
        return None

    # In published files

    def from_files(self: R, part: Part, tokenizer: Any) -> R:
        """With what the weights, the config.json beside them and the tokenizer that came along change.
        ValueError for wrong ones."""
        return replace(self, network=part.params)

    def single_file_problem(self, name: str, own: Any, usual: Any) -> str | None:
        """Why single files cannot hold it, None if they can: what they do not say is taken from the family's
        `usual`."""
        return None

    def tokenizer_json(self, own: Any) -> str | None:
        """The file of that name beside a single file of its weights, None where readers of such files bring
        the tokenizer along."""
        return None

    @abstractmethod
    def to_diffusers(
        self, network: Any, own: Any, identity: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its config.json and its tensors in a diffusers folder; `identity`: see `families.family.Tower`."""

    @abstractmethod
    def write_tokenizer(self, own: Any, folder: Path) -> str | None:
        """Write its tokenizer into a diffusers folder; transformers' class for it, None where there is
        nothing to write."""


def token_ids(rows: Sequence[Tokens], network: Any) -> Tensor:
    """Tokens as a network takes them."""
    return torch.tensor([[token for token, _ in row] for row in rows]).to(
        network.token.weight.device, non_blocking=True
    )


def apply_weights(states: Tensor, rows: Sequence[Tokens], empty: Callable[[], Tensor]) -> Tensor:
    """The states (B, L, D) of rows of tokens, moved by their weights from those of the empty prompt,
    `empty()` (1, L, D)."""
    weights = torch.tensor([[weight for _, weight in row] for row in rows])
    if (weights == 1).all():
        return states
    # A lerp rather than its formula: at weight 1 it is exact.
    return torch.lerp(empty(), states, weights.to(states.device, states.dtype, non_blocking=True)[..., None])
