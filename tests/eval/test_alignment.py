"""The conventions of the CLIP score: closed forms, OpenCLIP's towers, and torchmetrics on a small CLIP with
random weights."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics.alignment import CONVENTIONS
from tests.peers import open_clip, torchmetrics, transformers

clip_score, hessel = CONVENTIONS["clip_score"], CONVENTIONS["hessel"]

LONG = " ".join(["cat"] * 98 + ["dog", "bird"])


def unit(*angles: float) -> Tensor:
    """Rows (cos, sin) of these angles in degrees."""
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_closed_form() -> None:
    """At 0, 60, 90, 120 and 180 degrees: 100 cos, and 2.5 max(cos, 0), to 1e-12."""
    image, text = unit(0, 0, 0, 30, 10), unit(0, 60, 90, 150, 190)
    cosine = torch.tensor([1, 0.5, 0, -0.5, -1], dtype=torch.float64)
    torch.testing.assert_close(clip_score(image, text), 100 * cosine, rtol=0, atol=1e-12)
    torch.testing.assert_close(hessel(image, text), 2.5 * cosine.clamp(min=0), rtol=0, atol=1e-12)


def test_clipping_each_pair_is_not_clipping_the_mean() -> None:
    """Hessel's average over cosines 1 and -1 is 1.25, and would be 0 were their mean clipped; unclipped it is
    0."""
    image, text = unit(0, 0), unit(0, 180)
    assert float(hessel(image, text).mean()) == pytest.approx(1.25, abs=1e-12)
    assert float(clip_score(image, text).mean()) == pytest.approx(0, abs=1e-12)


def test_conventions_say_what_they_are() -> None:
    """Scale, clipping and prefix of each by name; each is the function of that name."""
    assert {name: (c.scale, c.clipped, c.prefix) for name, c in CONVENTIONS.items()} == {
        "clip_score": (100.0, False, ""),
        "hessel": (2.5, True, "A photo depicts "),
    }
    image, text = F.normalize(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    for name, function in (("clip_score", clip_score), ("hessel", hessel)):
        assert torch.equal(CONVENTIONS[name](image, text), function(image, text))


def test_embeddings_that_cannot_be_compared_are_refused() -> None:
    """Other numbers of rows, no batch, and rows that are not of length 1, which would be no cosine; NaN is no
    length either."""
    with pytest.raises(ValueError, match=r"pair by pair, not \(2, 2\) and \(1, 2\)"):
        clip_score(unit(0, 1), unit(0))
    with pytest.raises(ValueError, match="pair by pair"):
        clip_score(unit(0)[0], unit(0)[0])
    with pytest.raises(ValueError, match="the rows of text must have length 1"):
        hessel(unit(0), 2 * unit(0))
    with pytest.raises(ValueError, match="the rows of image must have length 1"):
        hessel(unit(0) * torch.nan, unit(0))


@cache
def tensors() -> Any:
    """transformers' CLIPModel with embeddings as tensors, which torchmetrics expects and transformers gave
    before its version 5."""

    class Tensors(transformers.CLIPModel):  # type: ignore[misc]  # transformers is not annotated for us
        def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
            return as_tensor(super().get_image_features(*args, **kwargs))

        def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
            return as_tensor(super().get_text_features(*args, **kwargs))

    return Tensors


def as_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small CLIPModel of transformers with random weights, and its processor with CLIP's own vocabulary,
    from no hub."""
    folder = tmp_path_factory.mktemp("vocabulary")
    simple = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(
        json.dumps({names.get(token, token): index for token, index in simple.encoder.items()})
    )
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges if len(pair) == 2) + "\n"
    )
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    size = {"height": 32, "width": 32}
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer
    )
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    eos = simple.eot_token_id
    text = {
        **common,
        "vocab_size": len(simple.encoder),
        "eos_token_id": eos,
        "bos_token_id": eos - 1,
        "pad_token_id": eos,
    }
    vision = {**common, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tensors()(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        ).eval()
    return model, processor


def embedded(peer: tuple[Any, Any], images: list[Tensor], prompts: list[str]) -> tuple[Tensor, Tensor]:
    """transformers' own embeddings, of length 1, with captions cut as its tokenizer cuts them."""
    model, processor = peer
    processed = processor(images=images, text=prompts, return_tensors="pt", padding=True, truncation=True)
    with torch.inference_mode():
        image = model.get_image_features(processed["pixel_values"])
        text = model.get_text_features(processed["input_ids"], processed["attention_mask"])
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def images(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 40, 32), generator=generator, dtype=torch.uint8) for _ in range(n)]


def test_torchmetrics_on_the_same_network(peer: tuple[Any, Any]) -> None:
    """Its score of each pair is our 100 cos within 1e-4, and that of several pairs the mean."""
    prompts = ["a cat", "two dogs in the snow", "x"]
    image, text = embedded(peer, images(3), prompts)
    ours = clip_score(image, text)
    metric = torchmetrics.multimodal.CLIPScore(lambda: peer)
    for index, (picture, prompt) in enumerate(zip(images(3), prompts, strict=True)):
        metric.reset()
        metric.update([picture], [prompt])
        torch.testing.assert_close(metric.score, ours[index], rtol=0, atol=1e-4)
    metric.reset()
    metric.update(images(3), prompts)
    torch.testing.assert_close(metric.compute(), ours.mean(), rtol=0, atol=1e-4)


def test_torchmetrics_hides_a_negative_mean(peer: tuple[Any, Any]) -> None:
    """It clips the mean of the set at 0, and no pair: against captions that point away it reports 0, where
    the mean is negative, and where max(100 cos, 0) of each pair, which its documentation states, has a
    positive mean.
    """
    prompts = ["a cat", "two dogs in the snow", "x", "y"]
    image, text = embedded(peer, images(4), prompts)
    away = [text[0], -text[1], -text[2], -text[3]]
    model, processor = peer

    class Away(tensors()):  # type: ignore[misc]  # likewise
        def get_text_features(self, *_: Any, **__: Any) -> Tensor:
            return torch.stack(away)

    turned = Away(model.config).eval()
    turned.load_state_dict(model.state_dict())
    metric = torchmetrics.multimodal.CLIPScore(lambda: (turned, processor))
    metric.update(images(4), prompts)
    ours = clip_score(image, torch.stack(away))
    assert float(ours.mean()) < -5
    assert float(metric.compute()) == 0
    each = 100 * hessel(image, torch.stack(away)).mean() / 2.5
    assert float(each) > 1


def test_torchmetrics_loses_the_end_of_a_long_caption(peer: tuple[Any, Any]) -> None:
    """It cuts tokens behind the tokenizer, and with them the end of text, where the embedding is read: that
    of 100 words is another than the tokenizer's own truncation gives, which OpenCLIP agrees with token by
    token.
    """
    _, processor = peer
    whole = processor.tokenizer([LONG])["input_ids"][0]
    kept = processor.tokenizer([LONG], truncation=True)["input_ids"][0]
    assert (len(whole), len(kept)) == (102, 77)
    assert kept == open_clip.SimpleTokenizer()([LONG])[0].tolist()
    eos = open_clip.SimpleTokenizer().eot_token_id
    assert kept[-1] == eos
    assert eos not in whole[:77]
    ours = clip_score(*embedded(peer, images(1), [LONG]))
    metric = torchmetrics.multimodal.CLIPScore(lambda: peer)
    with pytest.warns(UserWarning, match="Will truncate captions"):
        metric.update(images(1), [LONG])
    assert abs(float(metric.score) - float(ours)) > 0.1
