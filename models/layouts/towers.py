"""Finds a family's text encoders ("towers") among the parts of files, and how they read prompts."""

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
    """The text encoders by name; later files replace earlier ones. ValueError for one that is not used."""
    towers: dict[str, Part] = {}
    for part in found.towers:
        if (tower := _find_tower(part, found, architecture)) is None:
            raise ValueError(f"{part.file.path} holds a {part.title}, which {architecture.name} does not use")
        name = tower.name
        if name in towers:
            if towers[name].file is part.file:
                count = len(architecture.towers)
                more = f"more text encoders than {architecture.name}, which has {count}"
                raise ValueError(f"{part.file.path} holds {more}")
            found.left_out.append((towers[name], f"replaced by what {part.file.path.name} holds"))
        part = _without_unused_blocks(part, found)
        towers[name] = _without_identity(part, found) if tower.identity else part
    return towers


def _find_tower(part: Part, found: Findings, architecture: Architecture) -> Tower | None:
    """Which of an architecture's text encoders a part is, None if it has none of that kind.

    Two CLIPs differ in their published widths, else in the projection of the pooled output of the wider one.
    """
    alike = [tower for tower in architecture.towers if type(tower.reader.network) is type(part.params)]
    if len(alike) < 2:
        return next(iter(alike), None)
    if published := next((tower for tower in alike if tower.reader.network.width == part.params.width), None):
        return published
    widest = max(other.params.width for other in found.towers if type(other.params) is type(part.params))
    return alike[part.params.projection is not None and part.params.width == widest]


def _without_identity(part: Part, found: Findings) -> Part:
    """A text encoder without its projection if it is the identity, which diffusers writes instead of none."""
    key = "text_projection.weight"
    if WITH_PROJECTION not in part.hints.get("architectures", ()) or key not in part.stored:
        return part
    projection = torch.empty(part.stored[key].shape)
    part.stored[key].read_into(projection)
    if not torch.equal(projection, torch.eye(*projection.shape)):
        return part
    reason = "the identity, for a pooled output that is not projected"
    found.left_out.append((replace(part, stored={key: part.stored[key]}), reason))
    stored = {name: value for name, value in part.stored.items() if name != key}
    return replace(part, params=replace(part.params, projection=None), stored=stored)


def _without_unused_blocks(part: Part, found: Findings) -> Part:
    """A text encoder without blocks beyond its config.json's layers, which record clip skip."""
    blocks = {name: re.search(r"\b(?:layers|block)\.(\d+)\.", name) for name in part.stored}
    beyond = {name for name, block in blocks.items() if block and int(block[1]) >= part.params.layers}
    if not beyond or part.layout.name != "transformers":
        return part
    unused = {name: part.stored[name] for name in beyond}
    found.left_out.append((replace(part, stored=unused), "beyond the layers that its config.json has"))
    return replace(part, stored={name: value for name, value in part.stored.items() if name not in beyond})


def text_params(family: Family, towers: Mapping[str, Part], found: Findings) -> TextParams | None:
    """How the family reads prompts with these text encoders, None if a required one is missing."""
    missing = [tower for tower in family.architecture.towers if tower.name not in towers]
    if required := [tower.name for tower in missing if not tower.optional]:
        if towers:
            found.notes.append(f"{LEFT_OUT}: {', '.join(towers)} without {', '.join(required)}")
            reason = "a text encoder that is not used without the other"
            found.left_out += [(part, reason) for part in towers.values()]
        return None
    if missing:
        names = ", ".join(tower.name for tower in missing)
        found.notes.append(f"without the text encoder {names}, which is optional")
    tokenizers = _find_tokenizers(family, towers, found)
    readers = {}
    for name, part in towers.items():
        try:
            readers[name] = family.readers[name].from_files(part, tokenizers.get(name))
        except ValueError as error:
            raise ValueError(f"{part.file.path} holds {name}: {error}") from None
    params = found.backbone.params if found.backbone else None
    try:
        text = family.architecture.adapt_text(family.join_readers(readers), towers, params)
    except ValueError as error:
        raise ValueError(f"{found.towers[-1].file.path}: {error}") from None
    return _with_null(text, towers, found)


def _find_tokenizers(family: Family, towers: Mapping[str, Part], found: Findings) -> dict[str, Any]:
    """The tokenizers of the text encoders, by name; those to be kept also in `found.tokenizers`.

    ValueError for an unused one among the paths, and if one is missing.
    """
    kinds = {name: family.readers[name].kind for name in towers}
    used = [reader for reader in READERS.values() if reader.kind in kinds.values()]
    for path in found.vocabularies:
        if not any(reader.is_tokenizer(path) for reader in used):
            names = " or ".join(towers)
            raise ValueError(
                f"{path} is a tokenizer that {names} cannot use: leave it out, or load its text encoder too"
            )
    tokenizers: dict[str, Any] = {}
    for reader in used:
        parts = {name: part for name, part in towers.items() if kinds[name] == reader.kind}
        paths = [path for path in found.vocabularies if reader.is_tokenizer(path)]
        own = reader.find_tokenizers(parts, paths, found.notes)
        found.tokenizers |= reader.assign_tokenizers(own, list(parts))
        tokenizers |= own
    return tokenizers


def _with_null(text: TextParams, towers: Mapping[str, Part], found: Findings) -> TextParams:
    """The same with model_index.json's choice of the encoding of an empty prompt."""
    index = found.pipeline_of(next(iter(towers.values()))).index
    key = "force_zeros_for_empty_prompt"  # of pipelines that also encode numbers, by default True
    if not (text.numbers and index):
        return text
    check_type(f"{key} in model_index.json", zeros := index.get(key, True), bool)
    return replace(text, null="zeros" if zeros else "empty")
