"""The published families of models: their parts, how they are sampled, and what their weights do not say.

The parts of a model determine its architecture. Families of one architecture (SDXL and SDXL-Turbo) differ
only in what users say, or in files next to the weights. Each line of families has a file here and an entry in
LINES.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from models.families import chroma, flux, sd, sd3, sdxl
from models.families.family import DEFAULT_ROLES, Architecture, Family, ImageInput, Published, Role, Tower
from models.networks.dit import DiT, DiTParams
from models.text.reader import Reader

LINES = (sd, sdxl, flux, sd3, chroma)
FAMILIES: dict[str, Family] = {family.name: family for line in LINES for family in line.FAMILIES}
ARCHITECTURES: dict[str, Architecture] = {each.name: each for line in LINES for each in line.ARCHITECTURES}
TOWERS: list[Tower] = [tower for each in ARCHITECTURES.values() for tower in each.towers]
PUBLISHED: dict[str, Published] = {name: each for line in LINES for name, each in line.PUBLISHED.items()}
"""By the names for `download`."""
READERS: dict[str, type[Reader]] = {tower.reader.kind: type(tower.reader) for tower in TOWERS}
"""Classes of text readers, by kind."""
BACKBONES = {each.kind.name: each.kind for each in ARCHITECTURES.values()}
AUTOENCODERS = {each.autoencoder.name: each.autoencoder for each in ARCHITECTURES.values()}
NETWORKS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "dit": (DiT, DiTParams),
    **{name: (kind.network, kind.params) for name, kind in BACKBONES.items()},
}
"""Networks that a model's description can name, with the class of their parameters."""


def architecture_of(params: Any) -> Architecture | None:
    """The architecture of a backbone with these parameters, None if no published family has it."""
    for each in ARCHITECTURES.values():
        if isinstance(params, each.kind.params) and each.matches(params):
            return each
    return None


def table() -> str:
    """All families as a table in Markdown, for the README and `plain-diffusion models families`."""
    columns = ("`family=`", "model", "network", "text encoders", "pixels", "sampled by default with")
    rows = [(*columns, "licence of the weights")]
    for family in FAMILIES.values():
        towers = (tower.name + " (optional)" * tower.optional for tower in family.architecture.towers)
        steps = f"{family.sampling['steps']} step{'s' * (family.sampling['steps'] != 1)}"
        sampling = f"{family.sampling['sampler']}, {steps}, guidance {family.sampling['guidance']:g}"
        network = family.architecture.kind.title
        row = (f"`{family.name}`", family.title, network, ", ".join(towers), str(family.size), sampling)
        rows.append((*row, family.licence))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * 7 + "|", *lines[1:]])


__all__ = [
    "ARCHITECTURES",
    "AUTOENCODERS",
    "BACKBONES",
    "DEFAULT_ROLES",
    "FAMILIES",
    "NETWORKS",
    "PUBLISHED",
    "READERS",
    "TOWERS",
    "Architecture",
    "Family",
    "ImageInput",
    "Published",
    "Role",
    "Tower",
    "architecture_of",
    "table",
]
