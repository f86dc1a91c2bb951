"""What files were found to hold, before it is decided what model that makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.checkpoints.parts import Part
from models.checkpoints.stored import TensorFile
from models.tokenizer import CLIPTokenizer


@dataclass
class Findings:
    """What `describe` decides from, and what it notes on the way.

    single     the parts but for text towers: no two of a kind, save the encoder and the decoder of a preview
    towers     text towers in the order of their files
    files      every file opened
    networks   the backbone's parameters in every file that holds one, whether that is taken or not
    scheduler  a pipeline's scheduler configuration, and its file
    vocabularies  files and folders of tokenizers that were given beside the weights
    index      a pipeline's model_index.json
    ldm        what latent diffusion's configuration beside the backbone's file says of its model
    notes      filled on the way: what was settled otherwise than by keys and shapes
    tokenizers filled on the way: by tower, those of CLIP's towers that have a vocabulary of their own
    left_out   filled on the way: towers that a later file's take the place of, or that nothing uses, with the reason
    """

    single: list[Part] = field(default_factory=list)
    towers: list[Part] = field(default_factory=list)
    files: list[TensorFile] = field(default_factory=list)
    networks: dict[Path, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    scheduler_file: Path | None = None
    vocabularies: list[Path] = field(default_factory=list)
    tokenizers: dict[str, CLIPTokenizer] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    ldm: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[tuple[Part, str]] = field(default_factory=list)

    def of_kind(self, kind: str) -> Part | None:
        return next((part for part in self.single if part.kind == kind), None)

    @property
    def backbone(self) -> Part | None:
        return self.of_kind("backbone")

    @property
    def backbone_hints(self) -> Mapping[str, Any]:
        """The config.json beside the backbone's weights, {} without one."""
        return self.backbone.hints if self.backbone else {}
