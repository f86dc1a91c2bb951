"""Published files of every family, at their full size: each key is accounted for, in both directions; and
files that are no models."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from models.families import ARCHITECTURES, AUTOENCODERS, BACKBONES, READERS
from models.families.taesd_keys import PREVIEW
from models.families.vae_keys import LATENT_STATISTICS
from models.files.blank import Blank
from models.files.table import Part, scatter
from models.layouts.parts import find_parts
from models.networks.clip import CLIP_G, CLIP_H, CLIP_L
from models.networks.t5 import T5Params
from models.networks.taesd import TAESDParams
from models.networks.unet import UNetParams
from models.networks.vae import VAEParams
from tests.models.files.published import declared, file_of, manifests

KINDS = (
    *BACKBONES.values(),
    *AUTOENCODERS.values(),
    *(reader.NETWORK for reader in READERS.values()),
    PREVIEW,
)
NETWORKS: dict[type[Any], type[nn.Module]] = {kind.params: kind.network for kind in KINDS}
PUBLISHED = {name: each.network for name, each in ARCHITECTURES.items()}
SD1, SD2, SDXL, REFINER = (
    cast(UNetParams, PUBLISHED[name]) for name in ("sd1", "sd2", "sdxl", "sdxl-refiner")
)
FLUX, SCHNELL, FILL, CANNY = (PUBLISHED[f"flux-{name}"] for name in ("dev", "schnell", "fill", "canny"))
CHROMA = PUBLISHED["chroma"]
SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE = (PUBLISHED[name] for name in ("sd3", "sd3.5-medium", "sd3.5-large"))
VAE16 = VAEParams(latent_channels=16, quant_conv=False)
VALUES = {  # as their publishers count them
    SD1: 859_520_964,
    SD2: 865_910_724,
    SDXL: 2_567_463_684,
    REFINER: 2_259_526_660,
    replace(SD1, in_channels=9): 859_535_364,
    replace(SD1, guidance_dim=256): 859_602_884,
    VAEParams(): 83_653_863,
    CLIP_L: 123_060_480,
    replace(CLIP_L, projection=768): 123_650_304,
    CLIP_H: 354_032_640,
    replace(CLIP_H, layers=23, projection=None): 340_387_840,
    CLIP_G: 694_659_840,
    TAESDParams(): 2_445_063,
    TAESDParams(16): 2_458_899,
    FLUX: 11_901_408_320,
    SCHNELL: 11_891_178_560,
    FILL: 11_902_391_360,
    CANNY: 11_901_604_928,
    CHROMA: 8_899_983_424,
    SD3_MEDIUM: 2_028_328_000,
    SD35_MEDIUM: 2_243_171_520,
    SD35_LARGE: 8_056_627_520,
    VAE16: 83_819_683,
    T5Params(): 4_762_310_656,
}
# SD 2's tower, whose activation keys and shapes do not tell: `describe` knows it by the family.
H23 = replace(CLIP_H, layers=23, projection=None, activation="quick_gelu")
G_TRANSFORMERS = replace(CLIP_G, activation="quick_gelu")
HALF_DECODER, HALF_ENCODER = "TAESD's decoder", "TAESD's encoder"

OURS: dict[str, list[tuple[str, str, Any]]] = {
    "sd15_full_ldm": [
        ("backbone", "ldm", SD1),
        ("vae", "ldm", VAEParams()),
        ("text", "transformers", CLIP_L),
    ],
    "sd15_full_with_ema_ldm": [
        ("backbone", "ldm", SD1),
        ("vae", "ldm", VAEParams()),
        ("text", "transformers", CLIP_L),
    ],
    "sd15_unet_ldm": [("backbone", "ldm", SD1)],
    "sd15_unet_diffusers": [("backbone", "diffusers", SD1)],
    "sd15_inpaint_unet_diffusers": [("backbone", "diffusers", replace(SD1, in_channels=9))],
    "sd15_vae_ldm": [("vae", "ldm", VAEParams())],
    "sd15_vae_diffusers": [("vae", "diffusers", VAEParams())],
    "sd15_vae_diffusers_legacy": [("vae", "diffusers", VAEParams())],
    "lcm_dreamshaper_v7_unet_diffusers": [("backbone", "diffusers", replace(SD1, guidance_dim=256))],
    "clip_l_text_transformers": [("text", "transformers", CLIP_L)],
    "clip_l_text_proj_transformers": [("text", "transformers", replace(CLIP_L, projection=768))],
    "sd21_full_ldm": [("backbone", "ldm", SD2), ("vae", "ldm", VAEParams()), ("text", "openclip", CLIP_H)],
    "sd21_unet_ldm": [("backbone", "ldm", SD2)],
    "sd21_unet_diffusers": [("backbone", "diffusers", SD2)],
    "sd21_text_encoder_transformers": [("text", "transformers", H23)],
    "openclip_h_text": [("text", "openclip", CLIP_H)],
    "sdxl_base_full_sgm": [
        ("backbone", "ldm", SDXL),
        ("vae", "ldm", VAEParams()),
        ("text", "transformers", CLIP_L),
        ("text", "openclip", CLIP_G),
    ],
    "sdxl_unet_ldm": [("backbone", "ldm", SDXL)],
    "sdxl_unet_diffusers": [("backbone", "diffusers", SDXL)],
    "sdxl_vae_ldm": [("vae", "ldm", VAEParams())],
    "sdxl_vae_diffusers": [("vae", "diffusers", VAEParams())],
    "playground25_vae_diffusers": [("vae", "diffusers", VAEParams())],
    "sdxl_text_encoder_2_transformers": [("text", "transformers", G_TRANSFORMERS)],
    "openclip_bigg_text": [("text", "openclip", CLIP_G)],
    "sdxl_refiner_full_sgm": [
        ("backbone", "ldm", REFINER),
        ("vae", "ldm", VAEParams()),
        ("text", "openclip", CLIP_G),
    ],
    "sdxl_refiner_unet_ldm": [("backbone", "ldm", REFINER)],
    "sdxl_refiner_unet_diffusers": [("backbone", "diffusers", REFINER)],
    "taesd_diffusers": [("preview", "diffusers", TAESDParams())],
    "taesd_encoder_orig": [("preview", HALF_ENCODER, TAESDParams())],
    "taesd_decoder_orig": [("preview", HALF_DECODER, TAESDParams())],
    "taesd3_diffusers": [("preview", "diffusers", TAESDParams(16))],
    "taef1_diffusers": [("preview", "diffusers", TAESDParams(16))],
    "taesd3_taef1_encoder_orig": [("preview", HALF_ENCODER, TAESDParams(16))],
    "taesd3_taef1_decoder_orig": [("preview", HALF_DECODER, TAESDParams(16))],
    "flux1_dev_bfl": [("backbone", "bfl", FLUX)],
    "flux1_dev_diffusers": [("backbone", "diffusers", FLUX)],
    "flux1_schnell_bfl": [("backbone", "bfl", SCHNELL)],
    "flux1_schnell_diffusers": [("backbone", "diffusers", SCHNELL)],
    "flux1_dev_fill_bfl": [("backbone", "bfl", FILL)],
    "flux1_dev_fill_diffusers": [("backbone", "diffusers", FILL)],
    "flux1_dev_canny_depth_bfl": [("backbone", "bfl", CANNY)],
    "flux1_dev_canny_depth_diffusers": [("backbone", "diffusers", CANNY)],
    "chroma1_hd_bfl": [("backbone", "bfl", CHROMA)],
    "chroma1_hd_diffusers": [("backbone", "diffusers", CHROMA)],
    "flux1_ae_bfl": [("vae", "ldm", VAE16)],
    "flux1_vae_diffusers": [("vae", "diffusers", VAE16)],
    "sd3_vae_sai": [("vae", "ldm", VAE16)],
    "sd3_vae_diffusers": [("vae", "diffusers", VAE16)],
    "sd3_medium_mmdit_sai": [("backbone", "sai", SD3_MEDIUM)],
    "sd3_medium_transformer_diffusers": [("backbone", "diffusers", SD3_MEDIUM)],
    "sd3_medium_full_sai": [("backbone", "sai", SD3_MEDIUM), ("vae", "ldm", VAE16)],
    "sd35_medium_mmdit_sai": [("backbone", "sai", SD35_MEDIUM)],
    "sd35_medium_transformer_diffusers": [("backbone", "diffusers", SD35_MEDIUM)],
    "sd35_medium_full_sai": [("backbone", "sai", SD35_MEDIUM), ("vae", "ldm", VAE16)],
    "sd35_large_mmdit_sai": [("backbone", "sai", SD35_LARGE)],
    "sd35_large_transformer_diffusers": [("backbone", "diffusers", SD35_LARGE)],
    "sd35_large_full_sai": [("backbone", "sai", SD35_LARGE), ("vae", "ldm", VAE16)],
    "sd3_text_encoders_allinone": [
        ("text", "transformers", replace(CLIP_L, projection=768)),
        ("text", "transformers", T5Params()),
        ("text", "transformers", G_TRANSFORMERS),
    ],
    "t5_xxl_encoder_transformers": [("text", "transformers", T5Params())],
}
FOREIGN = {
    "lora": "a LoRA, which models.adapted(model, {file: 1.0}) applies",
    "controlnet": "a ControlNet, not of a model",
}


@cache
def network(params: Any) -> nn.Module:
    """One without weights, of full size."""
    with torch.device("meta"), Blank():
        return NETWORKS[type(params)](params)


def test_every_manifest_is_tested() -> None:
    """None is forgotten: it is one of ours, or foreign and told what it is."""
    assert len(manifests()) == 73
    assert all(name in OURS or any(part in name for part in FOREIGN) for name in manifests())


def keys(part: Part) -> list[str]:
    """Those in the file."""
    return [key for stored in part.stored.values() for key in stored.keys]


@pytest.mark.parametrize("name", OURS)
def test_keys_and_shapes_map_without_a_remainder(name: str) -> None:
    """What is found is the published configuration; its table takes every key of the file, and writes every
    key of it in its shape."""
    found = find_parts(declared(name))
    assert [(part.kind, part.layout.name, part.params) for part in found] == OURS[name]
    used: list[str] = []
    for part in found:
        state = network(part.params).get_submodule(part.layout.submodule).state_dict()
        table = part.layout.table(state)
        assert sorted(key for source in table.values() for key in source.keys) == sorted(part.stored)
        written = {key: tuple(value.shape) for key, value in scatter(table, state).items()}
        assert written == {key: stored.shape for key, stored in part.stored.items()}
        used += keys(part)
    assert sorted([*used, *found[0].file.ignored]) == sorted(manifests()[name])


@pytest.mark.parametrize("params", VALUES, ids=lambda params: f"{type(params).__name__}-{VALUES[params]}")
def test_networks_have_as_many_values_as_published(params: Any) -> None:
    """Of the networks that the manifests are found to be."""
    assert sum(p.numel() for p in network(params).parameters()) == VALUES[params]


def test_every_configuration_is_counted() -> None:
    """No manifest is of a network that the test before leaves out."""
    assert {weights(params) for parts in OURS.values() for *_, params in parts} == set(map(weights, VALUES))


def weights(params: Any) -> Any:
    """The parameters but for an activation, which has no weights."""
    return replace(params, activation="gelu") if hasattr(params, "activation") else params


@pytest.mark.parametrize("name", [name for name in manifests() if name not in OURS])
def test_what_is_no_model_of_ours_is_told_so(name: str) -> None:
    """In one line, that says what it is instead."""
    said = next(what for part, what in FOREIGN.items() if part in name)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors.*{re.escape(said)}") as refusal:
        find_parts(declared(name))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["sdxl_lora_kohya_r16", "sd15_controlnet_diffusers", "flux1_canny_depth_lora_bfl_r128"]
)
def test_what_is_no_model_of_ours_is_told_so_from_a_file(name: str, tmp_path: Path) -> None:
    """The same through `load`, whatever the tensors hold."""
    path = tmp_path / f"{name}.safetensors"
    save_file({key: torch.zeros([1] * len(shape)) for key, shape in manifests()[name].items()}, path)
    said = next(what for part, what in FOREIGN.items() if part in name)
    with pytest.raises(ValueError, match=rf"{name}\.safetensors holds no known model: .*{re.escape(said)}"):
        models.load(path)


def test_averages_take_the_place_of_raw_weights() -> None:
    """A file with all of them gives the backbone's averages, or the raw weights on demand; each is left out
    where the other is taken."""
    file = declared("sd15_full_with_ema_ldm")
    averaged, raw = (find_parts(file, ema=ema)[0] for ema in (True, False))
    assert all(key.startswith("model_ema.") for key in keys(averaged))
    assert all(key.startswith("model.") for key in keys(raw))
    assert set(keys(raw)) <= averaged.file.ignored.keys()
    assert set(keys(averaged)) <= raw.file.ignored.keys()
    shapes = [{name: stored.shape for name, stored in part.stored.items()} for part in (averaged, raw)]
    assert shapes[0] == shapes[1]


def test_an_average_with_a_gap_is_refused() -> None:
    """Half averaged and half raw weights would be no model at all."""
    file = declared("sd15_full_with_ema_ldm")
    tensors = {
        key: stored for key, stored in file.tensors.items() if key != "model_ema.diffusion_modelout2bias"
    }
    with pytest.raises(
        ValueError, match=r"averages only some .* lacks model_ema\.diffusion_modelout2bias; ema=False"
    ):
        find_parts(replace(file, tensors=tensors))
    assert find_parts(replace(file, tensors=tensors), ema=False)


@pytest.mark.parametrize(
    "extra",
    [
        *LATENT_STATISTICS,
        *("v_pred", "ztsnr", "denoiser.sigmas", "logvar", "alphas_cumprod"),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
        *(
            "conditioner.embedders.0.logit_scale",
            "conditioner.embedders.1.model.logit_scale",
            "conditioner.embedders.1.logit_scale",
        ),
        "first_stage_model.loss.logvar",
    ],
)
def test_what_tools_add_is_known(extra: str) -> None:
    """Marks, tables and leftovers that training and other tools leave in SDXL's file."""
    found = find_parts(declared("sdxl_base_full_sgm", **{extra: (4,)}))
    assert [(part.kind, part.layout.name, part.params) for part in found] == OURS["sdxl_base_full_sgm"]
    assert extra in found[0].file.ignored


def test_towers_that_other_tools_write() -> None:
    """CLIP-L without text_model. (NovelAI's) and with a projection (ComfyUI's); bigG's projection as a linear
    layer (Playground's)."""
    tensors = {}
    for key, shape in manifests()["sdxl_base_full_sgm"].items():
        key = key.replace("embedders.0.transformer.text_model.", "embedders.0.transformer.")
        tensors[
            key.replace("embedders.1.model.text_projection", "embedders.1.model.text_projection.weight")
        ] = shape
    tensors["conditioner.embedders.0.transformer.text_projection.weight"] = (768, 768)
    found = find_parts(file_of(tensors))
    assert [part.params for part in found[2:]] == [replace(CLIP_L, projection=768), CLIP_G]
    for part in found[2:]:
        state = network(part.params).state_dict()
        assert sorted(key for source in part.layout.table(state).values() for key in source.keys) == sorted(
            part.stored
        )


def test_a_whole_clip_model_gives_its_text_tower() -> None:
    """OpenAI's own file holds an image tower too, and the projections of both."""
    image = {
        "vision_model.post_layernorm.bias": (1024,),
        "visual_projection.weight": (768, 1024),
        "logit_scale": (),
    }
    found = find_parts(declared("clip_l_text_proj_transformers", **image))
    assert [part.params for part in found] == [replace(CLIP_L, projection=768)]
    assert found[0].file.ignored.keys() == image.keys()
