"""Features of DINOv2 (Oquab et al. 2023; Stein et al. 2023), from a local file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.features.extractor import Extractor, Identity
from eval.features.preparation import Preparation
from eval.features.sizes import by_size
from eval.features.weights import fill, read_tensors, sha256_of_tensors
from models.files.text import sha256_of_file

NAMES = tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant"))
"""timm's names; Meta's files are dinov2_vits14_pretrain.pth, vitb14, vitl14 and vitg14."""
PREPARATION = Preparation(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), fit="squash")
"""Of Stein et al.: 224 x 224 pixels, ImageNet's mean and standard deviation."""
TRAINED, USED = 37, 16  # patches per side: at 518 pixels, at 224
OFFSET = 0.1  # which Meta adds to the patches per side before it divides by those of training


class Dinov2Features(Extractor):
    """{"cls": dim}: the class token after the last norm, of pictures at 224 x 224."""

    model: Any

    def __init__(self, model: nn.Module, identity: Identity) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.identity = identity
        self.widths = {"cls": self.model.embed_dim}

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """See `Preparation`."""
        return by_size(pictures, PREPARATION)

    @torch.inference_mode()
    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """See `Extractor`."""
        return {"cls": self.model.forward_features(x)[:, 0].float()} if outputs else {}


def load_dinov2(path: str | Path, name: str = "vit_large_patch14_dinov2") -> Dinov2Features:
    """From a file in Meta's or timm's layout, for 518 pixels. ValueError for weights of another network."""
    digest = sha256_of_file(path)
    model = _build(name)
    tensors = {_renamed(key): tensor for key, tensor in read_tensors(path).items() if key != "mask_token"}
    if "pos_embed" in tensors and tensors["pos_embed"].shape[1:2] == (1 + TRAINED**2,):
        tensors["pos_embed"] = positions(tensors["pos_embed"])
    fill(model, tensors, str(path))
    return Dinov2Features(model, Identity(f"dinov2 {name}", digest, str(PREPARATION)))


def random_dinov2(name: str = "vit_large_patch14_dinov2", seed: int = 0) -> Dinov2Features:
    """With random weights, for trials; LayerScale is 1, since at 1e-5 all pictures are alike."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build(name)
    for key, parameter in model.named_parameters():
        if key.endswith(".gamma"):
            nn.init.ones_(parameter)
    weights = sha256_of_tensors(model.state_dict())
    return Dinov2Features(model, Identity(f"dinov2 {name}", weights, str(PREPARATION), random=True))


def positions(embedding: Tensor) -> Tensor:
    """Embeddings of class token and patches, (1, 1 + 37^2, D) -> (1, 1 + 16^2, D), as in Meta's code.

    Bicubic without antialiasing, by the factor (16 + 0.1) / 37: new patch i is read at (i + 1/2) 37 / 16.1 -
    1/2. timm antialiases and transformers leaves the 0.1 out, which gives other features than Meta's network.
    """
    token, patches = embedding[:, :1].float(), embedding[:, 1:].float()
    grid = patches.unflatten(1, (TRAINED, TRAINED)).movedim(-1, 1)
    scale = (USED + OFFSET) / TRAINED
    resampled = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([token, resampled.flatten(2).mT], dim=1)


def _build(name: str) -> nn.Module:
    if name not in NAMES:
        raise ValueError(f"no DINOv2 is called {name!r}; there are {', '.join(NAMES)}")
    model: nn.Module = timm.create_model(name, pretrained=False, img_size=PREPARATION.size, num_classes=0)
    return model


def _renamed(key: str) -> str:
    """timm's names of Meta's gated MLP in the giant network."""
    return key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
