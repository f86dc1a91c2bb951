"""T5's encoder as transformers has it, and as llama.cpp's GGUF files have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.files.structure import Kind, Settings, Shapes, beginnings, check_settings, count
from models.files.table import Layout
from models.networks.t5 import T5, T5Params
from models.text.clip_keys import used_blocks
from models.text.t5_tokenizer import EOS, PAD

TRANSFORMERS = {
    r"^token\.": "shared.",
    r"^relative\.": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.": "encoder.block.",
    r"\.norm1\.": ".layer.0.layer_norm.",
    r"\.attention\.out\.": ".layer.0.SelfAttention.o.",
    r"\.attention\.": ".layer.0.SelfAttention.",
    r"\.norm2\.": ".layer.1.layer_norm.",
    r"\.gate\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.fc1\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.fc2\.": ".layer.1.DenseReluDense.wo.",
}
LLAMA = {
    r"^token\.": "token_embd.",
    r"^relative\.": "enc.blk.0.attn_rel_b.",
    r"^norm\.": "enc.output_norm.",
    r"^blocks\.": "enc.blk.",
    r"\.norm1\.": ".attn_norm.",
    r"\.attention\.out\.": ".attn_o.",
    r"\.attention\.": ".attn_",
    r"\.norm2\.": ".ffn_norm.",
    r"\.gate\.": ".ffn_gate.",
    r"\.fc1\.": ".ffn_up.",
    r"\.fc2\.": ".ffn_down.",
}
SETTINGS: Settings = {
    "feed_forward_proj": ("gated-gelu",),
    "layer_norm_epsilon": (1e-6,),
}


def transformers() -> Layout:
    return Layout("transformers", TRANSFORMERS)


def llama() -> Layout:
    return Layout("llama.cpp", LLAMA)


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[T5Params, Layout] | None:
    """Parameters and layout of a T5 encoder with these keys and shapes; None where it is none."""
    for first, layout, blocks in (
        ("encoder.block.0.layer.0.SelfAttention.q.weight", transformers(), "encoder.block"),
        ("enc.blk.0.attn_q.weight", llama(), "enc.blk"),
    ):
        if first in shapes:
            check_settings(hints, SETTINGS)
            keys = {ours: layout.table([ours])[ours].keys[0] for ours in ("token.weight", "relative.weight", "blocks.0.fc1.weight")}
            if keys["blocks.0.fc1.weight"] not in shapes:
                raise ValueError("this is a T5 of the first version, whose MLPs have no gate, and no model here was trained with one")
            vocab, width = shapes[keys["token.weight"]]
            buckets, heads = shapes[keys["relative.weight"]]
            return T5Params(
                vocab=vocab,
                width=width,
                layers=used_blocks(count(beginnings(shapes), blocks), hints.get("num_layers")),
                heads=heads,
                head_dim=shapes[first][0] // heads,
                hidden=shapes[keys["blocks.0.fc1.weight"]][0],
                buckets=buckets,
                max_distance=hints.get("relative_attention_max_distance", 128),
            ), layout
    return None


def config(p: T5Params) -> dict[str, Any]:
    """For T5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": p.vocab,
        "d_model": p.width,
        "d_kv": p.head_dim,
        "d_ff": p.hidden,
        "num_layers": p.layers,
        "num_heads": p.heads,
        "relative_attention_num_buckets": p.buckets,
        "relative_attention_max_distance": p.max_distance,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
    }


ENCODER = Kind(
    "t5",
    "text",
    "T5 text encoder",
    T5,
    T5Params,
    recognise,
    lambda _: transformers(),
    lambda _: transformers(),
    lambda p, _: config(p),
    "text_encoder",
)
