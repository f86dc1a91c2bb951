"""Fixtures for tests of loading: miniatures as files and folders, changed at will."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models import Model
from tests.models.files.tiny import Files, tiny
from tests.peers import diffusers


@pytest.fixture
def quietly() -> Iterator[None]:
    """No gradients, and nothing of diffusers but errors."""
    diffusers.logging.set_verbosity_error()
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """The tensors of a miniature's single file, without marks and metadata."""
    root, made = tmp_path_factory.mktemp("files"), dict[str, dict[str, Tensor]]()

    def state(family: str) -> dict[str, Tensor]:
        if family not in made:
            models.save(tiny(family), root / f"{family}.safetensors", "ldm")
            made[family] = load_file(root / f"{family}.safetensors")
        return dict(made[family])

    return state


@pytest.fixture
def load(files: Files, tmp_path: Path) -> Callable[..., Model]:
    """Load the UNet of a miniature's single file, or the parts under `prefix`, with some tensors changed, and
    with that metadata."""

    def made(
        of: str,
        change: Mapping[str, Tensor] | None = None,
        metadata: dict[str, str] | None = None,
        prefix: str | tuple[str, ...] = "model.",
        **options: Any,
    ) -> Model:
        state = {key: value for key, value in files(of).items() if key.startswith(prefix)}
        save_file({**state, **(change or {})}, tmp_path / "model.safetensors", metadata)
        return models.load(tmp_path / "model.safetensors", **options)

    return made


@pytest.fixture(scope="session")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("folders")

    def path(family: str) -> Path:
        if not (root / family).exists():
            models.save(tiny(family), root / family, "diffusers")
            for name in ("tokenizer", "tokenizer_2", "preview"):
                shutil.rmtree(root / family / name, ignore_errors=True)
        return root / family

    return path


@pytest.fixture
def configured(saved_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The UNet's folder of a miniature, its scheduler's and that of a configuration, which is changed; a
    setting of None is left out."""

    def made(family: str, config: str, **settings: Any) -> Path:
        folder = tmp_path / "folder"
        for name in {"unet", "scheduler", config.split("/")[0]} - {"model_index.json"}:
            shutil.copytree(saved_folder(family) / name, folder / name)
        shutil.copy(saved_folder(family) / "model_index.json", folder)
        content = json.loads((folder / config).read_text()) | settings
        (folder / config).write_text(
            json.dumps({name: value for name, value in content.items() if value is not None})
        )
        return folder

    return made
