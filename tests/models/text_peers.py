"""The text towers and tokenizers of transformers and open_clip, made from ours."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor, nn

from models.families import FAMILIES
from models.networks.clip import CLIPText
from models.networks.t5 import T5
from models.text.clip_tokenizer import BOS, EOS, openai_tables
from models.text.recipes import TextParams
from tests.models.small import renamed
from tests.peers import open_clip, transformers

TRANSFORMERS = {
    r"^token\.": "embeddings.token_embedding.",
    r"^position$": "embeddings.position_embedding.weight",
    r"^norm\.": "final_layer_norm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.fc(\d)\.": r".mlp.fc\1.",
    r"\.attention\.qkv\.": ".self_attn.[qkv]_proj.",
    r"\.attention\.out\.": ".self_attn.out_proj.",
    r"^projection\.": "text_projection.",
}
OPEN_CLIP = {
    r"^token\.": "token_embedding.",
    r"^position$": "positional_embedding",
    r"^norm\.": "ln_final.",
    r"^blocks\.": "transformer.resblocks.",
    r"\.norm(\d)\.": r".ln_\1.",
    r"\.fc1\.": ".mlp.c_fc.",
    r"\.fc2\.": ".mlp.c_proj.",
    r"\.attention\.qkv\.": ".attn.in_proj_",
    r"\.attention\.out\.": ".attn.out_proj.",
    r"^projection\.weight$": "text_projection",
}
TRANSFORMERS_T5 = {
    r"^token\.": "shared.",
    r"^relative\.": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.(\d+)\.": r"encoder.block.\1.",
    r"\.norm1\.": ".layer.0.layer_norm.",
    r"\.norm2\.": ".layer.1.layer_norm.",
    r"\.attention\.([qkv])\.": r".layer.0.SelfAttention.\1.",
    r"\.attention\.out\.": ".layer.0.SelfAttention.o.",
    r"\.gate\.": ".layer.1.DenseReluDense.wi_0.",
    r"\.fc1\.": ".layer.1.DenseReluDense.wi_1.",
    r"\.fc2\.": ".layer.1.DenseReluDense.wo.",
}


def translated(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict of ours under a peer's names."""
    return {new: part for name, value in state.items() for new, part in renamed(name, value, rules).items()}


def in_transformers(tower: CLIPText, eos_token_id: int = EOS) -> Any:
    """The tower as transformers has it. With eos_token_id 2, as in the published CLIP-L, it pools at the
    greatest token id."""
    p = tower.params
    config = transformers.CLIPTextConfig(
        vocab_size=p.vocab,
        hidden_size=p.width,
        intermediate_size=4 * p.width,
        projection_dim=p.projection or p.width,
        num_hidden_layers=p.layers,
        num_attention_heads=p.heads,
        max_position_embeddings=p.length,
        hidden_act=p.activation,
        bos_token_id=BOS,
        eos_token_id=eos_token_id,
    )
    with torch.device("meta"):  # drawing weights that are then replaced would take seconds
        peer: nn.Module = (
            transformers.CLIPTextModel if p.projection is None else transformers.CLIPTextModelWithProjection
        )(config)
    names = peer.state_dict().keys()
    state = translated(tower.state_dict(), TRANSFORMERS)
    prefixed = {name if name in names else f"text_model.{name}": value for name, value in state.items()}
    peer.load_state_dict(prefixed, assign=True)
    for module in peer.modules():
        if hasattr(module, "position_ids"):  # no part of the state dict
            module.position_ids = torch.arange(p.length)[None]
    return peer.eval()


def t5_in_transformers(tower: T5) -> Any:
    """The encoder as transformers has it, on the same weights."""
    p = tower.params
    config = transformers.T5Config(
        vocab_size=p.vocab,
        d_model=p.width,
        d_kv=p.head_dim,
        d_ff=p.hidden,
        num_layers=p.layers,
        num_heads=p.heads,
        relative_attention_num_buckets=p.buckets,
        relative_attention_max_distance=p.max_distance,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        peer = transformers.T5EncoderModel(config)
    state = translated(tower.state_dict(), TRANSFORMERS_T5)
    # transformers knows the table of tokens by two names.
    peer.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, assign=True)
    return peer.eval()


def in_open_clip(tower: CLIPText) -> open_clip.transformer.TextTransformer:
    """The tower as open_clip has it; it pools at the greatest token id."""
    p = tower.params
    activation = open_clip.transformer.QuickGELU if p.activation == "quick_gelu" else nn.GELU
    with torch.device("meta"):
        peer = open_clip.transformer.TextTransformer(
            p.length, p.vocab, p.width, p.heads, p.layers, output_dim=p.projection, act_layer=activation
        )
    state = translated(tower.state_dict(), OPEN_CLIP)
    if "text_projection" in state:  # a matrix from the left, where a linear layer multiplies from the right
        state["text_projection"] = nn.Parameter(state["text_projection"].T)
    peer.load_state_dict(state, assign=True)
    peer.attn_mask = peer.build_causal_mask()  # no part of the state dict
    return peer.eval()


@cache
def transformers_tokenizer(pad_token: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """What from_pretrained makes of a published tokenizer folder: CLIP-L pads with <|endoftext|>, OpenCLIP's
    towers with "!", token 0."""
    tokens, merges = openai_tables()
    return transformers.CLIPTokenizer(vocab=tokens, merges=merges, pad_token=pad_token, model_max_length=77)


def padded(prompts: list[str], length: int = 77) -> Tensor:
    """open_clip's ids: BOS, prompt, EOS, zeros."""
    return open_clip.tokenize(prompts, context_length=length).to(torch.long)


def text_of(
    family: str, changes: Mapping[str, Mapping[str, Any]] | None = None, **networks: Any
) -> TextParams:
    """How a family reads prompts with text encoders of these parameters, by name, but for `changes` of their
    readers."""
    params = FAMILIES[family].text_params(networks)
    for name, each in (changes or {}).items():
        params = params.replace_reader(name, **each)
    return params


TAUGHT = (
    "a photo of an astronaut riding the horse on mars two cats dog red blue café déjà-vu schön 35mm ; , . ! "
    "don't word1 (x) 宇宙 飛行士 ½"
)


@cache
def spiece(**changes: Any) -> bytes:
    """A small spiece.model, with its first three tokens where T5 has them."""
    draw, words, model = random.Random(0), TAUGHT.split(), io.BytesIO()
    sentences = [" ".join(draw.choices(words, k=12)) for _ in range(300)]
    options: dict[str, Any] = (
        dict(vocab_size=120, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False) | changes
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=3, **options
    )
    return model.getvalue()


def t5_in_folder(folder: Path) -> Any:
    """What from_pretrained makes of a folder with the small spiece.model, which is written into it."""
    (folder / "spiece.model").write_bytes(spiece())
    return transformers.T5TokenizerFast.from_pretrained(folder)
