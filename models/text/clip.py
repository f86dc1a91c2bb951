"""Reading prompts with CLIP, 75 tokens at once, and its keys in transformers' and OpenCLIP's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from diffusion.messages import brief
from diffusion.spec import check_at_least_one
from models.files.structure import ByOurNames, Kind, Settings, Shapes, check_settings, used_blocks
from models.files.table import Form, Layout, Part, scatter
from models.networks.clip import CLIP_L, CLIPText, CLIPTextParams
from models.text.clip_tokenizer import (
    BOS,
    EOS,
    CLIPTokenizer,
    find_clip_tokenizer,
    is_clip,
    openai_tokenizer,
    uncleaned_tokenizer,
    write_clip_tokenizer,
)
from models.text.reader import Pieces, Reader, Reading, Tokens, apply_weights, token_ids

# The network in files ---------------------------------------------------------------------------------------

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
# Some files lack the prefix (NovelAI's, and merges with it).
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
# Playground's file has the projection as a linear layer.
OPENCLIP_LINEAR = {**OPENCLIP, r"^text_projection$": "text_projection.weight"}

SETTINGS: Settings = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}
LAYERS = "num_hidden_layers"  # in config.json
HEAD_DIM = 64  # in all published towers
PUBLISHED_BLOCKS = {768: (12,), 1024: (23, 24), 1280: (32,)}  # by width; SD 2 uses 23 of 24


def transformers(_: Any = None) -> Layout:
    return Layout("transformers", TRANSFORMERS)


def openclip() -> Layout:
    return Layout("openclip", OPENCLIP, OPENCLIP_FORMS)


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[CLIPTextParams, Layout] | None:
    """Parameters and layout of a text encoder; None for other tensors.

    hints  of a config.json: hidden_act, which no tensor shows, and num_attention_heads. Without them,
           OpenCLIP's layout means gelu, and others quick_gelu
    """
    linear = "text_projection.weight" in shapes
    open_clip = Layout("openclip", OPENCLIP_LINEAR) if linear else openclip()
    for layout in (transformers(), Layout("transformers", BARE), open_clip):
        at = ByOurNames(shapes, layout)
        if "token.weight" in at and (layout.name == "transformers" or "blocks.0.norm1.weight" in at):
            break
    else:
        return None
    if layout.name == "openclip":
        hints = {"hidden_act": "gelu"}
    check_settings(hints, SETTINGS)
    width, configured = at["token.weight"][1], hints.get(LAYERS)
    blocks = used_blocks(at.count("blocks.{}.norm1.weight"), configured)
    if configured is None and blocks not in PUBLISHED_BLOCKS.get(width, (blocks,)):
        all_blocks = PUBLISHED_BLOCKS[width][-1]
        present = f"{blocks} of {all_blocks} blocks of width {width}"
        raise ValueError(f"this is a part of a text encoder: {present}")
    out = int(bool(layout.forms))  # OpenCLIP's projection is transposed
    projection = at["projection.weight"][out] if "projection.weight" in at else None
    return CLIPTextParams(
        vocab=at["token.weight"][0],
        length=at["position"][0],
        width=width,
        layers=blocks,
        heads=hints.get("num_attention_heads") or width // HEAD_DIM,
        activation=hints.get("hidden_act", "quick_gelu"),
        projection=projection,
    ), layout


def config(p: CLIPTextParams, size: Any = None, bos: int = BOS, eos: int = EOS) -> dict[str, Any]:
    """For CLIPTextModel, or CLIPTextModelWithProjection."""
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


NETWORK = Kind(
    name="clip",
    part="text",
    title="text encoder",
    network=CLIPText,
    params=CLIPTextParams,
    recognise=recognise,
    single=transformers,
    diffusers=transformers,
    config=config,
    folder="text_encoder",
)

# The reader -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CLIPReader(Reader):
    """How a family reads prompts with one tower of CLIP; the defaults are Stable Diffusion 1.

    skip       the context is the state `skip` blocks before the last; None: no context
    norm       whether that state goes through the tower's final norm
    pad        the padding token
    pooled     whether the pooled output goes into the vector
    projected  whether the pooled output goes through the projection, if there is one
    tokens     tokens per chunk, BOS and EOS included; None: as many as the tower can read
    """

    network: CLIPTextParams = CLIP_L
    kind: Literal["clip"] = "clip"
    skip: int | None = 0
    norm: bool = True
    pad: int = EOS
    pooled: bool = False
    projected: bool = True
    tokens: int | None = None

    NETWORK = NETWORK
    FOLDER_FIELDS = frozenset({"pad", "tokens", "skip", "projected"})
    is_tokenizer = staticmethod(is_clip)
    open_tokenizer = staticmethod(CLIPTokenizer.from_description)
    chunked = True
    default_vocab = EOS + 1

    def __post_init__(self) -> None:
        check_at_least_one(self, "tokens")
        if not 0 <= (self.skip or 0) <= self.network.layers:
            layers = self.network.layers
            raise ValueError(f"a tower of {layers} blocks has no state {self.skip} blocks before its last")
        if not 2 < self.rows <= self.network.length:
            raise ValueError(f"a tower reads 3 to {self.network.length} tokens at once, not {self.rows}")

    @property
    def rows(self) -> int:
        return self.tokens or self.network.length

    @property
    def chunk_tokens(self) -> int:
        return self.rows - 2

    @property
    def context_dim(self) -> int:
        return 0 if self.skip is None else self.network.width

    @property
    def pooled_dim(self) -> int:
        return ((self.network.projection if self.projected else None) or self.network.width) * self.pooled

    @property
    def max_clip_skip(self) -> int | None:
        return None if self.skip is None else self.network.layers - self.skip - 1

    def tokenize(self, tokenizer: CLIPTokenizer, pieces: Pieces) -> Tokens:
        """Pieces are tokenized separately, so that a weight can end within a word."""
        tokens = [(tokenizer.expand(tokenizer.tokenize(text)), weight) for text, weight in pieces]
        return [(token, weight) for piece, weight in tokens for token in piece]

    def read(
        self,
        network: CLIPText,
        tokenizer: CLIPTokenizer,
        batch: Sequence[Tokens],
        chunks: int,
        clip_skip: int,
    ) -> Reading:
        """Weighted states of all chunks, and the pooled output of the first chunk."""
        size, bos, eos = self.chunk_tokens, (tokenizer.bos, 1.0), (tokenizer.eos, 1.0)

        def row(tokens: Tokens) -> Tokens:
            return [bos, *tokens, eos, *[(self.pad, 1.0)] * (size - len(tokens))]

        rows = [row(tokens[i * size : (i + 1) * size]) for tokens in batch for i in range(chunks)]
        tokens = token_ids(rows, network)
        states = network(tokens)
        pooled = None
        if self.pooled:
            pooled = network.pool(states[-1], tokens, self.projected, tokenizer.eos)[::chunks]
        if self.skip is None:
            return Reading(states[-1][::chunks, :, :0], pooled=pooled)
        blocks = self.network.layers - self.skip - clip_skip

        def state(states: Sequence[Tensor]) -> Tensor:
            return network.norm(states[blocks]) if self.norm else states[blocks]

        context = apply_weights(state(states), rows, lambda: state(network(token_ids([row([])], network))))
        return Reading(rearrange(context, "(b c) l d -> b (c l) d", c=chunks), pooled=pooled)

    def tokenizer(self, own: CLIPTokenizer | None) -> CLIPTokenizer:
        return own or openai_tokenizer()

    def check(self, name: str, own: CLIPTokenizer | None) -> None:
        super().check(name, own)
        if not 0 <= self.pad < self.network.vocab:
            last = self.network.vocab - 1
            raise ValueError(f"{name} is padded with pad={self.pad}, and its tokens are 0 to {last}")

    @classmethod
    def find_tokenizers(
        cls, parts: Mapping[str, Part], paths: Sequence[Path], notes: list[str]
    ) -> dict[str, CLIPTokenizer]:
        """No entry for a tower that uses OpenAI's tokenizer. ValueError if that does not fit."""
        tokenizers = {}
        for name, part in parts.items():
            second = None if len(parts) == 1 else name != next(iter(parts))
            tokenizer = find_clip_tokenizer(part, paths, second)
            if tokenizer is not None:
                tokenizers[name] = tokenizer
            elif (rows := part.params.vocab) != EOS + 1:
                sizes = f"{part.file.path} has {rows} tokens, and OpenAI's tokenizer {EOS + 1}"
                raise ValueError(f"{sizes}: load the folder of its own tokenizer too")
        return tokenizers

    @classmethod
    def assign_tokenizers(
        cls, tokenizers: dict[str, CLIPTokenizer], names: Sequence[str]
    ) -> dict[str, CLIPTokenizer]:
        """None if all are OpenAI's, which cleans texts. If one has learned words, none cleans texts."""
        own = {name: tokenizer for name, tokenizer in tokenizers.items() if not tokenizer.is_openai}
        return {name: own.get(name) or uncleaned_tokenizer() for name in names} if own else {}

    def learned_words(self, own: CLIPTokenizer) -> Any:
        return None if own.is_openai else own.describe()

    def from_files(self, part: Part, tokenizer: CLIPTokenizer | None) -> CLIPReader:
        """With the tokenizer's padding and length, and config.json's activation, else the published one."""
        network: CLIPTextParams = part.params
        if "hidden_act" not in part.hints:
            network = replace(network, activation=self.network.activation)
        published_width = network.width == self.network.width
        if self.pooled and self.projected and network.projection is None and published_width:
            raise ValueError("it lacks its text_projection, which the pooled vector needs")
        configured, eos = part.hints.get("eos_token_id"), tokenizer.eos if tokenizer else EOS
        # Older configurations say 2. Then transformers ends texts at the greatest id, OpenAI's EOS.
        if self.pooled and configured not in (None, 2, eos):
            setting = f"config.json says eos_token_id={brief(configured)}"
            raise ValueError(f"{setting}, and its tokenizer ends texts with {eos}")
        if tokenizer is None:
            return replace(self, network=network)
        length = tokenizer.vocabulary.length or network.length
        tokens = length if length < network.length else None
        return replace(self, network=network, pad=tokenizer.pad, tokens=tokens)

    def single_file_problem(self, name: str, own: CLIPTokenizer | None, usual: CLIPReader) -> str | None:
        """Single files hold neither learned words nor a tokenizer, vocabulary size or activation."""
        remedy = "use layout='diffusers' or 'native'"
        if own is not None and not own.is_openai:
            added = (token.content for token in own.vocabulary.added if not token.special)
            words = ", ".join(added) or "all of its vocabulary"
            return f"single files cannot hold the learned words of {name} ({words:.100}): {remedy}"
        if self.network.vocab > EOS + 1:
            return f"single files do not hold the {self.network.vocab} tokens of {name}: {remedy}"
        if (mine := self.network.activation) != (theirs := usual.network.activation):
            return f"readers of single files compute {name} with {theirs}, not {mine}: use another layout"
        return None

    def to_diffusers(
        self, network: CLIPText, own: CLIPTokenizer | None, identity: bool
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Without the blocks and the projection that diffusers' pipelines do not use.

        They take either the normed last state or the one before it, so the encoder ends with the block of the
        context, or with the next one. An encoder that pipelines always project gets the identity.
        """
        p, state, tokenizer = self.network, network.state_dict(), self.tokenizer(own)
        used = p.layers if self.skip is None else p.layers - self.skip + (not self.norm)
        if self.pooled and used != p.layers:
            state_name = f"the state {self.skip} blocks before the last"
            raise ValueError(f"pipelines of diffusers do not take {state_name}: use layout='native'")
        projected = self.pooled and self.projected and p.projection is not None
        unused = tuple(f"blocks.{i}." for i in range(used, p.layers)) + ("projection.",) * (not projected)
        state = {key: value for key, value in state.items() if not key.startswith(unused)}
        written = replace(p, layers=used, projection=p.projection if projected else None)
        if self.pooled and not projected and identity:
            written = replace(written, projection=p.width)
            state["projection.weight"] = torch.eye(p.width).to(state["norm.weight"])
        tensors = scatter(transformers().table(state), state)
        return config(written, None, tokenizer.bos, tokenizer.eos), tensors

    def write_tokenizer(self, own: CLIPTokenizer | None, folder: Path) -> str | None:
        """None if the tower has learned words, but its tokenizer was not loaded."""
        tokenizer = self.tokenizer(own)
        if tokenizer.size > self.network.vocab:
            return None
        write_clip_tokenizer(tokenizer, folder, self.pad, self.rows)
        return "CLIPTokenizer"
