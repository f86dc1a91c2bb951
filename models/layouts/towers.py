"""Finds the text encoders ("towers") of a family among the parts of files, and makes the recipe that uses them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from diffusion.messages import brief
from diffusion.spec import check_type
from models.families import Architecture, Family, Tower
from models.files.table import Part
from models.layouts.findings import Findings
from models.networks.clip import CLIPTextParams
from models.networks.t5 import T5Params
from models.text.clip_tokenizer import EOS, CLIPTokenizer
from models.text.encoder import LEFT_OUT
from models.text.recipes import TextParams
from models.text.vocabulary import find_clip_tokenizer

WITH_PROJECTION = "CLIPTextModelWithProjection"  # transformers' class with a projection of the pooled output


def find_towers(found: Findings, architecture: Architecture) -> dict[str, Part]:
    """The text encoders by name; those of later files replace earlier ones. ValueError for one that the family does not use."""
    named: dict[str, Part] = {}
    for part in found.towers:
        if (tower := _tower_of(part, found, architecture)) is None:
            raise ValueError(f"{part.file.path} holds a {part.words}, and models built like {architecture.name} have no use for one")
        projected = any(use.tower == tower.name and use.pooled and use.projected for use in architecture.text().uses)
        if projected and part.params.width == tower.params.width and part.params.projection is None:
            raise ValueError(f"{part.file.path} holds {tower.name} without its text_projection, which the pooled vector needs")
        name = tower.name
        if name in named:
            if named[name].file is part.file:
                raise ValueError(f"{part.file.path} holds one text encoder too many: {architecture.name} has {len(architecture.towers)}")
            found.left_out.append((named[name], f"replaced by what {part.file.path.name} holds"))
        part = _without_unused_blocks(part, found)
        named[name] = _without_identity(part, found) if tower.identity else part
    return named


def _tower_of(part: Part, found: Findings, architecture: Architecture) -> Tower | None:
    """Which of an architecture's text encoders a part is, None where it has none of that kind.

    Two CLIPs are distinguished by their published widths, else by the projection of the pooled output, which the wider one has.
    """
    alike = [tower for tower in architecture.towers if type(tower.params) is type(part.params)]
    if len(alike) < 2:
        return next(iter(alike), None)
    if published := next((tower for tower in alike if tower.params.width == part.params.width), None):
        return published
    widest = max(other.params.width for other in found.towers if type(other.params) is type(part.params))
    return alike[part.params.projection is not None and part.params.width == widest]


def _without_identity(part: Part, found: Findings) -> Part:
    """A text encoder without its projection where that is the identity, as diffusers' folders write an encoder without one."""
    key = "text_projection.weight"
    if WITH_PROJECTION not in part.hints.get("architectures", ()) or key not in part.stored:
        return part
    projection = torch.empty(part.stored[key].shape)
    part.stored[key].read_into(projection)
    if not torch.equal(projection, torch.eye(*projection.shape)):
        return part
    found.left_out.append((replace(part, stored={key: part.stored[key]}), "the identity, for a pooled output that is not projected"))
    stored = {name: value for name, value in part.stored.items() if name != key}
    return replace(part, params=replace(part.params, projection=None), stored=stored)


def _without_unused_blocks(part: Part, found: Findings) -> Part:
    """A text encoder without the blocks beyond its config.json's number of layers, which is how folders record clip skip."""
    blocks = {name: re.search(r"\b(?:layers|block)\.(\d+)\.", name) for name in part.stored}
    beyond = {name for name, block in blocks.items() if block and int(block[1]) >= part.params.layers}
    if not beyond or part.layout.name != "transformers":
        return part
    unused = {name: part.stored[name] for name in beyond}
    found.left_out.append((replace(part, stored=unused), "beyond the layers that its config.json has"))
    return replace(part, stored={name: value for name, value in part.stored.items() if name not in beyond})


def text_params(of: Family, towers: Mapping[str, Part], found: Findings) -> TextParams | None:
    """The family's recipe for its text encoders, None where a required one is missing."""
    missing = [tower for tower in of.architecture.towers if tower.name not in towers]
    if needed := [tower.name for tower in missing if not tower.optional]:
        if towers:
            are, lack = ("are" if len(names) > 1 else "is" for names in (towers, needed))
            found.notes.append(f"{LEFT_OUT}: {', '.join(towers)} {are} there, but {', '.join(needed)} {lack} not")
            found.left_out += [(part, "a text encoder of no use without the other") for part in towers.values()]
        return None
    if missing:
        names = ", ".join(tower.name for tower in missing)
        found.notes.append(f"without the text encoder {names}, which the family can do without")
    params = {tower.name: _with_activation(tower, towers[tower.name]) for tower in of.architecture.towers if tower.name in towers}
    choices = of.architecture.choices(towers, found.backbone.params if found.backbone else None)
    tokenizers = _tokenizers(towers, found)
    found.tokenizers = {name: tokenizer for name, tokenizer in tokenizers.items() if not tokenizer.is_openai}
    try:
        return _configure(of.text_params(params, **choices), towers, tokenizers, found)
    except ValueError as error:
        raise ValueError(f"{found.towers[-1].file.path}: {error}") from None


def _tokenizers(towers: Mapping[str, Part], found: Findings) -> dict[str, CLIPTokenizer]:
    """The tokenizers that came with CLIP text encoders, by the name of the encoder. ValueError where one is missing."""
    clips = [name for name, part in towers.items() if isinstance(part.params, CLIPTextParams)]
    tokenizers = {}
    for name in clips:
        file, rows = towers[name].file.path, towers[name].params.vocab
        tokenizer = find_clip_tokenizer(towers[name], found.vocabularies, second=None if len(clips) == 1 else name != clips[0])
        if tokenizer is not None:
            tokenizers[name] = tokenizer
        elif rows != EOS + 1:
            raise ValueError(f"{file} knows {rows} tokens, and OpenAI's tokenizer has {EOS + 1}: load the folder of its own too")
    return tokenizers


def _configure(recipe: TextParams, towers: Mapping[str, Part], tokenizers: Mapping[str, CLIPTokenizer], found: Findings) -> TextParams:
    """The recipe with its tokenizers' padding and length, and with model_index.json's choice of what encodes an empty prompt."""
    uses = tuple(use if use.tower not in tokenizers else replace(use, pad=tokenizers[use.tower].pad) for use in recipe.uses)
    for use in uses:
        configured, eos = towers[use.tower].hints.get("eos_token_id"), tokenizers[use.tower].eos if use.tower in tokenizers else EOS
        # Older configurations say 2: transformers then takes the greatest id for the end of text, as it is in OpenAI's vocabulary.
        if use.pooled and configured not in (None, 2, eos):
            raise ValueError(f"config.json of {use.tower} says eos_token_id={brief(configured)}, and its tokenizer ends texts with {eos}")
    params = replace(recipe, uses=uses, tokens=_tokens_per_text(recipe, tokenizers))
    index = found.pipeline_of(next(iter(towers.values()))).index
    key = "force_zeros_for_empty_prompt"  # of pipelines that tell the network numbers too, by default True
    if recipe.numbers and index:
        check_type(f"{key} in model_index.json", zeros := index.get(key, True), bool)
        params = replace(params, null="zeros" if zeros else "empty")
    return params


def _tokens_per_text(recipe: TextParams, tokenizers: Mapping[str, CLIPTokenizer]) -> int | None:
    """How many tokens the encoders read at once, None for as many as they can. ValueError unless that is the same for all."""
    most = {use.tower: recipe.towers[use.tower].length for use in recipe.uses}
    configured = {name: tokenizers[name].vocabulary.length if name in tokenizers else None for name in most}
    lengths = {min(length, configured[name] or length) for name, length in most.items()}
    if len(lengths) > 1:
        raise ValueError(f"text encoders read {sorted(lengths)} tokens at once: their contexts are joined, so all must read as many")
    return None if lengths == set(most.values()) else lengths.pop()


def _with_activation(tower: Tower, part: Part) -> CLIPTextParams | T5Params:
    """The parameters with the activation of the published encoder, which no tensor shows. A config.json decides otherwise."""
    params: CLIPTextParams | T5Params = part.params
    if not isinstance(params, CLIPTextParams) or not isinstance(tower.params, CLIPTextParams) or "hidden_act" in part.hints:
        return params
    return replace(params, activation=tower.params.activation)
