"""Loading takes the memory of the weights that are kept and of one tensor; what is left out of a file stays
on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from tests.models.files.tiny import tiny

ROOT = Path(__file__).parents[3]
CASES = [
    *(
        (kind, dtype)
        for kind in ("ldm.safetensors", "folder", "native.safetensors")
        for dtype in ("stored", "float32", "bfloat16")
    ),
    *(("averaged.safetensors", dtype) for dtype in ("stored", "float32")),
    ("pickle.ckpt", "stored"),  # of one that is cast, pages stay mapped, which the system can take back
]
LOADS = 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in every way: 105 MB in half precision, which outweighs what Python needs to hold
    them."""
    root, small = tmp_path_factory.mktemp("files"), tiny("sd1")
    model = models.build({**small.spec, "network": {**small.spec["network"], "channels": 256}}, device="meta")
    for part in model.parts.values():
        part.to_empty(device="cpu").half()
        for value in part.state_dict().values():
            value.fill_(0.5)
    models.save(model, root / "ldm.safetensors", "ldm")
    models.save(model, root / "folder", "diffusers")
    models.save(model, root / "native.safetensors")
    state = load_file(root / "ldm.safetensors")
    torch.save({"state_dict": state}, root / "pickle.ckpt")
    raw = {key: value for key, value in state.items() if key.startswith("model.")}
    average = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": value + 1 for key, value in raw.items()
    }
    save_file(state | average, root / "averaged.safetensors")
    return root


@pytest.fixture(scope="module")
def measured(files: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What the program says of loading each, in one process."""
    counts = [
        LOADS if case in (("ldm.safetensors", "stored"), ("folder", "bfloat16")) else 0 for case in CASES
    ]
    arguments = [
        text
        for (kind, dtype), count in zip(CASES, counts, strict=True)
        for text in (str(files / kind), dtype, str(count))
    ]
    program = [sys.executable, "-m", "tests.models.files.memory", *arguments]
    done = subprocess.run(
        program,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_the_peak_is_the_model_and_one_tensor(
    kind: str, dtype: str, measured: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """At most, plus a tenth of the model; as stored and cast, in every layout, and beside weights that are
    not taken."""
    found = measured[kind, dtype]
    assert found["model"] > 100e6 * (2 if dtype == "float32" else 1)
    assert found["peak"] <= 1.1 * found["model"] + found["largest"]


@pytest.mark.parametrize(("kind", "dtype"), [("ldm.safetensors", "stored"), ("folder", "bfloat16")])
def test_many_loads_take_no_more_than_one(
    kind: str, dtype: str, measured: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """What is not kept is given back: from the second of ten loads to the last, less than a hundredth of the
    model is added."""
    found = measured[kind, dtype]
    assert len(found["after"]) == LOADS
    assert found["after"][-1] - found["after"][1] < 0.01 * found["model"]
