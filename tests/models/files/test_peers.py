"""diffusers, transformers and open_clip read what we write and compute the same with it; we read what they
write.

Of UNets and what goes with them; `test_flow_peers` is of FLUX.1 and Stable Diffusion 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import models
from models.networks.unet import UNet
from models.presets import miniature
from models.text.clip_tokenizer import BOS, EOS, tokenize
from tests.models.files.pipelines import equal, files, states
from tests.models.files.tiny import UNETS, same, tiny
from tests.models.small import beside, inputs, relative_error
from tests.peers import diffusers, open_clip, transformers

BOUND = 1e-5
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2-v": "StableDiffusionPipeline",
    "lcm": "LatentConsistencyModelPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}
TOKENS = torch.tensor([[BOS, 320, 1125, 539, EOS, EOS, EOS], [BOS, 7, 40000, 2368, 49405, 0, EOS]])


@pytest.fixture(autouse=True)
def _quietly() -> Any:
    diffusers.logging.set_verbosity_error()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The folder and the single file of a miniature, written once."""
    root = tmp_path_factory.mktemp("saved")

    def paths(family: str) -> tuple[Path, Path]:
        folder, file = root / family, root / f"{family}.safetensors"
        if not file.exists():
            models.save(tiny(family), folder, "diffusers")
            models.save(tiny(family), file, "ldm")
        return folder, file

    return paths


Saved = Callable[[str], tuple[Path, Path]]


# What we write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_loads_our_folders(family: str, saved: Saved) -> None:
    """As the pipeline that is meant, bit for bit, with a scheduler of our schedule and prediction."""
    folder, _ = saved(family)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, local_files_only=True, tokenizer=None, tokenizer_2=None
    )
    assert type(pipeline).__name__ == PIPELINES[family]
    equal(states(pipeline), files(folder))
    model = tiny(family)
    alpha_bar = torch.stack([model.schedule.alpha(t) ** 2 for t in range(1000)])
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), alpha_bar, rtol=1e-5, atol=0)
    assert (
        pipeline.scheduler.config.prediction_type
        == {"eps": "epsilon", "v": "v_prediction"}[model.prediction.name]
    )


@pytest.mark.parametrize("family", UNETS)
def test_diffusers_loads_our_single_files(family: str, saved: Saved) -> None:
    """from_single_file makes the same tensors of the file as from_pretrained of the folder."""
    folder, file = saved(family)
    kind = getattr(diffusers, PIPELINES[family])
    without = dict.fromkeys(["tokenizer", "tokenizer_2"][: 2 if family.startswith("sdxl") else 1])
    pipeline = kind.from_single_file(file, config=str(folder), local_files_only=True, **without)
    theirs = states(pipeline)
    if family == "sd2":  # it keeps no projection, and the last block as it is
        theirs["text_encoder"] = {
            key: value
            for key, value in theirs["text_encoder"].items()
            if key in files(folder)["text_encoder"]
        }
    equal(theirs, files(folder))


def test_diffusers_loads_our_previews(saved: Saved) -> None:
    """Bit for bit, and computes the same."""
    peer = diffusers.AutoencoderTiny.from_pretrained(saved("sd1")[0] / "preview", local_files_only=True)
    ours = tiny("sd1").require("preview")
    same(
        dict(peer.state_dict()),
        load_file(saved("sd1")[0] / "preview" / "diffusion_pytorch_model.safetensors"),
    )
    images, latents = torch.rand(2, 3, 32, 40) * 2 - 1, torch.randn(2, 4, 5, 6)
    assert relative_error(ours.encode(images), peer.encode(images).latents) <= BOUND
    assert relative_error(ours.decode(latents), peer.decode(latents).sample) <= BOUND


def output(peer: Any, params: Any, x: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
    """A UNet of diffusers told the same as ours: the vector behind its own sinusoids, w as the embedding that
    pipelines make."""
    options: dict[str, Any] = {"encoder_hidden_states": told["context"]}
    if "guidance" in told:
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        options["timestep_cond"] = embed(None, told["guidance"] - 1, embedding_dim=params.guidance_dim)
    if "vector" in told:
        peer.get_aug_embed = lambda *args, **kwargs: peer.add_embedding(told["vector"])
    return peer(beside(x, told.get("image")), t, **options).sample


@pytest.mark.parametrize("family", [*UNETS, "lcm"])
def test_diffusers_computes_the_same_network(family: str, saved: Saved) -> None:
    """With the weights and the configuration of our folder."""
    peer = diffusers.UNet2DConditionModel.from_pretrained(saved(family)[0] / "unet", local_files_only=True)
    ours = models.load(saved(family)[0] / "unet").network
    assert isinstance(ours, UNet)
    x, t, condition = inputs(ours.params, (16, 24))
    assert relative_error(ours(x, t, condition), output(peer, ours.params, x, t, condition.tensors)) <= BOUND


def test_diffusers_computes_the_same_autoencoder(saved: Saved) -> None:
    """Up to the scale, which diffusers leaves to its pipelines."""
    peer = diffusers.AutoencoderKL.from_pretrained(saved("sdxl")[0] / "vae", local_files_only=True)
    ours = models.load(saved("sdxl")[0] / "vae").require("vae")
    images, latents = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 4, 6)
    scale = peer.config.scaling_factor
    assert scale == ours.params.scale == 0.13025
    assert relative_error(ours.encode(images).mean, peer.encode(images).latent_dist.mean * scale) <= BOUND
    assert relative_error(ours.decode(latents), peer.decode(latents / scale).sample) <= BOUND


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_text_towers_compute_the_same(family: str, tmp_path: Path) -> None:
    """Every state and the pooled output: transformers' of our folder, open_clip's of our single file."""
    model = miniature(family)
    models.save(model, tmp_path / "f", "diffusers")
    models.save(model, tmp_path / "f.safetensors", "ldm")
    for loaded in (models.load(tmp_path / "f"), models.load(tmp_path / "f.safetensors")):
        for name, module in loaded.require("text").towers.items():
            tower = loaded.require("text").towers[name]
            states = tower(TOKENS)
            if name == "clip_l" or (loaded.report and loaded.report.layout == "diffusers"):
                place = tmp_path / "f" / ("text_encoder_2" if name == "clip_g" else "text_encoder")
                kind = (
                    transformers.CLIPTextModelWithProjection
                    if name == "clip_g"
                    else transformers.CLIPTextModel
                )
                peer = kind.from_pretrained(place, local_files_only=True).eval()
                theirs = peer(TOKENS, output_hidden_states=True)
                hidden, last = theirs.hidden_states, theirs.last_hidden_state
                pooled = theirs.text_embeds if name == "clip_g" else theirs.pooler_output
            else:
                hidden, last, pooled = in_open_clip(tmp_path / "f.safetensors", tower.params)
            assert len(hidden) == len(states)
            for ours, expected in zip(
                [*states, module.norm(states[-1]), module.pool(states[-1], TOKENS)],
                [*hidden, last, pooled],
                strict=True,
            ):
                assert relative_error(ours, expected) <= BOUND


def in_open_clip(file: Path, p: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """States, last state and pooled output of the one OpenCLIP tower in a single file."""
    peer = open_clip.transformer.TextTransformer(
        p.length, p.vocab, p.width, p.heads, p.layers, output_dim=p.projection
    )
    state = {key.split(".model.")[1]: value for key, value in load_file(file).items() if ".model." in key}
    peer.load_state_dict(state)
    hidden = [peer.eval().token_embedding(TOKENS) + peer.positional_embedding[: TOKENS.shape[1]]]
    for block in peer.transformer.resblocks:
        hidden.append(block(hidden[-1], attn_mask=peer.attn_mask[: TOKENS.shape[1], : TOKENS.shape[1]]))
    last = peer.ln_final(hidden[-1])
    return hidden, last, last[torch.arange(2), TOKENS.argmax(-1)] @ peer.text_projection


# What they write --------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "heads": dict(attention_head_dim=2, cross_attention_dim=20),
    "heads by level": dict(attention_head_dim=[4, 8], cross_attention_dim=20, use_linear_projection=True),
    "vector": dict(
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 3],
        attention_head_dim=[2, 4],
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 12,
    ),
    "guidance": dict(attention_head_dim=2, cross_attention_dim=20, time_cond_proj_dim=12, in_channels=9),
}


def random_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        sample_size=8,
        block_out_channels=[32, 64],
        layers_per_block=2,
        norm_num_groups=16,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )
    return diffusers.UNet2DConditionModel(**{**settings, **changes}).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_diffusers(kind: str, tmp_path: Path) -> None:
    """Numbers of heads, groups and the like come from the configuration beside the weights: the same
    outputs."""
    peer = random_unet(**KINDS[kind])
    peer.save_pretrained(tmp_path)
    ours = models.load(tmp_path).network
    assert isinstance(ours, UNet)
    x, t, condition = inputs(ours.params, (16, 24))
    assert relative_error(ours(x, t, condition), output(peer, ours.params, x, t, condition.tensors)) <= BOUND


@pytest.mark.parametrize(
    "options",
    [
        dict(variant="fp16"),
        dict(max_shard_size="200KB"),
        dict(max_shard_size="200KB", variant="fp16"),
        dict(safe_serialization=False),
    ],
    ids=["variant", "shards", "shards of a variant", "pickle"],
)
def test_ways_in_which_diffusers_writes(options: dict[str, Any], tmp_path: Path) -> None:
    """Each gives the same weights."""
    peer = random_unet(**KINDS["heads"])
    peer.save_pretrained(tmp_path, **options)
    peer.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    same(
        dict(models.load(tmp_path).network.state_dict()),
        dict(models.load(tmp_path / "plain").network.state_dict()),
    )


def test_autoencoders_of_diffusers(tmp_path: Path) -> None:
    """Groups, scale and shift of the configuration; without the convolutions around the latents."""
    torch.manual_seed(0)
    levels = dict(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 16],
    )
    peer = diffusers.AutoencoderKL(
        **levels,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    peer.save_pretrained(tmp_path)
    ours = models.load(tmp_path).require("vae")
    images, latents = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 16, 8, 12)
    assert (
        relative_error(ours.encode(images).mean, (peer.encode(images).latent_dist.mean - 0.0609) * 1.5305)
        <= BOUND
    )
    assert relative_error(ours.decode(latents), peer.decode(latents / 1.5305 + 0.0609).sample) <= BOUND


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_text_towers_of_transformers(kind: str, activation: str, tmp_path: Path) -> None:
    """Heads and activation of the configuration."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=128, projection_dim=24, num_hidden_layers=2, num_attention_heads=4
    )
    peer = getattr(transformers, kind)(
        transformers.CLIPTextConfig(**sizes, hidden_act=activation, bos_token_id=BOS, eos_token_id=EOS)
    ).eval()
    peer.save_pretrained(tmp_path)
    text = models.load(tmp_path).require("text")
    tower = text.towers["clip_l"]
    theirs = peer(TOKENS, output_hidden_states=True)
    states = tower(TOKENS)
    pooled = theirs.text_embeds if kind == "CLIPTextModelWithProjection" else theirs.pooler_output
    for ours, expected in zip(
        [*states, tower.pool(states[-1], TOKENS)], [*theirs.hidden_states, pooled], strict=True
    ):
        assert relative_error(ours, expected) <= BOUND


def test_previews_of_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = diffusers.AutoencoderTiny().eval()
    peer.save_pretrained(tmp_path)
    ours = models.load(tmp_path).require("preview")
    latents = torch.randn(1, 4, 4, 6)
    assert relative_error(ours.decode(latents), peer.decode(latents).sample) <= BOUND


def test_pipelines_of_diffusers(saved: Saved, tmp_path: Path) -> None:
    """One that it loaded from our folder reads words as we do; saved again it loads here, bit for bit."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved("sdxl")[0], local_files_only=True)
    readers = tiny("sdxl").require("text").params.readers
    for tokenizer, reader in zip((pipeline.tokenizer, pipeline.tokenizer_2), readers.values(), strict=True):
        words = [BOS, *tokenize("a corgi, 35mm"), EOS]
        assert tokenizer("a corgi, 35mm", padding="max_length").input_ids == words + [reader.pad] * (
            77 - len(words)
        )
    pipeline.save_pretrained(tmp_path / "again")
    ours, theirs = (models.load(path) for path in (saved("sdxl")[0], tmp_path / "again"))
    theirs.preview = ours.preview
    same(theirs.state_dict(), ours.state_dict())
    assert {key: value for key, value in theirs.spec.items() if key != "preview"} == {
        key: value for key, value in ours.spec.items() if key != "preview"
    }
