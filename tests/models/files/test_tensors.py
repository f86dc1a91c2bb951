"""The reader of files: every dtype, wherever it lies; memory that is the user's own; and the one pass that
finds what is not finite."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import models
from models.files.stored import DTYPES, EDGE
from models.files.tensors import open_tensors
from models.layers.finite import is_finite
from tests.models.files.damaged import entry, raw


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Values that no dtype rounds away, different from each other where it can."""
    values = torch.arange(math.prod(shape)).reshape(shape) % 8
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """As safetensors wrote it: shapes and dtypes from the header; mapped, read, and cast to another dtype."""
    tensors = {
        "a.b": sample(dtype, 3, 5),
        "scalar": sample(dtype),
        "c": sample(dtype, 2, 1, 4),
        "nothing": sample(dtype, 0, 3),
    }
    save_file(tensors, tmp_path / "file.safetensors", {"format": "pt", "title": "a"})
    file = open_tensors(tmp_path / "file.safetensors")
    assert file.metadata == {"format": "pt", "title": "a"}
    assert file.shapes == {key: tuple(value.shape) for key, value in tensors.items()}
    for key, value in tensors.items():
        stored = file.tensors[key]
        assert (stored.key, stored.dtype) == (key, dtype)
        read, cast = torch.empty(value.shape, dtype=dtype), torch.empty(value.shape, dtype=torch.float64)
        stored.read_into(read)
        stored.read_into(cast)
        for found in (stored.mapped(), read):
            assert found.dtype == dtype
            assert torch.equal(found.double(), value.double())
        assert torch.equal(cast, value.double())


@pytest.mark.parametrize("padding", range(8))
def test_data_at_any_place(padding: int, tmp_path: Path) -> None:
    """Headers of other writers end anywhere, so that a tensor may begin where no number of its size can be
    viewed."""
    a, b = sample(torch.float32, 3), sample(torch.float16, 5)
    header = json.dumps({"a": entry([3], 0, 12), "b": entry([5], 12, 22, "F16")}).encode() + b" " * padding
    data = b"".join(bytes(value.view(torch.uint8).tolist()) for value in (a, b))
    (tmp_path / "file.safetensors").write_bytes(raw(header, data))
    file = open_tensors(tmp_path / "file.safetensors")
    for key, value in {"a": a, "b": b}.items():
        assert torch.equal(file.tensors[key].mapped(), value)
        read = torch.empty_like(value)
        file.tensors[key].read_into(read)
        assert torch.equal(read, value)


def test_a_mapped_tensor_is_the_users_own(tmp_path: Path) -> None:
    """Written to, neither the file changes nor what is mapped next; copied or pickled, it takes nothing else
    of the file along."""
    path = tmp_path / "file.safetensors"
    save_file({"large": torch.zeros(1 << 20), "small": torch.ones(4)}, path)
    before = path.read_bytes()
    small = open_tensors(path).tensors["small"].mapped()
    assert small.untyped_storage().nbytes() == 16
    small.add_(1)
    assert torch.equal(open_tensors(path).tensors["small"].mapped(), torch.ones(4))
    assert path.read_bytes() == before
    buffer = io.BytesIO()
    torch.save(small, buffer)
    assert len(buffer.getvalue()) < 4096
    assert copy.deepcopy(small).untyped_storage().nbytes() == 16
    path.unlink()
    assert torch.equal(small, torch.full((4,), 2.0))


def test_a_file_that_shrinks_between_looking_and_reading(tmp_path: Path) -> None:
    """Another program writes it anew: one line, and no crash."""
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    stored = open_tensors(path).tensors["a"]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"file\.safetensors is damaged: it ends within a"):
        stored.read_into(torch.empty(1000))
    with pytest.raises(
        ValueError, match=r"file\.safetensors cannot be mapped .* has it changed since it was opened"
    ):
        stored.mapped()


def test_pickles(tmp_path: Path) -> None:
    """Names of tables within the table are joined; numbers are kept apart; what is no tensor is left out."""
    content = {
        "a": {"b": torch.ones(2), "note": "text"},
        "c": torch.zeros(3).int(),
        "step": 7,
        "loss": 0.5,
        "name": "model",
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        file = open_tensors(tmp_path / "file.pt")
        assert file.shapes == {"a.b": (2,), "c": (3,)}
        assert file.numbers == {"step": 7, "loss": 0.5}
        assert torch.equal(file.tensors["a.b"].mapped(), torch.ones(2))
        cast = torch.empty(3)
        file.tensors["c"].read_into(cast)
        assert torch.equal(cast, torch.zeros(3))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_pickles_of_trainers(wrapper: str, tmp_path: Path) -> None:
    """Tensors that lie under a name of their own have the names that they have there; NumPy's numbers are
    numbers."""
    content = {
        wrapper: {"model.a": torch.ones(2)},
        "global_step": np.int64(7),
        "loss": np.float32(0.5),
        "optimizer": {"lr": 1},
    }
    torch.save(content, tmp_path / "file.ckpt")
    file = open_tensors(tmp_path / "file.ckpt")
    assert file.shapes == {"model.a": (2,)}
    assert file.numbers == {"global_step": 7.0, "loss": 0.5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_finite_or_not(dtype: torch.dtype) -> None:
    """All 65,536 bit patterns, at every place in turn of a row that is too long for one vector register and
    too short for two."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    row = torch.zeros(37, dtype=dtype)
    for i, (value, finite) in enumerate(zip(patterns, patterns.isfinite().tolist(), strict=True)):
        row[i % 37] = value
        assert is_finite(row) == finite
        row[i % 37] = 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_anywhere(value: float, dtype: torch.dtype) -> None:
    """In tensors of many lengths and shapes, among values of any size; the largest finite ones do not count
    as infinite."""
    largest = torch.finfo(dtype).max
    for size in (*range(1, 70), 4097):
        values = torch.full((size,), largest, dtype=dtype) * (-1) ** torch.arange(size)
        assert is_finite(values)
        for place in {0, size // 2, size - 1}:
            values[place] = value
            assert not is_finite(values)
            assert not is_finite(values[:, None].expand(size, 2))
            values[place] = 0
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.tensor([3, 4]))


def test_what_is_not_finite_is_told_from_what_is_too_large(tmp_path: Path) -> None:
    """A value that the dtype asked for cannot hold is no damage."""
    path = tmp_path / "file.safetensors"
    save_file(
        {
            "large": torch.tensor([1e5]),
            "nan": torch.tensor([math.nan]),
            "eight": torch.tensor([math.nan]).to(torch.float8_e4m3fn),
        },
        path,
    )
    tensors = open_tensors(path).tensors
    assert tensors["large"].take(torch.bfloat16).item() == 99840
    with pytest.raises(
        ValueError, match=r"holds values in large that are too large for torch\.float16: choose another dtype"
    ):
        tensors["large"].take(torch.float16)
    for key in ("nan", "eight"):
        with pytest.raises(ValueError, match=rf"is damaged: {key} holds values that are not finite"):
            tensors[key].take(torch.float16)


def test_of_mapped_pages_the_ends_are_looked_at(tmp_path: Path) -> None:
    """So that opening a file does not read it; a value in between is found where it is converted, and by who
    reads all."""
    path = tmp_path / "file.safetensors"
    for place, seen in (
        (0, True),
        (EDGE - 1, True),
        (EDGE, False),
        (5 * EDGE, False),
        (9 * EDGE, True),
        (10 * EDGE - 1, True),
    ):
        values = torch.zeros(10 * EDGE)
        values[place] = math.nan
        save_file({"a": values}, path)
        stored = open_tensors(path).tensors["a"]
        for dtype in (torch.float32, torch.float16):
            with (
                pytest.raises(ValueError, match="is damaged: a holds")
                if seen or dtype == torch.float16
                else contextlib.nullcontext()
            ):
                stored.take(dtype)


@pytest.mark.parametrize("layout", ["native", "ldm", "diffusers"])
def test_who_reads_all_names_weight_and_file(
    layout: Literal["native", "ldm", "diffusers"], tmp_path: Path
) -> None:
    """In every layout."""
    model = models.miniature("sd1")
    lost = "time.fc2.weight"
    weight = model.network.state_dict()[lost]
    assert weight.numel() > 2 * EDGE
    weight.view(-1)[EDGE] = math.inf
    path = tmp_path / "model.safetensors" if layout != "diffusers" else tmp_path / "model"
    models.save(model, path, layout)
    file = path / "unet" / "diffusion_pytorch_model.safetensors" if layout == "diffusers" else path
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(file))} is damaged: the backbone's weight '{lost}' holds"
    ):
        models.load(path).check_finite()
