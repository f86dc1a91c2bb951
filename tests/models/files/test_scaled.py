"""8-bit weights and their scales, under the names and in the shapes that published files have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.files.scaled import join_scales
from models.files.stored import TensorFile
from models.files.tensors import open_tensors
from models.layers.packed import Packed


def joined(path: Path, tensors: Mapping[str, Tensor]) -> TensorFile:
    save_file(dict(tensors), path / "a.safetensors")
    return join_scales(open_tensors(path / "a.safetensors"))


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (700,), (700, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_weight_and_its_scale_are_one(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """weight * scale in float32, of a matrix larger than what is read at once; packed, both as they lie
    there."""
    weight, scale = torch.randn(700, 4096).to(dtype), torch.rand(shape) + 0.1
    found = joined(tmp_path, {"a.weight": weight, f"a.{name}": scale, "a.bias": torch.ones(700)})
    assert set(found.tensors) == {"a.weight", "a.bias"}
    one = found.tensors["a.weight"]
    assert one.keys == ("a.weight", f"a.{name}")
    assert (one.key, one.shape, one.dtype, one.packing) == ("a.weight", (700, 4096), torch.float32, "fp8")
    wanted = weight.float() * (scale if scale.numel() == 1 else scale.view(-1, 1))
    assert one.packing
    assert one.raw
    packed = Packed(one.packing, one.raw.mapped(), one.scale)
    assert torch.equal(packed.data.view(torch.uint8), weight.view(torch.uint8))
    assert packed.scale is not None
    assert (packed.scale.shape, packed.scale.dtype) == ((700, 1) if scale.numel() > 1 else (), torch.float32)
    for value in (
        one.mapped(),
        packed.dense(),
        torch.cat([chunk.clone() for chunk in one.chunks()]).view(700, 4096),
    ):
        assert torch.equal(value, wanted)
    out = torch.empty(700, 4096, dtype=torch.bfloat16)
    one.read_into(out)
    assert torch.equal(out, wanted.bfloat16())


def test_the_rest_of_such_a_file(tmp_path: Path) -> None:
    """What only products in 8 bits need is left out, and why is said; 8-bit matrices without a scale have the
    scale 1."""
    eight = torch.randn(4, 8).to(torch.float8_e4m3fn)
    tensors = {
        "scaled_fp8": torch.empty(2).to(torch.float8_e4m3fn),
        "model.scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn),
        "a.weight": eight.clone(),
        "a.scale_weight": torch.tensor(2.0).half(),
        "a.scale_input": torch.tensor(3.0),
        "b.weight": eight.clone(),
        "b.input_scale": torch.tensor(3.0),
        "b.comfy_quant": torch.tensor([1], dtype=torch.uint8),
        "conv.weight": torch.randn(4, 2, 3, 3).to(torch.float8_e5m2),
        "conv.weight_scale": torch.tensor([1.0, 2, 3, 4]),
        "kernel.weight": torch.randn(4, 2, 3, 3).to(torch.float8_e5m2),
        "half.weight": torch.randn(4, 8).half(),
        "half.scale_weight": torch.tensor(0.5),
        "weight_scale_of_nothing": torch.ones(3),
    }
    found = joined(tmp_path, tensors)
    assert set(found.ignored) == {
        "scaled_fp8",
        "model.scaled_fp8",
        "a.scale_input",
        "b.input_scale",
        "b.comfy_quant",
    }
    scales = {key for one in found.tensors.values() for key in one.keys[1:]}
    assert scales == {"a.scale_weight", "conv.weight_scale", "half.scale_weight"}
    assert set(found.tensors) | set(found.ignored) | scales == set(tensors)
    packing = {key: one.packing for key, one in found.tensors.items() if one.packing}
    assert packing == {"a.weight": "fp8", "b.weight": "fp8"}
    assert torch.equal(found.tensors["a.weight"].mapped(), eight.float() * 2)
    assert torch.equal(found.tensors["b.weight"].mapped(), eight.float())
    assert torch.equal(found.tensors["half.weight"].mapped(), tensors["half.weight"].float() / 2)
    conv = tensors["conv.weight"].float() * torch.tensor([1.0, 2, 3, 4])[:, None, None, None]
    assert torch.equal(found.tensors["conv.weight"].mapped(), conv)
    assert found.tensors["kernel.weight"].dtype == torch.float8_e5m2


def test_pickled_tensors_are_joined_too(tmp_path: Path) -> None:
    """Whose values come all at once."""
    weight = torch.randn(600, 1000).to(torch.float8_e4m3fn)
    torch.save({"a.weight": weight, "a.scale_weight": torch.arange(1.0, 601)}, tmp_path / "a.pt")
    found = join_scales(open_tensors(tmp_path / "a.pt")).tensors["a.weight"]
    assert torch.equal(found.mapped(), weight.float() * torch.arange(1.0, 601)[:, None])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), r"a\.scale_weight is \(3,\), and a scale of a\.weight must be \(\) or \(4, 1\)"),
        (torch.ones(1, 4), r"a\.scale_weight is \(1, 4\), and"),
        (torch.ones(8), r"a\.scale_weight is \(8,\), and"),
        (torch.tensor(0.0), "a.scale_weight holds a scale that is not a finite number above zero"),
        (torch.tensor(-1.0), "a.scale_weight holds a scale that is not a finite number"),
        (torch.tensor(torch.inf), "a.scale_weight holds a scale that is not a finite number"),
        (torch.tensor([1, 1, torch.nan, 1]), "a.scale_weight holds a scale that is not a finite number"),
        (
            torch.tensor(1),
            r"a\.scale_weight is torch\.int64 and scales torch\.float8_e4m3fn; both must be floats",
        ),
    ],
)
def test_scales_that_are_none(scale: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"a\.safetensors .*{message}"):
        joined(tmp_path, {"a.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "a.scale_weight": scale})


def test_scales_without_a_weight_or_with_two(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a\.safetensors is damaged: b\.scale_weight is a scale, and b\.weight is missing"
    ):
        joined(tmp_path, {"a.weight": torch.ones(4, 8), "b.scale_weight": torch.ones(())})
    with pytest.raises(
        ValueError,
        match=r"a\.safetensors is damaged: a\.scale_weight and a\.weight_scale are scales of the same weight",
    ):
        joined(
            tmp_path,
            {
                "a.weight": torch.ones(4, 8),
                "a.scale_weight": torch.ones(()),
                "a.weight_scale": torch.ones(()),
            },
        )
    with pytest.raises(ValueError, match=r"a\.weight_scale is torch\.float32 and scales torch\.uint8"):
        joined(tmp_path, {"a.weight": torch.ones(4, 8).byte(), "a.weight_scale": torch.ones(4, 1)})
