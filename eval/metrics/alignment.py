"""How well a picture fits its caption: CLIP scores of embeddings.

They take image and text (N, D), rows of length 1 from the two towers of one CLIP, and give (N,): the score of
a set is the mean over its pairs. Published numbers differ by their CONVENTIONS.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Convention:
    """score = scale * cos, at least 0 if `clipped`; captions are embedded with `prefix` before them."""

    scale: float
    clipped: bool
    prefix: str

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """image, text (N, D) -> (N,). ValueError if shapes differ or a length is not 1 within 1e-2."""
        if image.ndim != 2 or image.shape != text.shape:
            shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
            raise ValueError(f"image and text must both be (N, D), pair by pair, not {shapes}")
        for name, rows in (("image", image), ("text", text)):
            if not ((rows.norm(dim=1) - 1).abs() <= 1e-2).all():  # nor is NaN
                raise ValueError(f"the rows of {name} must have length 1: normalise the embeddings")
        cosine = (image * text).sum(1)
        return self.scale * (cosine.clamp(min=0) if self.clipped else cosine)


CONVENTIONS = {
    # Of the literature on text to image. torchmetrics clips the mean of the set at 0.
    "clip_score": Convention(100.0, clipped=False, prefix=""),
    # CLIPScore, Hessel et al. 2021, eq. 1 with w = 2.5; the prefix is in their code.
    "hessel": Convention(2.5, clipped=True, prefix="A photo depicts "),
}
