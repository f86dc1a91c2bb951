"""What every feature extractor is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Identity:
    """What features depend on besides the pictures. Numbers can be compared only if it is equal.

    network   "inception", "clip ViT-L-14-336", ...
    weights   SHA-256 of the file or, without a file, of the tensors
    prepared  how pictures become its input: size, filter, range
    random    whether the weights are random, so that numbers mean nothing outside a test
    """

    network: str
    weights: str
    prepared: str
    random: bool = False

    def to_json(self) -> dict[str, object]:
        """Plain values for json.dump."""
        return asdict(self)


class TextFeatures(NamedTuple):
    """rows (N, D) of length 1, and which captions were too long for the network and truncated."""

    rows: Tensor
    truncated: tuple[bool, ...]


class Extractor(nn.Module):
    """A network for inference, with its preparation of pictures. Subclasses define `prepare` and `features`.

    widths  of its outputs: {"pool": 2048, "logits": 1008}
    """

    identity: Identity
    widths: Mapping[str, int]

    @torch.inference_mode()
    def forward(self, pictures: Sequence[Tensor], outputs: Collection[str]) -> dict[str, Tensor]:
        """uint8 pictures (3, H, W) of any sizes -> {output: float32 (N, width)}, all on this module's device.

        A picture's row does not depend on the others, but for rounding.
        """
        self.check_outputs(outputs)
        return self.features(self.prepare(pictures), outputs)

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """The network's input, (N, ...), of pictures as in `forward`."""
        raise NotImplementedError

    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """The outputs of prepared pictures, as of `forward`."""
        raise NotImplementedError

    def text(self, prompts: Sequence[str]) -> TextFeatures:
        """Embeddings of captions. ValueError if the network reads none."""
        raise ValueError(f"{self.identity.network} reads no prompts")

    def check_outputs(self, outputs: Collection[str]) -> None:
        """ValueError for an unknown output."""
        for name in outputs:
            if name not in self.widths:
                raise ValueError(f"{self.identity.network} gives {', '.join(self.widths)}, not {name!r}")

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device
