"""A stand-in for Inception that takes no time: what scoring does around an extractor is tested with it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features.extractor import Extractor, Identity
from eval.features.registry import ExtractorParams, Known

WIDTHS = {"pool": 6, "spatial": 5, "logits_unbiased": 8}


class Small(Extractor):
    """Random projections of 4x4 thumbnails, in float64: a row does not depend on its batch at all. It counts
    the pictures it is shown."""

    def __init__(self, weights: str, protocol: str) -> None:
        super().__init__()
        self.widths, self.seen = WIDTHS, 0
        self.identity = Identity("small", weights.ljust(64, "0"), protocol, random=weights == "random")
        generator = torch.Generator().manual_seed(len(weights) + len(protocol))
        drawn = torch.randn(48, sum(WIDTHS.values()), generator=generator, dtype=torch.float64)
        self.weights = torch.nn.Parameter(drawn, requires_grad=False)

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [F.adaptive_avg_pool2d(picture[None].double() / 255, 4).flatten(1) for picture in pictures]
        )

    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        self.seen += len(x)
        wide = (x[:, :, None] * self.weights).sum(1).float()
        found = dict(zip(WIDTHS, wide.split(list(WIDTHS.values()), 1), strict=True))
        return {name: found[name] for name in outputs}


def small(params: ExtractorParams, protocol: str, dtype: torch.dtype) -> Small:
    """Of weights that are named after the file that Inception's would be in; "random" as usual."""
    return Small(params.inception or "weights", protocol)


KNOWN = Known("pool", small)
