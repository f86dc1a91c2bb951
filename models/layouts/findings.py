"""What files were found to hold, before it is decided what model that makes."""

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
    """The configurations of a diffusers folder as a whole: its scheduler's and model_index.json, each {} if
    missing."""

    folder: Path = Path()
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Pipeline:
        return cls(folder, read_config(folder, SCHEDULER), read_config(folder, PIPELINE))

    def holds(self, part: Part) -> bool:
        """Whether the part was read from this folder, or from one within it."""
        return Path(os.path.abspath(self.folder)) in Path(os.path.abspath(part.file.path)).parents


@dataclass
class Findings:
    """What `describe` decides from, and what was noted and left out on the way.

    single        the parts except text towers: one of each kind, or the encoder and the decoder of a preview
    towers        text towers in the order of their files
    files         every file opened; `ignored` of each accounts for the keys that are in no part
    pipelines     the configurations of the given folders
    vocabularies  files and folders of tokenizers that were given beside the weights
    ldm           latent diffusion's configuration of the model, from beside the backbone's file; `ldm_file`
                  is its name in notes and errors
    notes         filled on the way: what was settled by something other than keys and shapes
    tokenizers    filled on the way: the tokenizers of text towers, where they came with some, by tower
    left_out      filled on the way: parts that were replaced by a later file's, and towers that nothing uses,
                  with the reason
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
        """Take the parts of a file; they replace those of the same kind from earlier files."""
        self.files.append(parts[0].file)
        for part in parts:
            if part.kind == "text":  # which of them it is depends on the others: `describe` tells
                self.towers.append(part)
                continue
            if part.kind == "backbone":
                self._look_above(part)
            replaced = [other for other in self.single if _replaces(part, other)]
            self.single = [other for other in self.single if other not in replaced] + [part]
            self.left_out += [(other, f"replaced by what {part.file.path.name} holds") for other in replaced]

    def _look_above(self, part: Part) -> None:
        """Add the configurations of the pipeline that the part's folder lies in, unless that pipeline was
        given itself."""
        home = Path(os.path.abspath(part.file.path)).parent
        pipeline = Pipeline.of(home.parent)
        if (
            part.hints
            and home.name in pipeline.index
            and not any(each.holds(part) for each in self.pipelines)
        ):
            self.pipelines.append(pipeline)

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
        """The configurations of the folder that holds the part, empty if there is none. Without a part, those
        of the last folder."""
        return next(
            (each for each in reversed(self.pipelines) if part is None or each.holds(part)), Pipeline()
        )

    @property
    def pipeline(self) -> Pipeline:
        """The configurations of the backbone's folder, since those of another network say nothing about
        it."""
        return self.pipeline_of(self.backbone)

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The configuration of the scheduler that the backbone was published with, {} without one."""
        return self.pipeline.scheduler

    @property
    def is_edm(self) -> bool:
        """Whether the scheduler is EDM's. It preconditions the network, so its prediction_type is not the
        network's own prediction."""
        return str(self.scheduler.get("_class_name")).startswith("EDM")

    @property
    def scheduler_file(self) -> Path:
        """Where that configuration is, for error messages about it."""
        return self.pipeline.folder / SCHEDULER


def _replaces(part: Part, other: Part) -> bool:
    """Whether a part replaces the other: both hold the same half of a network, or one holds all of it
    (`inside` is "")."""
    a, b = part.layout.inside, other.layout.inside
    return part.kind == other.kind and (a == b or not (a and b))
