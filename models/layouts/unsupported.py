"""Identifies files that this library cannot load by their keys, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion.messages import brief
from models.files.stored import TensorFile

UNSUPPORTED = {
    r"\blora_|^lora|\.lora\.(down|up)\.|_lora\.|\.lora_[AB]\.|lora_linear_layer": (
        "a LoRA, which models.adapted(model, {file: 1.0}) applies to a model"
    ),
    r"\.hada_w|\.lokr_|\.oft_": "a LyCORIS file, which models.adapted(model, {file: 1.0}) applies to a model",
    r"^control_model\.|^controlnet_|^zero_convs\.|^input_hint_block\.": "a ControlNet, not of a model",
    r"^(string_to_param|string_to_token)(\.|$)|^(emb_params|clip_[lg])$|^<.*>$": (
        "a textual inversion, not of a model"
    ),
    r"(^|\.)double_stream_modulation": "FLUX.2, which is not supported",
    r"^edm_vpred\.": "CosXL (EDM with v-prediction), which is not supported",
    r"^redux_(up|down)\.": "FLUX.1 Redux (prompts from images), which is not supported",
    r"temporal_transformer|motion_modules|\.time_stack\.": "a video model, which is not supported",
    r"^(vision_model|visual)\.": "an image encoder, which no model here uses",
}
# Quantised formats that this library does not read, by their keys, the most specific first.
PACKINGS = {
    r"\.quant_state\.bitsandbytes__nf4$": "bitsandbytes' NF4",
    r"\.quant_state\.bitsandbytes__fp4$": "bitsandbytes' FP4",
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$": "bitsandbytes' 4 bits",
    r"\.(SCB|weight_format)$": "bitsandbytes' int8",
    r"\.(wscales|wtscale|wcscales|smooth_factor|smooth_factor_orig)$": "SVDQuant (nunchaku)",
    r"\.g_idx$": "GPTQ",
    r"\.(qweight|qzeros)$": "AWQ or GPTQ",
    r"\.weight\._(data|scale|shift)(\.|$)": "quanto",
    r"\.(W_q|W_q_meta)$|\.meta\.(scale|zero)$": "HQQ",
    r"(^|\.)_?\w*weight_(qdata|zero_point)$|:_data$": "torchao",
    r"\.weight_scale_2$": "NVFP4",
    r"\.(weight_packed|weight_shape)$": "compressed-tensors",
}


def check_packing(file: TensorFile, hints: Mapping[str, Any]) -> None:
    """ValueError, which names the format, for weights in a quantised format that is not supported."""
    remedy = (
        "which is not supported: take the file with plain weights (bf16, fp16), 8-bit floats or GGUF's blocks"
    )
    for pattern, what in PACKINGS.items():
        if key := _find_key(pattern, file.tensors):
            raise ValueError(f"{file.path} holds {key}: its weights are packed by {what}, {remedy}")
    config = hints.get("quantization_config")
    if isinstance(config, Mapping):
        method = brief(config.get("quant_method"))
        raise ValueError(f"{file.path} is packed by {method}, as its config.json says, {remedy}")


def identify(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, None if unknown."""
    for pattern, what in UNSUPPORTED.items():
        if key := _find_key(pattern, keys):
            return f"{key} is of {what}"
    return None


def _find_key(pattern: str, keys: Iterable[str]) -> str | None:
    """The first key that matches."""
    lines = "\n".join(keys)  # one search over all of them is much faster than one for each
    if not (match := re.search(pattern, lines, re.MULTILINE)):
        return None
    end = lines.find("\n", match.start())
    return lines[lines.rfind("\n", 0, match.start()) + 1 : end if end >= 0 else None]


def describe(keys: Iterable[str]) -> str:
    """What a file with these keys seems to be."""
    if not (keys := list(keys)):
        return "it holds no tensors"
    examples = f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
    return identify(keys) or f"no known network has the keys {examples}"
