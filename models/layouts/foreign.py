"""Tells by its keys what a file is that this library cannot load, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion.messages import brief
from models.files.stored import TensorFile

FOREIGN = {
    r"\blora_|^lora|\.lora\.(down|up)\.|_lora\.|\.lora_[AB]\.|lora_linear_layer": (
        "a LoRA, which models.adapted(model, {file: 1.0}) applies to a model"
    ),
    r"\.hada_w|\.lokr_|\.oft_": "a LyCORIS file, which models.adapted(model, {file: 1.0}) applies to a model",
    r"^control_model\.|^controlnet_|^zero_convs\.|^input_hint_block\.": (
        "a ControlNet, which steers a model and is none"
    ),
    r"^(string_to_param|string_to_token)(\.|$)|^(emb_params|clip_[lg])$|^<.*>$": (
        "a textual inversion, words and no model"
    ),
    r"(^|\.)double_stream_modulation": "FLUX.2, which this library does not know",
    r"^edm_vpred\.": "CosXL, EDM with v-prediction, which this library does not know",
    r"^redux_(up|down)\.": "FLUX.1 Redux, which makes prompts of images, and which this library does not "
    "know",
    r"temporal_transformer|motion_modules|\.time_stack\.": "a video model, which this library does not know",
    r"^(vision_model|visual)\.": "an image encoder, which no model here has a use for",
}
# Formats of quantised weights that this library does not read, by their keys, the most specific first.
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
    """ValueError for weights in a quantised format that this library does not read; it names the format."""
    remedy = (
        "which this library does not unpack: take the file with plain weights (bf16, fp16), 8-bit floats or "
        "GGUF's blocks"
    )
    lines = "\n".join(file.tensors)
    for pattern, what in PACKINGS.items():
        if found := _first(pattern, lines):
            raise ValueError(f"{file.path} holds {found}: its weights are packed by {what}, {remedy}")
    config = hints.get("quantization_config")
    if isinstance(config, Mapping):
        raise ValueError(
            f"{file.path} is packed by {brief(config.get('quant_method'))}, as its config.json says, {remedy}"
        )


def known(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, None if unknown."""
    lines = "\n".join(keys)
    for pattern, what in FOREIGN.items():
        if found := _first(pattern, lines):
            return f"{found} is of {what}"
    return None


def _first(pattern: str, lines: str) -> str | None:
    """The first line that matches. One search over all lines is much faster than one for each."""
    if not (found := re.search(pattern, lines, re.MULTILINE)):
        return None
    end = lines.find("\n", found.start())
    return lines[lines.rfind("\n", 0, found.start()) + 1 : end if end >= 0 else None]


def guess(keys: Iterable[str]) -> str:
    """What a file with these keys seems to be."""
    keys = list(keys)
    if what := known(keys):
        return what
    return (
        f"no known network has the keys {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        if keys
        else "it holds no tensors"
    )
