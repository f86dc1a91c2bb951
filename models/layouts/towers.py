"""Finds the text encoders ("towers") of a family among the parts of files, and how prompts are read with
them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from diffusion.spec import check_type
from models.families import READERS, Architecture, Family, Tower
from models.files.table import Part
from models.layouts.findings import Findings
from models.text.encoder import LEFT_OUT
from models.text.recipes import TextParams

WITH_PROJECTION = "CLIPTextModelWithProjection"  # transformers' class with a projection of the pooled output


def find_towers(found: Findings, architecture: Architecture) -> dict[str, Part]:
    """The text encoders by name; those of later files replace earlier ones. ValueError for one that the
    family does not use."""
    named: dict[str, Part] = {}
    for part in found.towers:
        if (tower := _tower_of(part, found, architecture)) is None:
            raise ValueError(
                f"{part.file.path} holds a {part.words}, and models built like {architecture.name} have no "
                "use for one"
            )
        name = tower.name
        if name in named:
            if named[name].file is part.file:
                raise ValueError(
                    f"{part.file.path} holds one text encoder too many: {architecture.name} has "
                    f"{len(architecture.towers)}"
                )
            found.left_out.append((named[name], f"replaced by what {part.file.path.name} holds"))
        part = _without_unused_blocks(part, found)
        named[name] = _without_identity(part, found) if tower.identity else part
    return named


def _tower_of(part: Part, found: Findings, architecture: Architecture) -> Tower | None:
    """Which of an architecture's text encoders a part is, None where it has none of that kind.

    Two CLIPs are distinguished by their published widths, else by the projection of the pooled output, which
    the wider one has.
    """
    alike = [tower for tower in architecture.towers if type(tower.reader.network) is type(part.params)]
    if len(alike) < 2:
        return next(iter(alike), None)
    if published := next((tower for tower in alike if tower.reader.network.width == part.params.width), None):
        return published
    widest = max(other.params.width for other in found.towers if type(other.params) is type(part.params))
    return alike[part.params.projection is not None and part.params.width == widest]


def _without_identity(part: Part, found: Findings) -> Part:
    """A text encoder without its projection where that is the identity, as diffusers' folders write an
    encoder without one."""
    key = "text_projection.weight"
    if WITH_PROJECTION not in part.hints.get("architectures", ()) or key not in part.stored:
        return part
    projection = torch.empty(part.stored[key].shape)
    part.stored[key].read_into(projection)
    if not torch.equal(projection, torch.eye(*projection.shape)):
        return part
    found.left_out.append(
        (
            replace(part, stored={key: part.stored[key]}),
            "the identity, for a pooled output that is not projected",
        )
    )
    stored = {name: value for name, value in part.stored.items() if name != key}
    return replace(part, params=replace(part.params, projection=None), stored=stored)


def _without_unused_blocks(part: Part, found: Findings) -> Part:
    """A text encoder without the blocks beyond its config.json's number of layers, which is how folders
    record clip skip."""
    blocks = {name: re.search(r"\b(?:layers|block)\.(\d+)\.", name) for name in part.stored}
    beyond = {name for name, block in blocks.items() if block and int(block[1]) >= part.params.layers}
    if not beyond or part.layout.name != "transformers":
        return part
    unused = {name: part.stored[name] for name in beyond}
    found.left_out.append((replace(part, stored=unused), "beyond the layers that its config.json has"))
    return replace(part, stored={name: value for name, value in part.stored.items() if name not in beyond})


def text_params(of: Family, towers: Mapping[str, Part], found: Findings) -> TextParams | None:
    """How the family reads prompts with these text encoders, None where a required one is missing."""
    missing = [tower for tower in of.architecture.towers if tower.name not in towers]
    if needed := [tower.name for tower in missing if not tower.optional]:
        if towers:
            are, lack = ("are" if len(names) > 1 else "is" for names in (towers, needed))
            found.notes.append(
                f"{LEFT_OUT}: {', '.join(towers)} {are} there, but {', '.join(needed)} {lack} not"
            )
            found.left_out += [
                (part, "a text encoder of no use without the other") for part in towers.values()
            ]
        return None
    if missing:
        names = ", ".join(tower.name for tower in missing)
        found.notes.append(f"without the text encoder {names}, which the family can do without")
    tokenizers = _find_tokenizers(of, towers, found)
    readers = {}
    for name, part in towers.items():
        try:
            readers[name] = of.readers[name].from_files(part, tokenizers.get(name))
        except ValueError as error:
            raise ValueError(f"{part.file.path} holds {name}: {error}") from None
    try:
        text = of.architecture.adapt_text(
            of.join_readers(readers), towers, found.backbone.params if found.backbone else None
        )
    except ValueError as error:
        raise ValueError(f"{found.towers[-1].file.path}: {error}") from None
    return _with_null(text, towers, found)


def _find_tokenizers(of: Family, towers: Mapping[str, Part], found: Findings) -> dict[str, Any]:
    """The tokenizers that came with the text encoders, by name; `found.tokenizers` are those that they keep.

    ValueError for one that was given and is of no kind that they read, and where one lacks.
    """
    used = [
        reader for reader in READERS.values() if any(of.readers[name].kind == reader.kind for name in towers)
    ]
    for path in found.vocabularies:
        if not any(reader.is_tokenizer(path) for reader in used):
            names = " or ".join(towers)
            raise ValueError(
                f"{path} is a tokenizer, and not of {names}: leave it out, or load the text encoder that "
                "reads it too"
            )
    tokenizers: dict[str, Any] = {}
    for reader in used:
        parts = {name: part for name, part in towers.items() if of.readers[name].kind == reader.kind}
        given = [path for path in found.vocabularies if reader.is_tokenizer(path)]
        these = reader.find_tokenizers(parts, given, found.notes)
        found.tokenizers |= reader.assign_tokenizers(these, list(parts))
        tokenizers |= these
    return tokenizers


def _with_null(text: TextParams, towers: Mapping[str, Part], found: Findings) -> TextParams:
    """With model_index.json's choice of what encodes an empty prompt."""
    index = found.pipeline_of(next(iter(towers.values()))).index
    key = "force_zeros_for_empty_prompt"  # of pipelines that tell the network numbers too, by default True
    if not (text.numbers and index):
        return text
    check_type(f"{key} in model_index.json", zeros := index.get(key, True), bool)
    return replace(text, null="zeros" if zeros else "empty")
