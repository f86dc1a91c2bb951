"""Keys in published files that no model needs. They are ignored, and the report gives the reason."""

from __future__ import annotations

import re
from functools import lru_cache

SCHEDULE = (
    r"betas|alphas_cumprod|alphas_cumprod_prev|alphas_cumprod_next|sqrt_alphas_cumprod|"
    r"sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|"
    r"sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef1|"
    r"posterior_mean_coef2|lvlb_weights|denoiser\.sigmas|model\.sigmas|scale_factor"
)
FIRST_TOWER = r"conditioner\.embedders\.0|cond_stage_model|text_encoders"

HARMLESS = {
    r"^edm_(mean|std)$": "statistics of latents, which are parameters of the autoencoder",
    rf"^({SCHEDULE})$": "a table of the noise schedule, which is computed here",
    r"^logvar$": "learned weights of the training loss",
    r"(^|\.)position_ids$": "the numbers 0 to 76",
    r"(^|\.)logit_scale$": "the temperature of CLIP's training",
    r"^model_ema\.(decay|num_updates)$": "the state of the average",
    r"^first_stage_model\.loss\.|^loss\.": "the autoencoder's training loss",
    rf"^({FIRST_TOWER})(\.clip_l)?\.text_projection(\.weight)?$": "a projection that the family does not use",
    r"(^|\.)encoder\.embed_tokens\.weight$": "T5's embeddings by a second name",
    r"^decoder\.(block\.|final_layer_norm\.|embed_tokens\.)|^lm_head\.": "T5's decoder",
    r"^text_encoders\.(clip_l|clip_g|t5xxl)\.text_projection(\.weight)?$": (
        "a projection that the family does not use"
    ),
    r"(^|\.)attn_mask$": "the causal mask, which is computed here",
    r"^(v_pred|ztsnr)$": "marks the prediction or the schedule",
    r"^(cond_stage_model\.model\.)?visual\.|^vision_model\.|^visual_projection\.": "CLIP's image tower",
}
_ANY = re.compile("|".join(f"(?:{pattern})" for pattern in HARMLESS))


@lru_cache(2**17)
def reason(key: str) -> str | None:
    """Why a key may be ignored, None if it may not."""
    if not _ANY.search(key):
        return None
    return next((why for pattern, why in HARMLESS.items() if re.search(pattern, key)), None)
