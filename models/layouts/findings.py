"""What files hold, collected before deciding which model they make."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.files.stored import TensorFile
from models.files.table import Part
from models.layouts.folder import PIPELINE, SCHEDULER, read_config


@dataclass(frozen=True)
class Pipeline:
    """A diffusers folder's configurations: of its scheduler, and model_index.json; {} if missing."""

    folder: Path = Path()
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Pipeline:
        return cls(folder, read_config(folder, SCHEDULER), read_config(folder, PIPELINE))

    def holds(self, part: Part) -> bool:
        """Whether the part was read from this folder, or from one within it."""
        return Path(os.path.abspath(self.folder)) in Path(os.path.abspath(part.file.path)).parents


@dataclass
class Findings:
    """What `describe` decides from. It fills in ldm, notes, tokenizers and left_out.

    single        the parts except text towers: one of each kind, or the encoder and the decoder of a preview
    towers        text towers in the order of their files
    files         every file opened; `ignored` of each accounts for the keys that are in no part
    pipelines     the configurations of the folders
    vocabularies  files and folders of tokenizers
    tokenizers    those of the text towers, by tower
    ldm           latent diffusion's YAML configuration of the backbone; ldm_file is its name in messages
    notes         decisions that keys and shapes do not prove
    left_out      parts replaced by those of a later file, and unused towers, with the reason
    """

    single: list[Part] = field(default_factory=list)
    towers: list[Part] = field(default_factory=list)
    files: list[TensorFile] = field(default_factory=list)
    pipelines: list[Pipeline] = field(default_factory=list)
    vocabularies: list[Path] = field(default_factory=list)
    tokenizers: dict[str, Any] = field(default_factory=dict)
    ldm: Mapping[str, Any] = field(default_factory=dict)
    ldm_file: str = ""
    notes: list[str] = field(default_factory=list)
    left_out: list[tuple[Part, str]] = field(default_factory=list)

    def add(self, parts: Sequence[Part]) -> None:
        """Add the parts of a file; they replace those of the same kind from earlier files."""
        self.files.append(parts[0].file)
        for part in parts:
            if part.kind == "text":  # `describe` decides which tower it is, as that depends on the others
                self.towers.append(part)
                continue
            if part.kind == "backbone":
                self._add_parent_pipeline(part)
            replaced = [other for other in self.single if _replaces(part, other)]
            self.single = [other for other in self.single if other not in replaced] + [part]
            self.left_out += [(other, f"replaced by what {part.file.path.name} holds") for other in replaced]

    def _add_parent_pipeline(self, part: Part) -> None:
        """Add the pipeline of the part's parent folder, if it names the part's folder and is new."""
        folder = Path(os.path.abspath(part.file.path)).parent
        pipeline = Pipeline.read(folder.parent)
        known = any(each.holds(part) for each in self.pipelines)
        if part.hints and folder.name in pipeline.index and not known:
            self.pipelines.append(pipeline)

    def part(self, kind: str) -> Part | None:
        return next((part for part in self.single if part.kind == kind), None)

    @property
    def backbone(self) -> Part | None:
        return self.part("backbone")

    @property
    def backbone_hints(self) -> Mapping[str, Any]:
        """The config.json beside the backbone's weights, {} without one."""
        return self.backbone.hints if self.backbone else {}

    def pipeline_of(self, part: Part | None) -> Pipeline:
        """The configurations of the folder that holds a part, or without a part, of the last folder."""
        pipelines = (each for each in reversed(self.pipelines) if part is None or each.holds(part))
        return next(pipelines, Pipeline())

    @property
    def pipeline(self) -> Pipeline:
        """The configurations of the backbone's folder, since those of another network do not apply to it."""
        return self.pipeline_of(self.backbone)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The configuration of the scheduler that the backbone was published with, {} without one."""
        return self.pipeline.scheduler

    @property
    def is_edm(self) -> bool:
        """Whether the scheduler is EDM's, whose prediction_type is not the network's own prediction."""
        return str(self.scheduler.get("_class_name")).startswith("EDM")

    @property
    def scheduler_file(self) -> Path:
        """The path of that configuration, for error messages."""
        return self.pipeline.folder / SCHEDULER


def _replaces(part: Part, other: Part) -> bool:
    """Whether a part replaces another: both hold the same half of a network, or one holds all of it."""
    a, b = part.layout.submodule, other.layout.submodule
    return part.kind == other.kind and (a == b or not (a and b))
