"""The UNet: the sizes of published nets, their outputs as diffusers computes them, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from diffusion import Condition
from models import UNet, UNetParams
from models.files.blank import Blank
from models.layers.conditioning import sinusoid
from tests.models.small import (
    ADM,
    LCM,
    SD1,
    SD2,
    SDXL,
    UNET,
    UNETS,
    beside,
    inputs,
    randomised,
    relative_error,
    renamed,
)
from tests.peers import diffusers

PUBLISHED = {
    "SD 1.5": (UNetParams(heads=8, head_dim=None, context_dim=768), 859_520_964),
    "SD 2.1": (UNetParams(context_dim=1024, linear_projection=True), 865_910_724),
    "SDXL base": (
        UNetParams(
            channel_mult=(1, 2, 4),
            attention=(0, 2, 10),
            middle_attention=10,
            context_dim=2048,
            vector_dim=2816,
            linear_projection=True,
        ),
        2_567_463_684,
    ),
    "LCM (Dreamshaper)": (
        UNetParams(heads=8, head_dim=None, context_dim=768, guidance_dim=256),
        859_520_964 + 256 * 320,
    ),
    "SD 1.5 inpainting": (
        UNetParams(in_channels=9, heads=8, head_dim=None, context_dim=768),
        859_520_964 + 5 * 320 * 9,
    ),
    "SDXL refiner": (
        UNetParams(
            channels=384,
            attention=(0, 4, 4, 0),
            middle_attention=4,
            context_dim=1280,
            vector_dim=2560,
            linear_projection=True,
        ),
        2_259_526_660,
    ),
}

# House names, with the blocks already counted level by level, to diffusers names.
LATENT_DIFFUSION = {
    r"^time\.fc(\d)\.": r"time_embedding.linear_\1.",
    r"^vector\.mlp\.0\.": "add_embedding.linear_1.",
    r"^vector\.mlp\.2\.": "add_embedding.linear_2.",
    r"^label\.table\.": "class_embedding.",
    r"^guidance\.": "time_embedding.cond_proj.",
    r"^middle\.(\d)\.res\.": r"mid_block.resnets.\1.",
    r"^middle\.0\.attention\.": "mid_block.attentions.0.",
    r"^(down|up)\.(\d)\.(\d)\.res\.": r"\1_blocks.\2.resnets.\3.",
    r"^(down|up)\.(\d)\.(\d)\.attention\.": r"\1_blocks.\2.attentions.\3.",
    r"^down\.(\d)\.\d\.conv\.": r"down_blocks.\1.downsamplers.0.conv.",
    r"^up\.(\d)\.\d\.conv\.": r"up_blocks.\1.upsamplers.0.conv.",
    r"^norm_out\.": "conv_norm_out.",
    r"(resnets\.\d)\.emb\.": r"\1.time_emb_proj.",
    r"(resnets\.\d)\.skip\.": r"\1.conv_shortcut.",
    r"(attentions\.\d)\.blocks\.": r"\1.transformer_blocks.",
    r"\.self_attention\.qkv\.": ".attn1.to_[qkv].",
    r"\.self_attention\.out\.": ".attn1.to_out.0.",
    r"\.cross_attention\.q\.": ".attn2.to_q.",
    r"\.cross_attention\.kv\.": ".attn2.to_[kv].",
    r"\.cross_attention\.out\.": ".attn2.to_out.0.",
    r"\.feed_forward\.proj_in\.": ".ff.net.0.proj.",
    r"\.feed_forward\.proj_out\.": ".ff.net.2.",
}
GUIDED_DIFFUSION = {
    **LATENT_DIFFUSION,
    r"(attentions\.\d)\.norm\.": r"\1.group_norm.",
    r"(attentions\.\d)\.attention\.qkv\.": r"\1.to_[qkv].",
    r"(attentions\.\d)\.attention\.out\.": r"\1.to_out.0.",
}


def translated(state: Mapping[str, Tensor], blocks: int, rules: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict under the names that the rules, applied in order, make of its own."""
    stage = {"down": blocks + 1, "up": blocks + 2}  # a level's residual blocks and its resampling

    def by_level(match: re.Match[str]) -> str:
        level, i = divmod(int(match[2]), stage[match[1]])
        return f"{match[1]}.{level}.{i}."

    result: dict[str, Tensor] = {}
    for name, value in state.items():
        result |= renamed(re.sub(r"^(down|up)\.(\d+)\.", by_level, name), value, rules)
    return result


@dataclass(frozen=True)
class Peer:
    """One of our small nets, and the diffusers net and the names that should make the same of it."""

    params: UNetParams
    network: str
    config: dict[str, Any]
    names: dict[str, str]


DIFFUSERS: dict[str, Any] = dict(
    in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8
)
FINE_ATTENTION = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
COARSE_ATTENTION = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
PLAIN_ATTENTION = dict(
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
)
PEERS = {
    # attention_head_dim of UNet2DConditionModel is the number of heads.
    "SD 1": Peer(
        SD1,
        "UNet2DConditionModel",
        {**DIFFUSERS, **FINE_ATTENTION, "attention_head_dim": 4, "cross_attention_dim": 12},
        LATENT_DIFFUSION,
    ),
    "SD 2": Peer(
        SD2,
        "UNet2DConditionModel",
        {
            **DIFFUSERS,
            **FINE_ATTENTION,
            "layers_per_block": 2,
            "attention_head_dim": (4, 8),
            "cross_attention_dim": 12,
            "use_linear_projection": True,
        },
        LATENT_DIFFUSION,
    ),
    "SDXL": Peer(
        SDXL,
        "UNet2DConditionModel",
        {
            **DIFFUSERS,
            **COARSE_ATTENTION,
            "attention_head_dim": (4, 8),
            "cross_attention_dim": 12,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 22,
        },
        LATENT_DIFFUSION,
    ),
    "LCM": Peer(
        LCM,
        "UNet2DConditionModel",
        {
            **DIFFUSERS,
            **FINE_ATTENTION,
            "attention_head_dim": 4,
            "cross_attention_dim": 12,
            "time_cond_proj_dim": 256,
        },
        LATENT_DIFFUSION,
    ),
    # Inpainting and pix2pix: the first layer takes the image, or its mask and the image, too.
    "9 channels": Peer(
        replace(SD1, in_channels=9, out_channels=4),
        "UNet2DConditionModel",
        {
            **DIFFUSERS,
            **FINE_ATTENTION,
            "in_channels": 9,
            "out_channels": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 12,
        },
        LATENT_DIFFUSION,
    ),
    "8 channels": Peer(
        replace(SD1, in_channels=8, out_channels=4),
        "UNet2DConditionModel",
        {
            **DIFFUSERS,
            **FINE_ATTENTION,
            "in_channels": 8,
            "out_channels": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 12,
        },
        LATENT_DIFFUSION,
    ),
    # ADM itself resamples inside residual blocks; diffusers, as we do, by a convolution of its own.
    "ADM": Peer(
        ADM,
        "UNet2DModel",
        {
            **DIFFUSERS,
            **PLAIN_ATTENTION,
            "attention_head_dim": 8,
            "attn_norm_num_groups": 8,
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 11,
        },
        GUIDED_DIFFUSION,
    ),
}


def guidance_wave(scale: Tensor) -> Tensor:
    """What LCM's pipeline gives the network for this scale; it calls the scale less one w."""
    return diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, scale.float() - 1, embedding_dim=256
    )


def for_both(condition: Condition, dtype: torch.dtype) -> tuple[Condition, dict[str, Any]]:
    """The condition of two samples as we take it and as diffusers does, in that dtype."""
    given, ours = condition.tensors, condition.to(dtype=dtype).tensors
    theirs: dict[str, Any] = {}
    if "label" in given:
        theirs["class_labels"] = given["label"]
    if "context" in given:
        theirs["encoder_hidden_states"] = ours["context"]
    if "vector" in given:  # pooled text, then the sinusoids of three sizes
        sizes, text = torch.tensor([[64.0, 0.0, 32.0], [512.0, 7.0, 99.0]]), ours["vector"][:, :10]
        ours["vector"] = torch.cat([text, sinusoid(sizes.flatten(), 4).view(2, 12).to(dtype)], dim=-1)
        theirs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
    if "guidance" in given:
        theirs["timestep_cond"] = guidance_wave(given["guidance"]).to(dtype)
    return Condition(**ours), theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_of_published_nets(name: str) -> None:
    """A published configuration has exactly the published number of parameters."""
    params, count = PUBLISHED[name]
    with torch.device("meta"):
        network = UNet(params)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("kind", PEERS)
def test_output_and_gradients_equal_diffusers(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """With the same random weights, the output and the gradient of every parameter and of x are those of
    diffusers."""
    peer = PEERS[kind]
    ours, theirs = (
        randomised(UNet(peer.params)).to(dtype),
        getattr(diffusers, peer.network)(**peer.config).to(dtype).eval(),
    )
    theirs.load_state_dict(translated(ours.state_dict(), peer.params.blocks, peer.names), strict=True)
    x, t, condition = inputs(peer.params, (8, 12))
    x = x.to(dtype).requires_grad_()
    condition, asked = for_both(condition, dtype)
    out, expected = ours(x, t, condition), theirs(beside(x, condition.image), t, **asked).sample
    assert relative_error(out, expected) <= tolerance

    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(
        dtype
    )  # a different one for every output
    grads = torch.autograd.grad((out * weight).sum(), [x, *ours.parameters()])
    mine = translated(
        dict(zip(["x", *dict(ours.named_parameters())], grads, strict=True)), peer.params.blocks, peer.names
    )
    names = ["x", *dict(theirs.named_parameters())]
    for name, grad in zip(
        names, torch.autograd.grad((expected * weight).sum(), [x, *theirs.parameters()]), strict=True
    ):
        # A key's bias shifts all scores of a query alike, so its gradient is zero: there, both sides hold
        # rounding only.
        assert (mine[name] - grad).norm() <= 10 * tolerance * max(grad.norm(), torch.ones(())), name


SDXL_CONFIG: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_WIDTH: dict[str, tuple[UNetParams, dict[str, Any]]] = {
    "SD 1.5": (PUBLISHED["SD 1.5"][0], {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "SDXL, two of ten transformer blocks": (
        replace(PUBLISHED["SDXL base"][0], attention=(0, 1, 2), middle_attention=2),
        {**SDXL_CONFIG, "transformer_layers_per_block": (1, 1, 2)},
    ),
    "SDXL base": (PUBLISHED["SDXL base"][0], SDXL_CONFIG),  # 10.3 GB of weights
}


def filled(network: nn.Module) -> nn.Module:
    """A network without memory, with weights of the scale of `randomised`, in a fraction of the time that
    drawing them all takes.

    A million draws are repeated, a prime number of them, so that no two rows are the same, from another place
    in each parameter.
    """
    draws = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in network.to_empty(device="cpu").parameters():
            for part in p.view(-1).split(len(draws)):
                torch.div(draws[: len(part)], math.sqrt(p[0].numel()) if p.ndim > 1 else 2, out=part)
            draws = draws.roll(101)
    return network.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "SDXL base" else ()) for name in FULL_WIDTH]
)
def test_published_widths_equal_diffusers(name: str) -> None:
    """At published widths, in float32, too; both sides hold the same tensors, so that there is memory for
    them."""
    params, config = FULL_WIDTH[name]
    with torch.device("meta"), Blank():
        ours, theirs = UNet(params), diffusers.UNet2DConditionModel(**config).eval()
    published = translated(filled(ours).state_dict(), params.blocks, LATENT_DIFFUSION)
    theirs.load_state_dict(published, strict=True, assign=True)
    generator = torch.Generator().manual_seed(1)
    x, context = (
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.randn(1, 77, params.context_dim or 0, generator=generator),
    )
    told: dict[str, Any] = {"context": context}
    asked: dict[str, Any] = {"encoder_hidden_states": context}
    if params.vector_dim is not None:
        sizes, text = (
            torch.tensor([[1024.0, 768.0, 0.0, 64.0, 1024.0, 1024.0]]),
            torch.randn(1, 1280, generator=generator),
        )
        told["vector"] = torch.cat([text, sinusoid(sizes.flatten(), 256).view(1, -1)], dim=-1)
        asked["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
    t = torch.tensor([741.0])
    with torch.inference_mode():
        assert relative_error(ours(x, t, Condition(**told)), theirs(x, t, **asked).sample) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["SD 1", "SDXL", "LCM"])
def test_half_precision_is_no_worse_than_that_of_diffusers(kind: str, dtype: torch.dtype) -> None:
    """The distance of the output to that in float64 is at most 1.2 times the same of diffusers."""
    peer = PEERS[kind]
    ours, theirs = randomised(UNet(peer.params)), getattr(diffusers, peer.network)(**peer.config).eval()
    theirs.load_state_dict(translated(ours.state_dict(), peer.params.blocks, peer.names), strict=True)
    x, t, condition = inputs(peer.params, (16, 24))
    outputs = []
    for precision in (torch.float64, dtype):
        told, asked = for_both(condition, precision)
        ours.to(precision), theirs.to(precision)
        with torch.inference_mode():
            outputs.append(
                (ours(x.to(precision), t, told).double(), theirs(x.to(precision), t, **asked).sample.double())
            )
    mine, other = (float((half - exact).norm() / exact.norm()) for exact, half in zip(*outputs, strict=True))
    assert 0 < mine <= 1.2 * other


@pytest.mark.parametrize("kind", UNETS)
def test_fresh_residual_branches_are_off(kind: str) -> None:
    """Before training every residual block adds nothing to its skip, and every attention nothing at all."""
    params = UNETS[kind]
    network = UNet(params)
    x = torch.randn(2, 64, 4, 6)
    block: Any = network.middle[0]
    assert torch.equal(block(x, torch.randn(2, 128), torch.randn(2, 5, params.context_dim or 1)), x)


@pytest.mark.parametrize("size", [(1, 1), (8, 7), (9, 8), (13, 11), (31, 22)])
def test_sizes_that_do_not_halve_equal_diffusers(size: tuple[int, int], tmp_path: Path) -> None:
    """At four levels, in float64: an odd side is halved upwards, and comes back at its own size on the way
    up. Gradients flow, too."""
    params = replace(SD1, in_channels=4, out_channels=4, channel_mult=(1, 2, 1, 1), attention=(1, 1, 0, 0))
    spec = {
        "network": {"name": "unet", **asdict(params)},
        "schedule": {"name": "scaled_linear"},
        "prediction": "eps",
        "shape": (4, 8, 8),
    }
    model = models.build({**spec, "family": "sd1"})
    ours = randomised(model.network)
    models.save(model, tmp_path, "diffusers")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").double()
    x, t, condition = inputs(params, size)
    x = x.double().requires_grad_()
    out = ours.double()(x, t, Condition(context=condition.tensors["context"].double()))
    expected = theirs(x, t, condition.tensors["context"].double()).sample
    assert out.shape == x.shape
    assert relative_error(out, expected) <= 1e-11
    mine, others = (torch.autograd.grad(each.square().sum(), x)[0] for each in (out, expected))
    assert relative_error(mine, others) <= 1e-10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(attention=(1,)), "attention has 1 levels, channel_mult 2"),
        (dict(groups=24), "a level of 32 channels does not divide into groups=24"),
        (dict(heads=4), "give either heads or head_dim"),
        (dict(head_dim=None), "give either heads or head_dim"),
        (dict(heads=5, head_dim=None), "32 channels do not divide into heads"),
        (dict(head_dim=64), "32 channels do not divide into heads"),
        (dict(head_dim=24), "32 channels do not divide into heads"),
        (dict(channels=33, groups=3, attention=(0, 0), middle_attention=0), "even number of frequencies"),
        (dict(attention_kind="plian"), "no attention kind named 'plian'; did you mean 'plain'"),
        (dict(attention_kind="plain", context_dim=8), "nothing in this UNet attends to a context"),
        (
            dict(attention=(0, 0), middle_attention=0, context_dim=8),
            "nothing in this UNet attends to a context",
        ),
        (
            dict(attention_kind="plain", attention=(1, 2)),
            "plain attention comes once after a residual block, not 2 times",
        ),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is a network."""
    with pytest.raises(ValueError, match=message):
        UNet(UNetParams(**{**UNET, "attention": (1, 0), **wrong}))
