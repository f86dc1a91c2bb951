"""How prompts are read by one text encoder, and what files hold of it.

Each kind of text encoder (CLIP, T5) has a file beside this one, and a family's file uses it: nothing else knows it by name.
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
    """How prompts are read by one text encoder, as data; a subclass for each kind. Networks and tokenizers are the `TextEncoder`'s.

    network  parameters of its network: they have `width`, `vocab` and `layers`, and the network its table of tokens as `token`
    kind     the name of the subclass in descriptions
    """

    network: Any
    kind: str = ""

    NETWORK: ClassVar[Any]  # the Kind of its network
    claims: ClassVar[Any]  # whether a file or folder holds a tokenizer of this kind
    open_tokenizer: ClassVar[Any]  # the tokenizer that its `describe` described in plain values, or ValueError
    letters: ClassVar[Any] = None  # a tokenizer that spells, for miniatures, where none is at hand without files
    chunked: ClassVar[bool] = False  # whether a prompt that is longer than `rows` can be read in parts, one after the other
    rows: ClassVar[Any]  # of states, for each part of a prompt
    room: ClassVar[Any]  # how many of its tokens are read
    context_dim: ClassVar[Any]  # width of the states, 0 where they are not for the context
    pooled_dim: ClassVar[Any] = 0  # width of its part of the vector
    usual_size: ClassVar[int] = 0  # tokens of the tokenizer that stands in where none came along
    skippable: ClassVar[Any] = None  # how many blocks more can be left out (clip skip); None where that has no meaning

    @abstractmethod
    def tokenize(self, tokenizer: Any, pieces: Pieces) -> Tokens:
        """All tokens of a prompt, without those that begin and end a text."""

    @abstractmethod
    def read(self, network: Any, tokenizer: Any, batch: Sequence[Tokens], chunks: int, clip_skip: int) -> Reading:
        """What prompts in so many parts each give; `clip_skip`: blocks that are left out beyond those that the family leaves out."""

    # Its tokenizer, which has `size`, `detokenize` and `describe`

    @abstractmethod
    def tokenizer(self, own: Any) -> Any:
        """The one that came with its weights, or another in its place where none did; ValueError that says what to load."""

    def check(self, name: str, own: Any) -> None:
        """ValueError where its network does not know all tokens that it would read. name: for the message."""
        size, rows = own.size if own else self.usual_size, self.network.vocab
        if size > rows:
            raise ValueError(f"the tokenizer of {name} has {size} tokens and this tower knows {rows}: load the one that it came with")

    @classmethod
    @abstractmethod
    def find_tokenizers(cls, parts: Mapping[str, Part], given: Sequence[Path], notes: list[str]) -> dict[str, Any]:
        """Those of all text encoders of this kind in a model, by name: among paths that were given, or beside their weights."""

    @classmethod
    def kept(cls, found: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """What the text encoders of these names keep of what was found."""
        return found

    def words(self, own: Any) -> Any:
        """What of its tokenizer is no copy of a published one, and images depend on, in plain values: added words. None where it is one."""
        return None

    # In published files

    def as_found(self: R, part: Part, tokenizer: Any) -> R:
        """With what the weights, the config.json beside them and the tokenizer that came along change. ValueError for wrong ones."""
        return replace(self, network=part.params)

    def unsaid(self, name: str, own: Any, usual: Any) -> str | None:
        """Why single files cannot hold it, None if they can: what they do not say is taken from the family's `usual`."""
        return None

    def tokenizer_json(self, own: Any) -> str | None:
        """The file of that name beside a single file of its weights, None where readers of such files bring the tokenizer along."""
        return None

    @abstractmethod
    def in_folder(self, network: Any, own: Any, identity: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its config.json and its tensors in a diffusers folder; `identity`: see `families.family.Tower`."""

    @abstractmethod
    def write_tokenizer(self, own: Any, folder: Path) -> str | None:
        """Write its tokenizer into a diffusers folder; transformers' class for it, None where there is nothing to write."""


def ids(rows: Sequence[Tokens], network: Any) -> Tensor:
    """Tokens as a network takes them."""
    return torch.tensor([[token for token, _ in row] for row in rows]).to(network.token.weight.device, non_blocking=True)


def weighted(states: Tensor, rows: Sequence[Tokens], empty: Callable[[], Tensor]) -> Tensor:
    """The states (B, L, D) of rows of tokens, moved by their weights from those of the empty prompt, `empty()` (1, L, D)."""
    weights = torch.tensor([[weight for _, weight in row] for row in rows])
    if (weights == 1).all():
        return states
    # A lerp rather than its formula: at weight 1 it is exact.
    return torch.lerp(empty(), states, weights.to(states.device, states.dtype, non_blocking=True)[..., None])
