"""What every feature extractor is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Identity:
    """What a feature depends on besides the picture. Two numbers may be compared only where all of it is
    equal.

    network   "inception", "clip ViT-L-14-336", ...
    weights   SHA-256 of the file or, of a network that came from no file, of its tensors
    prepared  how pictures become its input: size, filter, range
    random    whether the weights are a random stand-in, so that numbers mean nothing outside a test
    """

    network: str
    weights: str
    prepared: str
    random: bool = False

    def to_json(self) -> dict[str, object]:
        """Plain values for json.dump."""
        return asdict(self)


class TextFeatures(NamedTuple):
    """rows (N, D), each of length 1; and which captions were longer than the network can read, and were
    cut."""

    rows: Tensor
    truncated: tuple[bool, ...]


class Extractor(nn.Module):
    """A network, in inference, with its own preparation of pictures: one of these defines `prepare` and
    `features`.

    widths  what it can give, by name, and how wide a row of each is: {"pool": 2048, "logits": 1008}
    """

    identity: Identity
    widths: Mapping[str, int]

    @torch.inference_mode()
    def forward(self, pictures: Sequence[Tensor], outputs: Collection[str]) -> dict[str, Tensor]:
        """pictures: uint8 (3, H, W) each, of any sizes, on this module's device -> {output: float32 (N,
        width)}, on that device too.

        A picture's row does not depend on the others but for rounding.
        """
        self.check_outputs(outputs)
        return self.features(self.prepare(pictures), outputs)

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """What the network takes: a row (N, ...) for each picture, however large that is, as `forward` takes
        them."""
        raise NotImplementedError

    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """The outputs, as `forward` gives them, of pictures that are prepared."""
        raise NotImplementedError

    def text(self, prompts: Sequence[str]) -> TextFeatures:
        """Embeddings of captions, by networks that read them; ValueError by all others."""
        raise ValueError(f"{self.identity.network} reads no prompts")

    def check_outputs(self, outputs: Collection[str]) -> None:
        """ValueError at the first of these outputs that there is not."""
        for name in outputs:
            if name not in self.widths:
                raise ValueError(f"{self.identity.network} gives {', '.join(self.widths)}, and no {name!r}")

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device
