"""CLIP's text tower in all published sizes: a causal transformer over tokens (Radford et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.spec import check_at_least_one, check_names
from models.layers.attention import SelfAttention
from models.layers.half import with_enough_precision

EOS = 49407  # the end of text in OpenAI's vocabulary


@dataclass(frozen=True)
class CLIPTextParams:
    """Parameters of a text tower; the defaults are OpenAI's ViT-L/14.

    vocab       number of tokens: 49408, or more with learned words
    length      tokens that it reads at once, BOS and EOS included
    activation  of the MLP: "quick_gelu" (OpenAI), x * sigmoid(1.702 x), or "gelu" (OpenCLIP)
    projection  width of the pooled output; None: no projection, so that it is the tower's width
    """

    vocab: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int | None = None

    def __post_init__(self) -> None:
        check_at_least_one(self, "vocab", "length", "width", "layers", "heads", "projection")
        check_names("activation", [self.activation], ["quick_gelu", "gelu"])
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must divide by heads={self.heads}")


CLIP_L = CLIPTextParams()
CLIP_H = CLIPTextParams(width=1024, layers=24, heads=16, activation="gelu", projection=1024)
CLIP_G = CLIPTextParams(width=1280, layers=32, heads=20, activation="gelu", projection=1280)


class CLIPText(nn.Module):
    """forward(tokens (B, L)) -> layers + 1 states (B, L, width): the embeddings and the output of each block.

    No state has passed the final `norm`. L is at most `length`.
    """

    block_lists = ("blocks",)  # in the order in which they are called

    def __init__(self, params: CLIPTextParams) -> None:
        super().__init__()
        self.params = p = params
        self.token = nn.Embedding(p.vocab, p.width)
        self.position = nn.Parameter(torch.empty(p.length, p.width))
        self.blocks = nn.ModuleList(Block(p) for _ in range(p.layers))
        self.norm = nn.LayerNorm(p.width)
        self.projection = None if p.projection is None else nn.Linear(p.width, p.projection, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initialisation: normal, scaled by the depth at the end of residual branches; zero biases."""
        width, depth = self.params.width, self.params.layers
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        last = (2 * depth * width) ** -0.5
        stds = {".qkv": width**-0.5, ".out": last, ".fc1": (2 * width) ** -0.5, ".fc2": last}
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=stds[name[name.rindex(".") :]])
                nn.init.zeros_(module.bias)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    @with_enough_precision
    def forward(self, tokens: Tensor) -> list[Tensor]:
        if tokens.ndim != 2 or tokens.shape[1] > (length := self.params.length):
            raise ValueError(f"tokens are (B, L) with L up to {length}, not {tuple(tokens.shape)}: cut them")
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return states

    @with_enough_precision
    def pool(self, last_state: Tensor, tokens: Tensor, projected: bool = True, eos: int = EOS) -> Tensor:
        """The last state at each row's first `eos`, through norm and projection: (B, projection or width).

        projected  False: without the projection
        It is the first `eos`, since padding may be EOS too, and not the greatest id, which may be a learned
        word.
        """
        end = tokens == eos
        # On a GPU the check would wait for the device.
        if end.device.type == "cpu" and not torch.compiler.is_compiling() and not end.any(dim=1).all():
            raise ValueError(f"a row of tokens has no end of text ({eos}): put one behind the prompt")
        rows = torch.arange(len(tokens), device=tokens.device)
        pooled = self.norm(last_state[rows, end.int().argmax(dim=1)])  # (B, width)
        return self.projection(pooled) if projected and self.projection is not None else pooled


class Block(nn.Module):
    """Causal self-attention, then an MLP, both pre-norm with a residual connection."""

    def __init__(self, p: CLIPTextParams) -> None:
        super().__init__()
        self.activation = quick_gelu if p.activation == "quick_gelu" else F.gelu
        self.norm1 = nn.LayerNorm(p.width)
        self.attention = SelfAttention(p.width, p.heads, causal=True)
        self.norm2 = nn.LayerNorm(p.width)
        self.fc1, self.fc2 = nn.Linear(p.width, 4 * p.width), nn.Linear(4 * p.width, p.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)
