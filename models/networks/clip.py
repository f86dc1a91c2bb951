"""CLIP's text tower (Radford et al. 2021): a causal transformer over tokens. Every published size is a
configuration of it."""

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
    """One text tower; the default is that of OpenAI's ViT-L/14.

    vocab       tokens it knows; 49408, and more for learned words or for a vocabulary of its own
    length      tokens it can read at once, BOS and EOS included
    activation  between the two layers of the MLP: "quick_gelu" (OpenAI), x * sigmoid(1.702 x), or "gelu"
                (OpenCLIP)
    projection  width of the pooled output; None: that of the tower, for there is no projection
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
    """forward(tokens (B, L) of whole numbers) -> the layers + 1 states (B, L, width): the embeddings, then
    after every block.

    None of them has been through the final `norm`. L is at most `length`.
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
        """As CLIP was trained from: normal, narrower by the depth where a residual branch ends, and no
        biases."""
        width, depth = self.params.width, self.params.layers
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        stds = {
            ".qkv": width**-0.5,
            ".out": (2 * depth * width) ** -0.5,
            ".fc1": (2 * width) ** -0.5,
            ".fc2": (2 * depth * width) ** -0.5,
        }
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=stds[name[name.rindex(".") :]])
                nn.init.zeros_(module.bias)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=width**-0.5)

    @with_enough_precision
    def forward(self, tokens: Tensor) -> list[Tensor]:
        if tokens.ndim != 2 or tokens.shape[1] > self.params.length:
            raise ValueError(
                f"tokens are (B, L) with L up to {self.params.length}, not {tuple(tokens.shape)}: cut them, "
                "or encode in parts"
            )
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return states

    @with_enough_precision
    def pool(self, last_state: Tensor, tokens: Tensor, projected: bool = True, eos: int = EOS) -> Tensor:
        """The last state (B, L, width) at each row's first `eos`, through norm and, if `projected`,
        projection: (B, projection or width).

        The first, because padding may be EOS as well; and not the greatest id, which may be that of an added
        token.
        """
        end = tokens == eos
        # Not on a GPU, where looking would wait for the device.
        if end.device.type == "cpu" and not torch.compiler.is_compiling() and not end.any(dim=1).all():
            raise ValueError(f"a row of tokens has no end of text ({eos}): put one behind the prompt")
        row = last_state[
            torch.arange(len(tokens), device=tokens.device), end.int().argmax(dim=1)
        ]  # (B, width)
        row = self.norm(row)
        return self.projection(row) if projected and self.projection is not None else row


class Block(nn.Module):
    """Self-attention to what came before, then an MLP; each pre-normed and added."""

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
