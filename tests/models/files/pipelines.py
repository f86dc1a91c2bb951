"""A pipeline of diffusers beside the folder that it is of, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from tests.models.files.tiny import same

NUMBERS: dict[str, Any] = dict(
    height=64, width=64, top=0, left=0, target_height=64, target_width=64
)  # what SDXL is told of an image
ALIAS = "encoder.embed_tokens.weight"  # T5's embeddings by a second name


def states(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """Of each part, by its sub-folder. transformers has dropped the text_model. that published files keep,
    and T5's embeddings twice."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = {name: dict(part.state_dict()) for name, part in parts.items()}
    for name, state in found.items():
        if name.startswith("text_encoder"):
            found[name] = {
                key.removeprefix("text_model."): value for key, value in state.items() if key != ALIAS
            }
    return found


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What a folder of ours holds, likewise; diffusers has no place for a preview."""
    found = {
        path.parent.name: load_file(path)
        for path in folder.rglob("*.safetensors")
        if path.parent.name != "preview"
    }
    return {
        name: {key.removeprefix("text_model."): value for key, value in state.items()}
        for name, state in found.items()
    }


def equal(theirs: Mapping[str, Mapping[str, Tensor]], ours: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The same parts, bit for bit."""
    assert theirs.keys() == ours.keys()
    for part in ours:
        same(theirs[part], ours[part])
