"""Folders as diffusers writes them: one sub-folder per part, with a config.json beside its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.checkpoints.tensors import PICKLES, SAFETENSORS, TensorFile, open_tensors
from models.files import read_json

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNUSED = {
    "safety_checker": "a filter for finished images",
    "feature_extractor": "of the safety checker",
    "image_encoder": "for image prompts",
    "tokenizer": "the vocabulary, which open_clip brings",
    "tokenizer_2": "the vocabulary, which open_clip brings",
}
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def is_component(folder: Path) -> bool:
    """Whether weights lie in the folder itself."""
    return any(path.name.startswith(STEMS) for path in folder.iterdir() if path.is_file())


def components(folder: Path) -> list[Path]:
    """The folders that hold weights: those of a pipeline's parts, or the folder itself. FileNotFoundError where there are none."""
    found = [folder / name for name in COMPONENTS if (folder / name).is_dir() and is_component(folder / name)]
    if not found and is_component(folder):
        return [folder]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no model: neither {STEMS[0]}.safetensors nor sub-folders {', '.join(COMPONENTS)} with weights in them"
        )
    return found


def open_component(folder: Path, variant: str | None, ema: bool) -> tuple[TensorFile, dict[str, Any]]:
    """The weights in a part's folder, and its config.json ({} without one).

    variant  "fp16", "non_ema", ...: weights of that name; None takes the plain ones, else whatever there is; ema=False prefers "non_ema"
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for name in _candidates(names, variant, ema):
        if name in names:
            config = folder / "config.json"
            return open_tensors(folder / name), read_json(config) if config.is_file() else {}
    there = ", ".join(sorted(name for name in names if name.endswith((*SAFETENSORS, *PICKLES)))) or "no weights"
    raise FileNotFoundError(f"{folder} holds no weights of the variant {variant!r}: there is {there}")


def _candidates(names: set[str], variant: str | None, ema: bool) -> Iterator[str]:
    """File names in the order in which they are wanted, safetensors before pickles."""
    if variant:
        variants = [f".{variant}"]
    else:
        others = sorted({f".{name.split('.')[1]}" for name in names if name.startswith(STEMS) and name.count(".") == 2})
        variants = [*([] if ema else [".non_ema"]), "", *(v for v in others if v not in (".safetensors", ".non_ema")), ".non_ema"]
    for v in variants:
        for stem in STEMS:
            yield f"{stem}{v}.safetensors"
            yield f"{stem}.safetensors.index{v}.json"
    for v in variants:
        for stem in STEMS:
            yield f"{stem}{v}.bin"


def scheduler_hints(folder: Path) -> dict[str, Any]:
    """What a pipeline's scheduler configuration says of the model; {} without one."""
    config = folder / "scheduler" / "scheduler_config.json"
    return read_json(config) if config.is_file() else {}
