"""CLIP's text tower as transformers has it, and as OpenCLIP has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion.messages import brief
from models.files.structure import Kind, Settings, Shapes, beginnings, check_settings, count
from models.files.table import Form, Layout
from models.networks.clip import CLIPText, CLIPTextParams
from models.text.clip_tokenizer import BOS, EOS

TRANSFORMERS = {
    r"^token\.": "text_model.embeddings.token_embedding.",
    r"^position$": "text_model.embeddings.position_embedding.weight",
    r"^blocks\.": "text_model.encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attention\.qkv\.": ".self_attn.[q,k,v]_proj.",
    r"\.attention\.out\.": ".self_attn.out_proj.",
    r"\.fc(\d)\.": r".mlp.fc\1.",
    r"^norm\.": "text_model.final_layer_norm.",
    r"^projection\.": "text_projection.",
}
# Some files leave the prefix out (NovelAI's and what was merged with it).
BARE = {**TRANSFORMERS, r"^text_model\.": ""}
OPENCLIP = {
    r"^token\.": "token_embedding.",
    r"^position$": "positional_embedding",
    r"^blocks\.": "transformer.resblocks.",
    r"\.norm(\d)\.": r".ln_\1.",
    r"\.attention\.qkv\.": ".attn.in_proj_",
    r"\.attention\.out\.": ".attn.out_proj.",
    r"\.fc1\.": ".mlp.c_fc.",
    r"\.fc2\.": ".mlp.c_proj.",
    r"^norm\.": "ln_final.",
    r"^projection\.weight$": "text_projection",
}
OPENCLIP_FORMS: dict[str, Form] = {r"^projection\.": "transposed"}
# As a linear layer, in Playground's file.
OPENCLIP_LINEAR = {**OPENCLIP, r"^text_projection$": "text_projection.weight"}

SETTINGS: Settings = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}
LAYERS = "num_hidden_layers"  # in config.json
HEAD_DIM = 64  # in every published tower
PUBLISHED_BLOCKS = {768: (12,), 1024: (23, 24), 1280: (32,)}  # by width: of CLIP-L, of OpenCLIP's H (SD 2 uses 23) and bigG


def transformers() -> Layout:
    return Layout("transformers", TRANSFORMERS)


def openclip() -> Layout:
    return Layout("openclip", OPENCLIP, OPENCLIP_FORMS)


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[CLIPTextParams, Layout] | None:
    """Parameters and layout of a text encoder; None for other tensors.

    The tensors do not show the activation: it is OpenCLIP's gelu or OpenAI's quick_gelu by layout, unless `hints`, a config.json,
    give hidden_act and num_attention_heads.
    """
    for prefix, rules in (("text_model.", TRANSFORMERS), ("", BARE)):
        if f"{prefix}embeddings.token_embedding.weight" in shapes:
            check_settings(hints, SETTINGS)
            return _params(
                shapes,
                f"{prefix}embeddings.token_embedding.weight",
                f"{prefix}embeddings.position_embedding.weight",
                f"{prefix}encoder.layers",
                shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None,
                hints.get("hidden_act", "quick_gelu"),
                hints.get("num_attention_heads"),
                hints.get(LAYERS),
            ), Layout("transformers", rules)
    if "token_embedding.weight" in shapes and "transformer.resblocks.0.attn.in_proj_weight" in shapes:
        raw, linear = shapes.get("text_projection"), shapes.get("text_projection.weight")
        params = _params(
            shapes,
            "token_embedding.weight",
            "positional_embedding",
            "transformer.resblocks",
            raw[1] if raw else linear[0] if linear else None,
            "gelu",
            None,
            None,
        )
        return params, Layout("openclip", OPENCLIP_LINEAR) if linear else openclip()
    return None


def used_blocks(stored: int, configured: Any) -> int:
    """How many blocks of a text encoder are used: all that are stored, or the first ones, as many as its config.json says.

    ValueError where the file holds fewer than that.
    """
    if configured is None:
        return stored
    if type(configured) is not int or not 0 < configured <= stored:
        raise ValueError(f"config.json says {brief(configured)} blocks, and the file holds {stored}")
    return configured


def _params(
    shapes: Shapes, token: str, position: str, layers: str, projection: int | None, activation: Any, heads: int | None, configured: Any
) -> CLIPTextParams:
    blocks, width = used_blocks(count(beginnings(shapes), layers), configured), shapes[token][1]
    if configured is None and blocks not in PUBLISHED_BLOCKS.get(width, (blocks,)):
        raise ValueError(f"this is a part of a text encoder: {blocks} of {PUBLISHED_BLOCKS[width][-1]} blocks of width {width}")
    return CLIPTextParams(
        vocab=shapes[token][0],
        length=shapes[position][0],
        width=width,
        layers=blocks,
        heads=heads or width // HEAD_DIM,
        activation=activation,
        projection=projection,
    )


def config(p: CLIPTextParams, bos: int = BOS, eos: int = EOS) -> dict[str, Any]:
    """For CLIPTextModel, with projection where there is one."""
    return {
        "architectures": ["CLIPTextModel" if p.projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": p.vocab,
        "hidden_size": p.width,
        "intermediate_size": 4 * p.width,
        "projection_dim": p.projection or p.width,
        "num_hidden_layers": p.layers,
        "num_attention_heads": p.heads,
        "max_position_embeddings": p.length,
        "hidden_act": p.activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": 1,
    }


CLIP = Kind(
    "clip",
    "text",
    "text encoder",
    CLIPText,
    CLIPTextParams,
    recognise,
    lambda _: transformers(),
    lambda _: transformers(),
    lambda p, _: config(p),
    "text_encoder",
)
