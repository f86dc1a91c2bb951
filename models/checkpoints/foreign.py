"""Files that are no model, or none that is known: told by their keys, so that the error can say what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable

FOREIGN = {
    r"\blora_|^lora|\.lora\.(down|up)\.|_lora\.|\.lora_[AB]\.|lora_linear_layer": "a LoRA, which changes a model and is none",
    r"\.hada_w|\.lokr_|\.oft_": "a LyCORIS file, which changes a model and is none",
    r"^control_model\.|^controlnet_|^zero_convs\.|^input_hint_block\.": "a ControlNet, which steers a model and is none",
    r"^(string_to_param|string_to_token)(\.|$)|^(emb_params|clip_[lg])$|^<.*>$": "a textual inversion, words and no model",
    r"(^|\.)distilled_guidance_layer\.": "Chroma, which this library does not know",
    r"(^|\.)double_stream_modulation": "FLUX.2, which this library does not know",
    r"^redux_(up|down)\.": "FLUX.1 Redux, which makes prompts of images, and which this library does not know",
    r"temporal_transformer|motion_modules|\.time_stack\.": "a video model, which this library does not know",
    r"^(vision_model|visual)\.": "an image encoder, which no model here has a use for",
}


def known(keys: Iterable[str]) -> str | None:
    """What has such keys, None where that is not known."""
    keys = list(keys)
    for pattern, what in FOREIGN.items():
        if found := next((key for key in keys if re.search(pattern, key)), None):
            return f"{found} is of {what}"
    return None


def guess(keys: Iterable[str]) -> str:
    """What a file with these keys seems to be."""
    keys = list(keys)
    if what := known(keys):
        return what
    return f"no known network has the keys {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" if keys else "it holds no tensors"
