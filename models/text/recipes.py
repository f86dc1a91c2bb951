"""How the outputs of a family's text encoders are joined to one condition, as data (`TextParams`)."""

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
    """How a family of models reads prompts.

    readers  by name; their states and pooled outputs are concatenated in this order along the width
    behind   readers whose states follow along the sequence instead (SD 3); narrower states are padded with
             zeros
    zeros    rows of zeros at the end, in place of a missing text encoder
    width    minimum width of the context: that of the missing text encoder
    numbers  names of the numbers in the vector behind the pooled outputs, 256 sinusoids each (Podell et al.
             2023)
    null     "no prompt" is the encoded "" ("empty"), or a context and pooled outputs of zeros ("zeros")
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
                    f"joined text encoders must read equal numbers of tokens, not {sorted(rows)}"
                )
        if len(self._widths) > 1 and (width := self._widths[0]) > (most := max(self._widths[1:])):
            raise ValueError(f"the context has width {width}, more than the {most} of the rows behind it")

    @property
    def groups(self) -> list[list[str]]:
        """The readers of the context: groups follow along the sequence, and their members along the width."""
        context = [name for name, reader in self.readers.items() if reader.context_dim]
        groups = [[name for name in context if name not in self.behind], *([name] for name in self.behind)]
        return [group for group in groups if group]

    @property
    def chunked(self) -> bool:
        """Whether long prompts are read in chunks. In SD 3 and FLUX.1 the context has a fixed length."""
        one_group = len(self.groups) == 1 and not self.zeros
        return one_group and all(self.readers[name].chunked for name in self.groups[0])

    @property
    def rows(self) -> int:
        """Rows of the context for each chunk."""
        return sum(self.readers[group[0]].rows for group in self.groups) + self.zeros

    @property
    def context_dim(self) -> int:
        """Width of the context."""
        return max(self._widths)

    @property
    def _widths(self) -> list[int]:
        widths = [sum(self.readers[name].context_dim for name in group) for group in self.groups]
        return [*widths, self.width] if self.width else widths

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled outputs, the first part of the vector."""
        return sum(reader.pooled_dim for reader in self.readers.values())

    @property
    def vector_dim(self) -> int | None:
        """Width of the vector; None without one."""
        return self.pooled_dim + NUMBER_DIM * len(self.numbers) or None

    def replace_reader(self, name: str, **changes: Any) -> TextParams:
        """A copy with changed parameters of one reader."""
        return replace(self, readers={**self.readers, name: replace(self.readers[name], **changes)})
