"""Reading prompts with T5, and its keys in transformers' files and in llama.cpp's GGUF files."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from diffusion.spec import check_range
from models.files.structure import ByOurNames, Kind, Settings, Shapes, check_settings, used_blocks
from models.files.table import Layout, Part, scatter
from models.files.text import write_json, write_text
from models.networks.t5 import T5, T5_XXL, T5Params
from models.text.reader import Pieces, Reader, Reading, Tokens, apply_weights, token_ids
from models.text.t5_tokenizer import EOS, PAD, T5Tokenizer, find_t5_tokenizer, is_t5
from models.text.vocabulary import CONFIG, WHOLE

MAX_LENGTH = 4096  # rows of context; families have 256 and 512

# The network in files ---------------------------------------------------------------------------------------

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
SETTINGS: Settings = {"feed_forward_proj": ("gated-gelu",), "layer_norm_epsilon": (1e-6,)}


def transformers(_: Any = None) -> Layout:
    return Layout("transformers", TRANSFORMERS)


def llama() -> Layout:
    return Layout("llama.cpp", LLAMA)


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[T5Params, Layout] | None:
    """Parameters and layout of a T5 encoder with these keys and shapes; None for other tensors."""
    for layout in (transformers(), llama()):
        at = ByOurNames(shapes, layout)
        if "blocks.0.attention.q.weight" not in at:
            continue
        check_settings(hints, SETTINGS)
        if "blocks.0.fc1.weight" not in at:
            raise ValueError("this T5 has MLPs without gates, as version 1.0 has: T5 v1.1 is supported")
        vocab, width = at["token.weight"]
        buckets, heads = at["relative.weight"]
        return T5Params(
            vocab=vocab,
            width=width,
            layers=used_blocks(at.count("blocks.{}.norm1.weight"), hints.get("num_layers")),
            heads=heads,
            head_dim=at["blocks.0.attention.q.weight"][0] // heads,
            hidden=at["blocks.0.fc1.weight"][0],
            buckets=buckets,
            max_distance=hints.get("relative_attention_max_distance", 128),
        ), layout
    return None


def config(p: T5Params, size: Any = None) -> dict[str, Any]:
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


NETWORK = Kind(
    name="t5",
    part="text",
    title="T5 text encoder",
    network=T5,
    params=T5Params,
    recognise=recognise,
    single=transformers,
    diffusers=transformers,
    config=config,
    folder="text_encoder",
)

# The reader -------------------------------------------------------------------------------------------------

TOKENIZER = {
    "tokenizer_class": "T5Tokenizer",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


@dataclass(frozen=True)
class T5Reader(Reader):
    """T5's states of a prompt and EOS, padded to `length` rows.

    masked  T5 masks the padding, and the network all padding but its first row (Chroma); False: both attend
            to it, as in FLUX.1 and Stable Diffusion 3
    """

    network: T5Params = T5_XXL
    kind: Literal["t5"] = "t5"
    length: int = 512
    masked: bool = False

    NETWORK = NETWORK
    is_tokenizer = staticmethod(is_t5)
    miniature_tokenizer = staticmethod(T5Tokenizer.of_ascii)

    def __post_init__(self) -> None:
        check_range(self, "length", least=1, most=MAX_LENGTH)

    @property
    def rows(self) -> int:
        return self.length

    @property
    def chunk_tokens(self) -> int:
        return self.length - 1

    @property
    def context_dim(self) -> int:
        return self.network.width

    def tokenize(self, tokenizer: T5Tokenizer, pieces: Pieces) -> Tokens:
        """The tokens of the whole text: tokenizing pieces separately would begin a word with each piece."""
        ends = list(accumulate(len(text) for text, _ in pieces))
        tokens = tokenizer.tokenize_with_ends("".join(text for text, _ in pieces))
        return [(token, pieces[bisect_left(ends, end)][1]) for token, end in tokens]

    def read(
        self, network: T5, tokenizer: T5Tokenizer, batch: Sequence[Tokens], chunks: int, clip_skip: int
    ) -> Reading:
        """Weighted states (B, length, width)."""

        def row(tokens: Tokens) -> Tokens:
            return [*tokens, *[(PAD, 1.0)] * (self.length - len(tokens))]

        def mask(lengths: Sequence[int]) -> Tensor | None:
            """(B, length), True for the first `lengths` rows."""
            if not self.masked:
                return None
            rows = torch.arange(self.length) < torch.tensor(lengths)[:, None]
            return rows.to(network.token.weight.device, non_blocking=True)

        def run(rows: Sequence[Tokens], lengths: Sequence[int]) -> Tensor:
            return cast(Tensor, network(token_ids(rows, network), mask(lengths)))

        end = [(EOS, 1.0)]
        texts = [[*tokens[: self.chunk_tokens], *end] for tokens in batch]
        rows, lengths = [row(text) for text in texts], [len(text) for text in texts]
        states = apply_weights(run(rows, lengths), rows, lambda: run([row(end)], [1]))
        return Reading(states, mask([length + 1 for length in lengths]))  # one row of padding

    def tokenizer(self, own: T5Tokenizer | None) -> T5Tokenizer:
        if own is None:
            remedy = "load its spiece.model or tokenizer.json too, models.load(..., 'spiece.model')"
            places = "tokenizer_2/ of black-forest-labs/FLUX.1-schnell or google/t5-v1_1-xxl"
            raise ValueError(f"T5 has no tokenizer: {remedy}; it is in {places}")
        return own

    @staticmethod
    def open_tokenizer(description: Any) -> T5Tokenizer:
        return T5Tokenizer.from_json(description)

    @classmethod
    def find_tokenizers(
        cls, parts: Mapping[str, Part], paths: Sequence[Path], notes: list[str]
    ) -> dict[str, T5Tokenizer]:
        tokenizers = {name: find_t5_tokenizer(part, paths, notes) for name, part in parts.items()}
        return {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}

    def tokenizer_json(self, own: T5Tokenizer | None) -> str | None:
        return None if own is None else own.to_json()

    def to_diffusers(
        self, network: T5, own: T5Tokenizer | None, identity: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = network.state_dict()
        return config(self.network), scatter(transformers().table(state), state)

    def write_tokenizer(self, own: T5Tokenizer | None, folder: Path) -> str | None:
        if own is None:
            return None
        write_text(folder / WHOLE, own.to_json())
        write_json(folder / CONFIG, TOKENIZER | {"model_max_length": self.length})
        return "T5TokenizerFast"
