"""What a family of models takes from its text towers: a `TextParams`, data and no code of its own (SD 1, SDXL, FLUX.1, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from diffusion.spec import check_at_least_one, check_names, check_range
from models.clip import CLIP_G, CLIP_H, CLIP_L, CLIPTextParams
from models.t5 import T5_XXL, T5Params
from models.tokenizer import EOS

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


def sd1(clip_l: CLIPTextParams = CLIP_L) -> TextParams:
    """Stable Diffusion 1: the last state of CLIP-L through its norm, padded with EOS."""
    return TextParams({"clip_l": clip_l}, (TowerUse("clip_l", clip_l.layers, norm=True, pad=EOS, pooled=False),))


def sd2(clip_h: CLIPTextParams = CLIP_H, blocks: int = 23) -> TextParams:
    """Stable Diffusion 2: the state of OpenCLIP-H after 23 blocks through its norm, whether the tower holds 24 or only those 23."""
    return TextParams({"clip_h": clip_h}, (TowerUse("clip_h", blocks, norm=True, pad=0, pooled=False),))


def sdxl(clip_l: CLIPTextParams = CLIP_L, clip_g: CLIPTextParams = CLIP_G) -> TextParams:
    """SDXL: the last states but one of CLIP-L and OpenCLIP-bigG; bigG's pooled output and three sizes in pixels."""
    return TextParams(
        towers={"clip_l": clip_l, "clip_g": clip_g},
        uses=(
            TowerUse("clip_l", clip_l.layers - 1, norm=False, pad=EOS, pooled=False),
            TowerUse("clip_g", clip_g.layers - 1, norm=False, pad=0, pooled=True),
        ),
        numbers=("height", "width", "top", "left", "target_height", "target_width"),
        null="zeros",
    )


def refiner(clip_g: CLIPTextParams = CLIP_G) -> TextParams:
    """SDXL's refiner: bigG alone, and an aesthetic score (6.0 for the prompt, 2.5 for its negative) in place of the target size."""
    return TextParams(
        towers={"clip_g": clip_g},
        uses=(TowerUse("clip_g", clip_g.layers - 1, norm=False, pad=0, pooled=True),),
        numbers=("height", "width", "top", "left", "score"),
    )


def flux(clip_l: CLIPTextParams = CLIP_L, t5: T5Params = T5_XXL, length: int = 512) -> TextParams:
    """FLUX.1: T5's states alone, 512 rows (256 for schnell); CLIP-L's pooled output, without a projection."""
    pooled = TowerUse("clip_l", None, norm=False, pad=EOS, pooled=True, projected=False)
    return TextParams({"clip_l": clip_l}, (pooled,), t5=t5, t5_length=length)


def sd3(
    clip_l: CLIPTextParams = CLIP_L,
    clip_g: CLIPTextParams = CLIP_G,
    t5: T5Params | None = None,
    length: int = 256,
    projected_l: bool = False,
    width: int = 4096,
) -> TextParams:
    """Stable Diffusion 3 and 3.5: the last states but one of CLIP-L and bigG, then T5's, or as many rows of zeros without one; both pooled
    outputs (Esser et al. 2024, section 4).

    projected_l  CLIP-L's goes through a projection, as diffusers' folders hold one; the original files do without
    width        of the context where there is no T5
    """
    return TextParams(
        towers={"clip_l": clip_l, "clip_g": clip_g},
        uses=(
            TowerUse("clip_l", clip_l.layers - 1, norm=False, pad=EOS, pooled=True, projected=projected_l),
            TowerUse("clip_g", clip_g.layers - 1, norm=False, pad=0, pooled=True),
        ),
        t5=t5,
        t5_length=length,
        width=t5.width if t5 else width,
    )
