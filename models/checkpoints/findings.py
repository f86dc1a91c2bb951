"""What files were found to hold, before it is decided what model that makes."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.checkpoints.folder import PIPELINE, SCHEDULER, read_config
from models.checkpoints.parts import Part
from models.checkpoints.stored import TensorFile
from models.tokenizer import CLIPTokenizer


@dataclass(frozen=True)
class Pipeline:
    """The configurations of a diffusers folder as a whole: its scheduler's and model_index.json, each {} if missing."""

    folder: Path | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Pipeline:
        return cls(folder, read_config(folder, SCHEDULER), read_config(folder, PIPELINE))

    def holds(self, part: Part) -> bool:
        """Whether the part was read from this folder, or from one within it."""
        return self.folder is not None and Path(os.path.abspath(self.folder)) in Path(os.path.abspath(part.file.path)).parents


@dataclass
class Findings:
    """What `describe` decides from, and what it notes on the way.

    single     the parts but for text towers: no two of a kind, save the encoder and the decoder of a preview
    towers     text towers in the order of their files
    files      every file opened
    networks   the parameters of the backbone in every file that holds one, used or not
    pipelines  the configurations of the given folders
    vocabularies  files and folders of tokenizers that were given beside the weights
    ldm        what latent diffusion's configuration beside the backbone's file says of its model, and how notes and errors call that file
    notes      filled on the way: what was settled otherwise than by keys and shapes
    tokenizers filled on the way: by tower, those of CLIP's towers that have a vocabulary of their own
    left_out   filled on the way: towers that a later file's take the place of, or that nothing uses, with the reason
    """

    single: list[Part] = field(default_factory=list)
    towers: list[Part] = field(default_factory=list)
    files: list[TensorFile] = field(default_factory=list)
    networks: dict[Path, Any] = field(default_factory=dict)
    pipelines: list[Pipeline] = field(default_factory=list)
    vocabularies: list[Path] = field(default_factory=list)
    tokenizers: dict[str, CLIPTokenizer] = field(default_factory=dict)
    ldm: Mapping[str, Any] = field(default_factory=dict)
    ldm_file: str = ""
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

    def pipeline_of(self, part: Part | None) -> Pipeline:
        """The configurations of the folder that holds the part, empty if there is none. Without a part, those of the last folder."""
        return next((each for each in reversed(self.pipelines) if part is None or each.holds(part)), Pipeline())

    @property
    def pipeline(self) -> Pipeline:
        """The configurations of the backbone's folder, since those of another network say nothing about it."""
        return self.pipeline_of(self.backbone)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The configuration of the scheduler that the backbone was published with, {} without one."""
        return self.pipeline.scheduler

    @property
    def scheduler_file(self) -> Path:
        """The scheduler's file, for error messages; the first file of weights without one."""
        folder = self.pipeline.folder
        return folder / SCHEDULER if folder and self.scheduler else self.files[0].path
