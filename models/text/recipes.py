"""How the text encoders of a family are joined to one condition: a `TextParams`, data and no code of its own
(SD 1, SDXL, FLUX.1, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffusion.spec import check_at_least_one, check_names, check_range
from models.text.reader import Reader

NUMBER_DIM = 256  # sinusoids per number (Podell et al. 2023, section 2.2)
MAX_ZEROS = 4096  # rows of context; families have 256


@dataclass(frozen=True)
class TextParams:
    """The text side of one family of models.

    readers  how prompts are read, by name. Contexts stand side by side in this order, along the width, and so
             do pooled outputs
    behind   readers whose rows stand behind those, along the sequence; what is narrower is filled up with
             zeros to the widest (SD 3)
    zeros    rows of zeros behind all, in place of a text encoder that is left out
    width    of the context at least: of the text encoder that is left out
    numbers  names of the numbers behind the pooled part of the vector, 256 sinusoids each (Podell et al.
             2023)
    null     what "no prompt" is: the encoded "" ("empty"), or zeros for context and pooled part ("zeros");
             numbers stay
    """

    readers: Mapping[str, Reader]
    behind: tuple[str, ...] = ()
    zeros: int = 0
    width: int | None = None
    numbers: tuple[str, ...] = ()
    null: Literal["empty", "zeros"] = "empty"

    def __post_init__(self) -> None:
        check_names("rule for null", [self.null], ["empty", "zeros"])
        check_names("text encoder", self.behind, self.readers)
        check_at_least_one(self, "width")
        check_range(self, "zeros", least=0, most=MAX_ZEROS)
        if not self.groups:
            raise ValueError("no text encoder gives a context: let one give its states")
        for group in self.groups:
            if len(rows := {self.readers[name].rows for name in group}) > 1:
                raise ValueError(
                    f"text encoders read {sorted(rows)} tokens at once: their contexts are joined, so all "
                    "must read as many"
                )
        if len(self._widths) > 1 and self._widths[0] > max(self._widths[1:]):
            raise ValueError(
                f"text encoders give contexts of {self._widths[0]} together, more than the "
                f"{max(self._widths[1:])} of the rows behind them"
            )

    @property
    def groups(self) -> list[list[str]]:
        """The readers that give the context. Those of a group stand side by side, and groups one behind the
        other."""
        context = [name for name, reader in self.readers.items() if reader.context_dim]
        groups = [[name for name in context if name not in self.behind], *([name] for name in self.behind)]
        return [group for group in groups if group]

    @property
    def chunked(self) -> bool:
        """Whether long prompts are read in chunks. Not where a network attends to text and image together, as
        in SD 3 and FLUX.1: there a context has one length, for one that is twice there is another context."""
        return (
            len(self.groups) == 1
            and not self.zeros
            and all(self.readers[name].chunked for name in self.groups[0])
        )

    @property
    def rows(self) -> int:
        """Rows of the context, for every chunk where there may be several."""
        return sum(self.readers[group[0]].rows for group in self.groups) + self.zeros

    @property
    def context_dim(self) -> int:
        """Width of the context."""
        return max(self._widths)

    @property
    def _widths(self) -> list[int]:
        return [sum(self.readers[name].context_dim for name in group) for group in self.groups] + (
            [self.width] if self.width else []
        )

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled part of the vector, which comes first in it."""
        return sum(reader.pooled_dim for reader in self.readers.values())

    @property
    def vector_dim(self) -> int | None:
        """Width of the vector, None where the family has none."""
        return self.pooled_dim + NUMBER_DIM * len(self.numbers) or None

    def replace_reader(self, name: str, **changes: Any) -> TextParams:
        """The same, but for parameters of one reader."""
        return replace(self, readers={**self.readers, name: replace(self.readers[name], **changes)})
