"""What a family of models takes from its text towers: a `TextParams`, data and no code of its own (SD 1, SDXL, FLUX.1, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from diffusion.spec import check_at_least_one, check_names, check_range
from models.networks.clip import CLIPTextParams
from models.networks.t5 import T5Params

NUMBER_DIM = 256  # sinusoids per number (Podell et al. 2023, section 2.2)
MAX_T5_LENGTH = 4096  # rows of context; families have 256 and 512


@dataclass(frozen=True)
class TowerUse:
    """What a family takes from one tower of CLIP.

    tower      its name in TextParams.towers
    blocks     the context is the state after so many of its blocks; None: it gives no context
    norm       that state goes through the tower's final norm
    pad        the token behind the end of text
    pooled     the tower's pooled output goes into the vector
    projected  through its projection, if it has one
    """

    tower: str
    blocks: int | None
    norm: bool
    pad: int
    pooled: bool
    projected: bool = True


@dataclass(frozen=True)
class TextParams:
    """The text side of one family of models.

    uses       contexts stand side by side along the width in this order, and so do pooled outputs in the vector
    numbers    names of the numbers behind the pooled part of the vector, 256 sinusoids each (Podell et al. 2023)
    null       what "no prompt" is: the encoded "" ("empty"), or zeros for context and pooled part ("zeros"); numbers stay
    t5         T5's states follow CLIP's context along the sequence, `t5_length` rows; CLIP's are filled up with zeros to T5's width
    tokens     of a chunk, BOS and EOS included; None: as many as all towers read
    width      where there may be no T5: width of the context, in which zeros stand for T5's rows
    """

    towers: Mapping[str, CLIPTextParams]
    uses: tuple[TowerUse, ...]
    numbers: tuple[str, ...] = ()
    null: Literal["empty", "zeros"] = "empty"
    t5: T5Params | None = None
    t5_length: int = 512
    width: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_names("rule for null", [self.null], ["empty", "zeros"])
        check_names("tower", [use.tower for use in self.uses], self.towers)
        check_at_least_one(self, "t5_length", "width", "tokens")
        check_range(self, "t5_length", most=MAX_T5_LENGTH)
        if not self.uses:
            raise ValueError("a text encoder needs at least one use of a tower")
        if "t5" in self.towers:
            raise ValueError("'t5' names T5 among the towers: name this one otherwise")
        for use in self.uses:
            layers = self.towers[use.tower].layers
            if not 0 <= (use.blocks or 0) <= layers:
                raise ValueError(f"the tower {use.tower!r} has {layers} blocks: there is no state after {use.blocks}")
        lengths = {self.towers[use.tower].length for use in self.uses}
        if not 2 < self.length <= min(lengths):
            raise ValueError(f"a chunk has 3 to {min(lengths)} tokens, as many as all towers read, not {self.length}")
        self._check_widths()

    def _check_widths(self) -> None:
        if not self.context_dim:
            raise ValueError("no tower gives a context: give a use its blocks, or the family a T5")
        if self.t5 and self.width not in (None, self.t5.width):
            raise ValueError(f"the context is as wide as T5, {self.t5.width}, not width={self.width}")
        if self.clip_dim > self.context_dim:
            raise ValueError(f"towers give contexts of {self.clip_dim} together, more than the {self.context_dim} of all rows")

    @property
    def length(self) -> int:
        """Tokens of a chunk, BOS and EOS included."""
        return self.tokens or min(self.towers[use.tower].length for use in self.uses)

    @property
    def joint(self) -> bool:
        """Whether the network attends to text and image together (SD 3, FLUX.1): CLIP reads one chunk, and T5's rows stand behind it."""
        return self.t5 is not None or self.width is not None

    @property
    def rows(self) -> int:
        """Rows of the context, for every chunk where there may be several."""
        return (self.length if self.clip_dim else 0) + (self.t5_length if self.joint else 0)

    @property
    def clip_dim(self) -> int:
        """Width of what CLIP's towers give of the context."""
        return sum(self.towers[use.tower].width for use in self.uses if use.blocks is not None)

    @property
    def context_dim(self) -> int:
        """Width of the context."""
        return self.t5.width if self.t5 else self.width or self.clip_dim

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled part of the vector, which comes first in it."""
        towers = [(self.towers[use.tower], use.projected) for use in self.uses if use.pooled]
        return sum((tower.projection if projected else None) or tower.width for tower, projected in towers)

    @property
    def vector_dim(self) -> int | None:
        """Width of the vector, None where the family has none."""
        return self.pooled_dim + NUMBER_DIM * len(self.numbers) or None
