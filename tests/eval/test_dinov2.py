"""DINOv2 against transformers on the same random weights, and its embedding of positions against the
formula."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor  # type: ignore[import-untyped]

from eval.features.dinov2 import PREPARATION, Dinov2Features, load_dinov2, positions, random_dinov2
from models.files.text import sha256_of_file
from tests.peers import timm, transformers

SMALL = "vit_small_patch14_dinov2"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        for size in [(40, 64), (50, 50), (40, 64)]
    ]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights in Meta's layout, of the small network, drawn so that every tensor counts."""
    shapes = timm.create_model(SMALL, num_classes=0).state_dict()
    random = {key: 0.05 * drawn(i, *tensor.shape) for i, (key, tensor) in enumerate(shapes.items())}
    for key in random:
        if key.endswith(".gamma") or re.search(r"norm\d?\.weight", key):
            random[key] += 0.5
    return {**random, "mask_token": drawn(0, 1, 384)}


@pytest.fixture(scope="module")
def small(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Dinov2Features:
    path = tmp_path_factory.mktemp("weights") / "dinov2_vits14_pretrain.pth"
    torch.save(state, path)
    return load_dinov2(path, SMALL)


def transformers_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's names as transformers has them, with queries, keys and values apart."""
    names = {
        "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
        "attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }  # fmt: skip
    out = {}
    for key, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.(.*)", key)
        prefix, rest = (f"encoder.layer.{block[1]}.", block[2]) if block else ("", key)
        stem, _, kind = rest.rpartition(".")
        if stem == "attn.qkv":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{prefix}attention.{part}_proj.{kind}"] = rows
        elif rest in names:
            out[prefix + names[rest]] = tensor
        else:
            out[f"{prefix}{names.get(stem, stem)}.{kind}"] = tensor
    return out


def peer(state: dict[str, Tensor], size: int) -> Any:
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=size, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.load_state_dict(transformers_keys(state))
    return model


def test_the_network_is_transformers(small: Dinov2Features, state: dict[str, Tensor]) -> None:
    """The same weights and positions: class tokens within 1e-4, at values of about 1, for pictures of two
    sizes in their order."""
    model = peer({**state, "pos_embed": positions(state["pos_embed"])}, 224)
    with torch.inference_mode():
        expected = torch.cat(
            [model(PREPARATION(picture[None])).last_hidden_state[:, 0] for picture in pictures()]
        )
    found = small(pictures(), ["cls"])["cls"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert (small.widths, found.dtype) == ({"cls": 384}, torch.float32)
    with pytest.raises(ValueError, match="gives cls, not 'pool'"):
        small(pictures(), ["pool"])


def test_positions_are_read_where_meta_reads_them() -> None:
    """Against the bicubic sum written out in float64 (Keys 1981, a = -3/4), at (i + 1/2) 37 / 16.1 - 1/2, the
    border repeated: 1e-5."""
    embedding = drawn(0, 1, 1 + 37 * 37, 3)
    weights = np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d, a = abs(at - j), -0.75
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), 36)] += weight
    grid = embedding[0, 1:].double().numpy().reshape(37, 37, 3)
    expected = torch.from_numpy(np.einsum("ia,jb,abc->ijc", weights, weights, grid).reshape(1, 256, 3))
    found = positions(embedding)
    torch.testing.assert_close(found[:, 1:].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(found[:, :1], embedding[:, :1])


def test_peers_read_positions_elsewhere(small: Dinov2Features, state: dict[str, Tensor]) -> None:
    """timm antialiases and transformers leaves the 0.1 out: their embeddings of the same weights differ from
    Meta's, and so do features."""
    embedding = state["pos_embed"]
    ours = positions(embedding)
    timms = timm.layers.resample_abs_pos_embed(embedding, [16, 16])
    plain = (
        F.interpolate(embedding[:, 1:].unflatten(1, (37, 37)).movedim(-1, 1), (16, 16), mode="bicubic")
        .flatten(2)
        .mT
    )
    scale = float(embedding.std())
    assert float((ours - timms).std()) > 0.2 * scale
    assert float((ours[:, 1:] - plain).std()) > 0.02 * scale
    with torch.inference_mode():
        theirs = peer(state, 518)(PREPARATION(pictures()[0][None])).last_hidden_state[:, 0]
    assert (theirs - small(pictures()[:1], ["cls"])["cls"]).abs().max() > 1e-3


def test_preparation_is_that_of_stein_et_al() -> None:
    """torchvision's Resize((224, 224), BICUBIC), ToTensor and Normalize on the picture in Pillow: equal in
    every bit."""
    steps = [
        Resize((224, 224), InterpolationMode.BICUBIC),
        ToTensor(),
        Normalize(PREPARATION.mean, PREPARATION.std),
    ]
    for picture in pictures():
        theirs = Compose(steps)(Image.fromarray(picture.permute(1, 2, 0).numpy()))
        assert torch.equal(PREPARATION(picture[None])[0], theirs)


def test_timms_layout_is_the_same(small: Dinov2Features, state: dict[str, Tensor], tmp_path: Path) -> None:
    """Without the mask token: the same features, under another file's name."""
    torch.save({key: tensor for key, tensor in state.items() if key != "mask_token"}, tmp_path / "timm.bin")
    other = load_dinov2(tmp_path / "timm.bin", SMALL)
    assert torch.equal(other(pictures(), ["cls"])["cls"], small(pictures(), ["cls"])["cls"])
    assert other.identity.weights == sha256_of_file(tmp_path / "timm.bin") != small.identity.weights


def test_what_is_no_dinov2_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Unknown names, weights of another size, missing and unknown tensors: one line that says which."""
    torch.save(state, tmp_path / "small.pth")
    with pytest.raises(ValueError, match="no DINOv2 is called 'vit_x'; there are vit_small_patch14_dinov2"):
        load_dinov2(tmp_path / "small.pth", "vit_x")
    with pytest.raises(ValueError, match=r"cls_token has shape \[1, 1, 384\], not \[1, 1, 768\]"):
        load_dinov2(tmp_path / "small.pth", "vit_base_patch14_dinov2")
    torch.save({key: tensor for key, tensor in state.items() if key != "norm.bias"}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"it lacks norm\.bias"):
        load_dinov2(tmp_path / "less.pth", SMALL)
    torch.save({**state, "register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="register_tokens is unknown"):
        load_dinov2(tmp_path / "more.pth", SMALL)


def test_the_stand_in_tells_pictures_apart() -> None:
    """Random weights are marked, the same for a seed, and their features differ between pictures."""
    stand_in = random_dinov2(SMALL)
    rows = stand_in(pictures(), ["cls"])["cls"]
    assert stand_in.identity.random
    assert stand_in.identity == random_dinov2(SMALL).identity != random_dinov2(SMALL, seed=1).identity
    assert (rows[0] - rows[1]).abs().max() > 1e-2
