"""How well a picture fits its caption: the conventions of the CLIP score, on embeddings.

All take image and text (N, D), rows of length 1 from the two towers of one CLIP, pair by pair, and give (N,):
the score of a set is the mean over its pairs. What differs, and makes published numbers differ, is in
CONVENTIONS.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Convention:
    """score = scale * cos, at least 0 pair by pair where `clipped`; captions are embedded with `prefix`
    before them.

    citation  who states it so
    """

    scale: float
    clipped: bool
    prefix: str
    citation: str

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """image, text (N, D) of length 1 each -> (N,). ValueError where the shapes differ or a row is not of
        length 1 within 1e-2."""
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(
                f"image and text must both be (N, D), pair by pair, not {tuple(image.shape)} and "
                f"{tuple(text.shape)}"
            )
        for name, rows in (("image", image), ("text", text)):
            if not ((rows.norm(dim=1) - 1).abs() <= 1e-2).all():  # nor is NaN
                raise ValueError(f"the rows of {name} must have length 1: normalise the embeddings")
        cosine = (image * text).sum(1)
        return self.scale * (cosine.clamp(min=0) if self.clipped else cosine)


CONVENTIONS = {
    "clip_score": Convention(
        100.0, False, "", "text-to-image literature, 100 cos; torchmetrics clips the mean of the set at 0"
    ),
    "hessel": Convention(
        2.5,
        True,
        "A photo depicts ",
        "Hessel et al. 2021, CLIPScore, eq. 1, w = 2.5; prefix and all in their code",
    ),
}
"""By name."""


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """100 cos(image, text), -100 ... 100: (N, D), (N, D) -> (N,)."""
    return CONVENTIONS["clip_score"](image, text)


def hessel(image: Tensor, text: Tensor) -> Tensor:
    """2.5 max(cos(image, text), 0), 0 ... 2.5 (Hessel et al. 2021): (N, D), (N, D) -> (N,).

    The text is that of CONVENTIONS["hessel"].prefix + caption.
    """
    return CONVENTIONS["hessel"](image, text)
