"""The published families of models: what their weights do not say, what they are made of, and how they are
sampled.

Which architecture a model has follows from its parts; two families of one architecture (SDXL and SDXL-Turbo)
can only be told apart by whoever names the family, or by what lies beside the weights. A line of families is
a file here, and an entry in LINES.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from models.families import chroma, flux, sd, sd3, sdxl
from models.families.family import OWN_ROLES, Architecture, Beside, Family, Published, Role, Tower
from models.networks.dit import DiT, DiTParams
from models.text.reader import Reader

LINES = (sd, sdxl, flux, sd3, chroma)
FAMILIES: dict[str, Family] = {family.name: family for line in LINES for family in line.FAMILIES}
ARCHITECTURES: dict[str, Architecture] = {each.name: each for line in LINES for each in line.ARCHITECTURES}
TOWERS: list[Tower] = [tower for each in ARCHITECTURES.values() for tower in each.towers]
PUBLISHED: dict[str, Published] = {
    name: published for line in LINES for name, published in line.PUBLISHED.items()
}
"""By the names that `download` knows."""
READERS: dict[str, type[Reader]] = {tower.reader.kind: type(tower.reader) for tower in TOWERS}
"""What reads prompts, by kind."""
BACKBONES = {each.kind.name: each.kind for each in ARCHITECTURES.values()}
AUTOENCODERS = {each.autoencoder.name: each.autoencoder for each in ARCHITECTURES.values()}
NETWORKS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "dit": (DiT, DiTParams),
    **{name: (kind.network, kind.params) for name, kind in BACKBONES.items()},
}
"""What a description of a model can name, with the class of its parameters."""


def architecture_of(params: Any) -> Architecture | None:
    """The architecture of a backbone with these parameters, None for one of no published family."""
    return next(
        (
            each
            for each in ARCHITECTURES.values()
            if isinstance(params, each.kind.params) and each.matches(params)
        ),
        None,
    )


def table() -> str:
    """All families as a table in Markdown: the README has it, and `plain-diffusion models families` prints
    it."""
    lines = [
        "| `family=` | model | network | text encoders | pixels | sampled by default with | licence of the "
        "weights |",
        "|---" * 7 + "|",
    ]
    for of in FAMILIES.values():
        towers = ", ".join(tower.name + " (optional)" * tower.optional for tower in of.architecture.towers)
        how = "{sampler}, {steps} steps, guidance {guidance:g}".format(**of.sampling)
        cells = (f"`{of.name}`", of.title, of.architecture.kind.words, towers, str(of.size), how, of.licence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


__all__ = [
    "ARCHITECTURES",
    "AUTOENCODERS",
    "BACKBONES",
    "FAMILIES",
    "NETWORKS",
    "OWN_ROLES",
    "PUBLISHED",
    "READERS",
    "TOWERS",
    "Architecture",
    "Beside",
    "Family",
    "Published",
    "Role",
    "Tower",
    "architecture_of",
    "table",
]
