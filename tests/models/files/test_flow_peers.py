"""FLUX.1, Chroma and Stable Diffusion 3: diffusers and transformers read what we write and compute the same;
we read what they write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from diffusion import Condition
from models import Model
from models.families import chroma, flux
from models.files.table import scatter
from models.networks.chroma import ChromaParams
from models.networks.flux import FluxParams
from models.presets import miniature
from tests.models.files.pipelines import equal, files, states
from tests.models.files.tiny import FLOWS, same, tiny
from tests.models.joint_peers import call_with_tokens
from tests.models.small import beside, inputs, relative_error
from tests.peers import diffusers, transformers

BOUND = 1e-5
PIPELINES = {
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "flux-fill": "FluxFillPipeline",
    "flux-canny": "FluxControlPipeline",
    **dict.fromkeys(("sd3", "sd3.5-medium", "sd3.5-large"), "StableDiffusion3Pipeline"),
    "chroma": "ChromaPipeline",
}
CLIPS = {"flux": 1, "sd3": 2, "chroma": 0}
WORDS = "a corgi, 35mm"


@pytest.fixture(autouse=True)
def _quietly() -> Any:
    diffusers.logging.set_verbosity_error()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A miniature's folder, written once, with its single file and the folder of its separate files beside
    it."""
    root = tmp_path_factory.mktemp("saved")

    def path(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            models.save(tiny(family), folder, "diffusers")
            models.save(tiny(family), root / f"{family}.safetensors", "ldm")
            models.save(tiny(family), root / f"{family}-separate", "separate")
        return folder

    return path


Saved = Callable[[str], Path]


def pipeline_of(folder: Path, **parts: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts)


def pipeline_without_clips_words(family: str, folder: Path) -> Any:
    """Whose tokenizers take longer to open than all the rest."""
    return pipeline_of(
        folder, **dict.fromkeys(["tokenizer", "tokenizer_2"][: CLIPS[re.split("[-.]", family)[0]]])
    )


# What we write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FLOWS)
def test_pipelines_there_and_back(family: str, saved: Saved, tmp_path: Path) -> None:
    """Our folder is the pipeline that is meant, bit for bit; what it saves, in shards, is our model again,
    and nothing of it is told."""
    pipeline = pipeline_without_clips_words(family, saved(family))
    assert type(pipeline).__name__ == PIPELINES[family]
    equal(states(pipeline), files(saved(family)))
    pipeline.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    again, model = models.load(tmp_path), models.load(saved(family))
    model.preview = None
    same(again.state_dict(), model.state_dict())
    dropped = {
        "preview",
        *([] if family.startswith("sd3") else ["shape"]),
    }  # a size that only our entry in model_index.json says
    found, meant = (
        {key: value for key, value in each.spec.items() if key not in dropped} for each in (again, model)
    )
    assert found == meant
    assert again.require("text").tokenizer("t5").tokenize(WORDS) == model.require("text").tokenizer(
        "t5"
    ).tokenize(WORDS)


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("flux-dev", "tokenizer_2"),
        ("flux-schnell", "tokenizer_2"),
        ("sd3", "tokenizer_3"),
        ("chroma", "tokenizer"),
    ],
)
def test_tokenizers(family: str, place: str, saved: Saved) -> None:
    """T5's of our folder gives the same ids, padded to the same length; so does the pipeline's own."""
    ours = tiny(family).require("text")
    ids = [*ours.tokenizer("t5").tokenize(WORDS), 1]
    for tokenizer in (
        transformers.T5TokenizerFast.from_pretrained(saved(family) / place),
        getattr(pipeline_without_clips_words(family, saved(family)), place),
    ):
        assert tokenizer(WORDS).input_ids == ids
        assert tokenizer.model_max_length == ours.params.readers["t5"].length
        assert tokenizer(WORDS, padding="max_length").input_ids == ids + [0] * (
            ours.params.readers["t5"].length - len(ids)
        )


@pytest.mark.parametrize(("family", "most"), [("flux-dev", 512), ("flux-schnell", 256), ("sd3", 256)])
def test_pipelines_are_told_the_same(family: str, most: int, tmp_path: Path) -> None:
    """Context and vector of the same prompt; CLIP-L's pooled output goes unprojected, in Stable Diffusion 3
    through the identity."""
    models.save(miniature(family), tmp_path, "diffusers")
    ours = models.load(tmp_path).require("text").encode([WORDS]).condition
    pipeline = pipeline_of(tmp_path)
    if family == "sd3":
        context, _, vector, _ = pipeline.encode_prompt(
            WORDS, None, None, do_classifier_free_guidance=False, max_sequence_length=most
        )
    else:
        context, vector, _ = pipeline.encode_prompt(WORDS, None, max_sequence_length=most)
    assert relative_error(ours.context, context) <= BOUND
    assert relative_error(ours.vector, vector) <= BOUND


def test_chroma_is_told_the_same(saved: Saved) -> None:
    """T5 sees no padding, and the network one row of it; of a prompt too long for all of its rows there is
    none."""
    prompts = [WORDS, "", "long " * 200]
    ours = models.load(saved("chroma")).require("text").encode(prompts).condition
    assert ours.mask is not None
    context, _, mask, *_ = pipeline_of(saved("chroma")).encode_prompt(
        prompts, do_classifier_free_guidance=False
    )
    assert relative_error(ours.context, context) <= BOUND
    assert torch.equal(ours.mask, mask.bool())
    assert ours.mask.sum(1).tolist() == [len(WORDS) + 3, 2, 512]


def test_stable_diffusion_3_without_t5(tmp_path: Path) -> None:
    """Its folder says that there is none, which diffusers wants to be told too; the pipeline fills up with
    zeros as we do."""
    models.save(miniature("sd3"), tmp_path / "separate", "separate")
    parts = [tmp_path / "separate" / f"{name}.safetensors" for name in ("sd3", "vae", "clip_l", "clip_g")]
    model = models.load(*parts)
    models.save(model, tmp_path / "folder", "diffusers")
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    pipeline = pipeline_of(tmp_path / "folder", text_encoder_3=None, tokenizer_3=None)
    equal(states(pipeline), files(tmp_path / "folder"))
    again = models.load(tmp_path / "folder")
    same(again.state_dict(), model.state_dict())
    ours = again.require("text").encode([WORDS]).condition
    assert not ours.context[:, 77:].any()
    pipeline.transformer.register_to_config(joint_attention_dim=ours.context.shape[-1])
    context, _, vector, _ = pipeline.encode_prompt(WORDS, None, None, do_classifier_free_guidance=False)
    assert relative_error(ours.context, context) <= BOUND
    assert relative_error(ours.vector, vector) <= BOUND


def test_a_projected_pooled_output_stays_projected(tmp_path: Path) -> None:
    """CLIP-L's in a folder of Stable Diffusion 3 whose projection is not the identity: computed, saved, and
    refused for single files."""
    models.save(miniature("sd3"), tmp_path, "diffusers")
    pipeline = pipeline_of(tmp_path)
    pipeline.text_encoder.text_projection.weight.normal_()
    pipeline.save_pretrained(tmp_path / "f")
    model = models.load(tmp_path / "f")
    _, _, vector, _ = pipeline.encode_prompt(WORDS, None, None, do_classifier_free_guidance=False)
    assert relative_error(model.require("text").encode([WORDS]).condition.vector, vector) <= BOUND
    models.save(model, tmp_path / "g", "diffusers")
    same(models.load(tmp_path / "g").state_dict(), model.state_dict())
    for layout in ("ldm", "separate"):
        with pytest.raises(ValueError, match="do not say projected=True of clip_l"):
            models.save(model, tmp_path / "h.safetensors", layout)


def theirs_of(peer: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A transformer of diffusers told the same as ours: FLUX.1 and Chroma packed, and SD 3 in a thousand
    times."""
    context, vector, guidance = condition.tensors["context"], condition.vector, condition.guidance
    x = beside(x, condition.image)
    if isinstance(peer, diffusers.SD3Transformer2DModel):
        return peer(x, timestep=1000 * t, encoder_hidden_states=context, pooled_projections=vector).sample
    told = {} if vector is None else {"pooled_projections": vector, "guidance": guidance}
    return call_with_tokens(peer, x, t, context, **told)


NETWORKS = {
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "chroma": "ChromaTransformer2DModel",
}


@pytest.mark.parametrize("family", FLOWS)
def test_diffusers_computes_the_same_network(family: str, saved: Saved) -> None:
    """With the weights and the configuration of our folder."""
    peer = (
        getattr(diffusers, NETWORKS[re.split("[-.]", family)[0]])
        .from_pretrained(saved(family) / "transformer", local_files_only=True)
        .eval()
    )
    ours: Any = models.load(saved(family) / "transformer").network
    x, t, condition = inputs(ours.params, (8, 12))
    assert relative_error(ours(x, t, condition), theirs_of(peer, x, t, condition)) <= BOUND


@pytest.mark.parametrize("family", ["flux-dev", "sd3"])
def test_the_autoencoder_computes_the_same(family: str, saved: Saved) -> None:
    """Up to scale and shift, which diffusers leaves to its pipelines."""
    peer = diffusers.AutoencoderKL.from_pretrained(saved(family) / "vae", local_files_only=True)
    ours = models.load(saved(family) / "vae").require("vae")
    scale, shift = peer.config.scaling_factor, peer.config.shift_factor
    usual = models.FAMILIES[family].vae
    assert (ours.params.scale, ours.params.shift) == (scale, shift) == (usual.scale, usual.shift)
    images, latents = torch.rand(1, 3, 32, 48) * 2 - 1, torch.randn(1, 16, 4, 6)
    assert (
        relative_error(ours.encode(images).mean, (peer.encode(images).latent_dist.mean - shift) * scale)
        <= BOUND
    )
    assert relative_error(ours.decode(latents), peer.decode(latents / scale + shift).sample) <= BOUND


# Single files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux-dev", "sd3", "sd3.5-medium"])
def test_diffusers_reads_our_single_files(family: str, saved: Saved) -> None:
    """Autoencoder and Stable Diffusion 3's network; FLUX.1's of its published width alone, see below."""
    folder = saved(family)
    whole, apart = folder.parent / f"{family}.safetensors", folder.parent / f"{family}-separate"
    for backbone, vae in ((whole, whole), (apart / f"{family}.safetensors", apart / "vae.safetensors")):
        if family.startswith("sd3"):
            network = diffusers.SD3Transformer2DModel.from_single_file(
                str(backbone), config=str(folder / "transformer"), local_files_only=True
            )
            same(dict(network.state_dict()), files(folder)["transformer"])
        autoencoder = diffusers.AutoencoderKL.from_single_file(
            str(vae), config=str(folder / "vae"), local_files_only=True
        )
        same(dict(autoencoder.state_dict()), files(folder)["vae"])


CONVERTED: list[tuple[Any, Any, str]] = [
    (flux, FluxParams(depth=2, depth_single=2), "convert_flux_transformer_checkpoint_to_diffusers"),
    (
        flux,
        FluxParams(depth=2, depth_single=2, guidance_dim=None),
        "convert_flux_transformer_checkpoint_to_diffusers",
    ),
    (chroma, ChromaParams(depth=2, depth_single=2), "convert_chroma_transformer_checkpoint_to_diffusers"),
]


@pytest.mark.parametrize(("line", "params", "convert"), CONVERTED, ids=["dev", "schnell", "chroma"])
def test_names_and_places_are_those_of_diffusers_converter(line: Any, params: Any, convert: str) -> None:
    """Which knows the published width only: with tensors that are so high, and one column wide."""
    with torch.device("meta"):
        network = line.ARCHITECTURES[0].kind.network(params)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    state = {
        name: torch.randn(shape[0], 1) if len(shape) > 1 else torch.randn(shape)
        for name, shape in shapes.items()
    }
    published = scatter(line.bfl().table(state), state)
    same(
        getattr(diffusers.loaders.single_file_utils, convert)(published),
        scatter(line.diffusers(params).table(state), state),
    )


# What they write --------------------------------------------------------------------------------------------


def saved_by_diffusers(network: Any, folder: Path) -> Model:
    network.save_pretrained(folder, max_shard_size="100KB")
    return models.load(folder)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_of_diffusers(guidance: bool, tmp_path: Path) -> None:
    """Axes of the heads come from the configuration, which no shape tells."""
    torch.manual_seed(0)
    sizes = dict(
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=2,
        axes_dims_rope=(8, 8, 8),
    )
    peer = diffusers.FluxTransformer2DModel(
        in_channels=16, **sizes, joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=guidance
    ).eval()
    ours: Any = saved_by_diffusers(peer, tmp_path).network
    assert (ours.params.axes, ours.params.guidance_dim) == ((8, 8, 8), 256 if guidance else None)
    x, t, condition = inputs(ours.params, (8, 12))
    assert relative_error(ours(x, t, condition), theirs_of(peer, x, t, condition)) <= BOUND


@pytest.mark.parametrize("dual", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_stable_diffusion_3_of_diffusers(dual: tuple[int, ...], qk_norm: str | None, tmp_path: Path) -> None:
    """Heads that are not as many as blocks, blocks that attend twice, queries and keys that are normalised:
    from shapes alone."""
    torch.manual_seed(0)
    sizes = dict(
        sample_size=8, num_layers=3, num_attention_heads=2, caption_projection_dim=128, pos_embed_max_size=12
    )
    peer = diffusers.SD3Transformer2DModel(
        **sizes,
        attention_head_dim=64,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        out_channels=16,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
    ).eval()
    ours: Any = saved_by_diffusers(peer, tmp_path).network
    assert (ours.params.heads, ours.params.dual, ours.params.qk_norm) == (2, len(dual), qk_norm is not None)
    x, t, condition = inputs(ours.params, (8, 12))
    assert relative_error(ours(x, t, condition), theirs_of(peer, x, t, condition)) <= BOUND


def test_t5_of_transformers(saved: Saved, tmp_path: Path) -> None:
    """In shards, and beside the alias of its embeddings that older versions wrote."""
    peer = transformers.T5EncoderModel.from_pretrained(
        saved("flux-dev") / "text_encoder_2", local_files_only=True
    ).eval()
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    text = models.load(
        tmp_path, saved("flux-dev") / "text_encoder", saved("flux-dev") / "transformer"
    ).require("text")
    tokens = torch.randint(0, 100, (2, 9))
    assert relative_error(text.towers["t5"](tokens), peer(tokens).last_hidden_state) <= BOUND
