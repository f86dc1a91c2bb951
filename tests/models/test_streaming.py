"""Small memory, from files to images: packed files equal dense ones of their unpacked values, streamed networks those that stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from models import Model, T5Tokenizer, streaming
from models.checkpoints import t5_keys
from models.checkpoints.table import scatter
from models.packed import BLOCKS, PackedLinear, memory
from models.presets import TINY_TOWERS, randomise, tiny_description
from models.streaming import Streamed, in_words, is_streamed, parse_bytes, resident
from models.t5 import T5Params
from samplers import generate
from tests.models.test_packed import random_packed

WIDE = T5Params(vocab=256, width=256, layers=3, heads=4, head_dim=64, hidden=512)  # whose matrices divide into the largest blocks
NETWORKS: dict[str, dict[str, Any]] = {
    "flux-dev": {"hidden": 256, "heads": 2, "axes": (16, 56, 56), "depth": 2, "depth_single": 2},
    "sd3.5-medium": {"depth": 3, "heads": 4, "dual": 1},
}
EIGHT = torch.float8_e4m3fn
KINDS = ("fp8", "all fp8", "all in one", "Q8_0", "K")
SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2, "seeds": [3]}
Tensors = dict[str, Tensor]


@cache
def source(family: str) -> Model:
    model = models.build(tiny_description(family, TINY_TOWERS | {"t5": WIDE}, **NETWORKS[family]))
    model.preview = None
    model.require("text").t5_tokenizer = T5Tokenizer.of_letters()
    generator = torch.Generator().manual_seed(0)
    for part in model.parts.values():
        randomise(part, generator)
    return model.to(dtype=torch.bfloat16)


def matrices(tensors: Mapping[str, Tensor]) -> list[str]:
    """Those of the blocks, but for T5's table of distances."""
    found = [key for key, value in tensors.items() if value.ndim == 2 and re.search(r"block|\bblk\.", key)]
    return [key for key in found if tensors[key].shape[1] % 256 == 0]


def fp8(tensors: Tensors, plain: bool = False) -> tuple[Tensors, Tensors]:
    """A file in 8 bits, scaled for a matrix or for each of its rows, or all of it without scales; and what its values are."""
    file, values = dict(tensors), dict(tensors)
    for i, key in enumerate(list(tensors) if plain else matrices(tensors)):
        value = tensors[key].float()
        scale = torch.ones(()) if plain else (value.abs().amax(dim=1, keepdim=True) if i % 2 else value.abs().max()) / 448
        file[key] = (value / scale).to(EIGHT)
        values[key] = (file[key].float() * scale).bfloat16()
        if not plain:
            file[key.removesuffix("weight") + ("scale_weight" if i % 3 else "weight_scale")] = scale
    return file, values


def blocks(tensors: Tensors, kinds: tuple[str, ...], path: Path) -> Tensors:
    """Writes a GGUF file of random blocks, with GGML's package, and gives the values that it says are in them."""
    values, writer, chosen = dict(tensors), gguf.GGUFWriter(path, "any"), matrices(tensors)
    for i, (key, value) in enumerate(tensors.items()):
        if key in chosen:
            kind = kinds[i % len(kinds)]
            packed = random_packed(kind, *value.shape, seed=i).data.numpy()
            dense = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]))
            values[key] = dense.bfloat16()
            writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
        elif value.ndim < 2:  # converters keep these in float32
            writer.add_tensor(key, value.float().numpy())
        else:
            data = value.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


class Files:
    """Files of both families, each written when it is first asked for: packed, and with the same values in bfloat16."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, dict[tuple[str, str], tuple[list[Path], list[Path]]]()

    def parts(self, family: str, layout: Any = "separate") -> Path:
        place = self.root / family / layout
        if not place.exists():
            models.save(source(family), place, layout)
        return place

    def __call__(self, family: str, kind: str) -> tuple[list[Path], list[Path]]:
        """The paths to load of a kind, and of its values."""
        if (family, kind) not in self.made:
            self.made[family, kind] = self._make(family, kind, self.root / f"{family} {kind}")
        return self.made[family, kind]

    def _make(self, family: str, kind: str, place: Path) -> tuple[list[Path], list[Path]]:
        if kind in ("separate", "diffusers"):
            place = self.parts(family, kind)
            paths = [place] if kind == "diffusers" else sorted(place.iterdir())
            return paths, paths
        separate, big = self.parts(family), (f"{family}.safetensors", "t5xxl.safetensors")
        others = [path for path in sorted(separate.iterdir()) if path.name not in big]
        place.mkdir()
        packed, dense = [], []
        for name in big:
            tensors = load_file(separate / name)
            if kind in ("Q8_0", "K"):
                if name.startswith("t5"):
                    state = source(family).require("text").tower("t5").state_dict()
                    tensors = scatter(t5_keys.llama().table(state), state)
                packed.append(place / name.replace("safetensors", "gguf"))
                values = blocks(tensors, ("Q8_0",) if kind == "Q8_0" else ("Q4_K", "Q5_K", "Q6_K"), packed[-1])
            else:
                file, values = fp8(tensors, plain=kind == "all fp8")
                if kind == "all in one" and name == big[0]:
                    file = {f"model.diffusion_model.{key.removeprefix('model.diffusion_model.')}": value for key, value in file.items()}
                    file |= {"scaled_fp8": torch.empty(2).to(EIGHT)}
                packed.append(place / name)
                save_file(file, packed[-1])
            dense.append(place / f"dense-{name}")
            save_file({key: value.contiguous() for key, value in values.items()}, dense[-1])
        return packed + others, dense + others


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def told(model: Model, batch: int = 2) -> dict[str, Tensor]:
    """What the network is given beside its size: noise, times, and conditions of no meaning."""
    generator = torch.Generator().manual_seed(1)
    p: Any = model.network.params
    shapes = {"x": (batch, p.in_channels, 8, 12), "context": (batch, 7, p.context_dim), "vector": (batch, p.vector_dim)}
    dtype = next(model.network.parameters()).dtype
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    guidance = {"guidance": torch.full((batch,), 3.5)} if p.guidance_dim else {}
    return {**given, "t": torch.linspace(0.9, 0.1, batch), **guidance}


@torch.no_grad()
def outputs(model: Model, batch: int = 2) -> Tensors:
    """Of the network and of every tower."""
    towers = model.require("text").towers
    ids = torch.arange(5, 5 + batch * 6).view(batch, 6)
    found = {"network": model.network(**told(model, batch)), "t5": towers["t5"](ids)}
    return found | {"clip": torch.stack(towers["clip_l"](ids))}


def same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape)
        assert torch.equal(value, theirs[name]), name


# Packed files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NETWORKS)
def test_packed_files_equal_their_values(family: str, kind: str, files: Files) -> None:
    """Networks and images, to the last bit, of packed weights, of those unpacked while loading, and of a dense file's."""
    packed, dense = files(family, kind)
    model, wanted = models.load(*packed), models.load(*dense)
    layers = {name: layer for name, layer in model.network.named_modules() if isinstance(layer, PackedLinear)}
    linear = {name for name, layer in model.network.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name in linear if name.startswith(("joint.", "single.", "blocks."))} <= layers.keys()
    assert {layer.packing for layer in layers.values()} == {"Q8_0": {"Q8_0"}, "K": {"Q4_K", "Q5_K", "Q6_K"}}.get(kind, {"fp8"})
    for part, dense_part in ((model.network, wanted.network), tuple(each.require("text").tower("t5") for each in (model, wanted))):
        assert {value.dtype for value in part.parameters()} == {torch.bfloat16}
        assert memory(part) < 0.75 * memory(dense_part)
    assert model.report is not None
    assert sum("stay packed as in the file" in note for note in model.report.notes) == 2
    model.check_finite()
    same(outputs(model), outputs(wanted))
    images = generate(wanted, "a corgi", **SMALL)
    assert torch.equal(generate(model, "a corgi", **SMALL), images)
    loose = models.load(*packed, dtype=torch.bfloat16)
    assert not any(isinstance(layer, PackedLinear) for part in loose.parts.values() for layer in part.modules())
    assert loose.fingerprint == wanted.fingerprint != model.fingerprint
