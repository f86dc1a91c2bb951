"""Small memory, from files to images: packed files equal dense ones of their unpacked values, streamed
networks those that stay."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from diffusion import Condition
from models import Model, T5Tokenizer
from models.files.table import scatter
from models.layers import streaming
from models.layers.packed import PackedLinear, is_packed, weight_bytes
from models.layers.streaming import Streamed, format_bytes, is_streamed, parse_bytes, resident_bytes
from models.networks.t5 import T5Params
from models.presets import TINY_TOWERS, randomise, tiny_description
from models.text import t5
from samplers import generate
from tests.models.test_packed import random_packed

WIDE = T5Params(
    vocab=256, width=256, layers=3, heads=4, head_dim=64, hidden=512
)  # whose matrices divide into the largest blocks
NETWORKS: dict[str, dict[str, Any]] = {
    "flux-dev": {"hidden": 256, "heads": 2, "axes": (16, 56, 56), "depth": 2, "depth_single": 2},
    "sd3.5-medium": {"depth": 3, "heads": 4, "dual": 1},
}
ROOT = Path(__file__).parents[2]
EIGHT = torch.float8_e4m3fn
KINDS = ("fp8", "all fp8", "all in one", "Q8_0", "K")
SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 1, "seeds": [3]}
Tensors = dict[str, Tensor]


@cache
def source(family: str) -> Model:
    model = models.build(tiny_description(family, TINY_TOWERS | {"t5": WIDE}, **NETWORKS[family]))
    model.preview = None
    model.require("text").tokenizers["t5"] = T5Tokenizer.of_ascii()
    generator = torch.Generator().manual_seed(0)
    for part in model.parts.values():
        randomise(part, generator)
    return model.to(dtype=torch.bfloat16)


def matrices(tensors: Mapping[str, Tensor]) -> list[str]:
    """Those of the blocks, but for T5's table of distances."""
    found = [key for key, value in tensors.items() if value.ndim == 2 and re.search(r"block|\bblk\.", key)]
    return [key for key in found if tensors[key].shape[1] % 256 == 0]


def fp8(tensors: Tensors, plain: bool = False) -> tuple[Tensors, Tensors]:
    """A file in 8 bits, scaled for a matrix or for each of its rows, or all of it without scales; and what
    its values are."""
    file, values = dict(tensors), dict(tensors)
    for i, key in enumerate(list(tensors) if plain else matrices(tensors)):
        value = tensors[key].float()
        scale = (
            torch.ones(())
            if plain
            else (value.abs().amax(dim=1, keepdim=True) if i % 2 else value.abs().max()) / 448
        )
        file[key] = (value / scale).to(EIGHT)
        values[key] = (file[key].float() * scale).bfloat16()
        if not plain:
            file[key.removesuffix("weight") + ("scale_weight" if i % 3 else "weight_scale")] = scale
    return file, values


def blocks(tensors: Tensors, kinds: tuple[str, ...], path: Path) -> Tensors:
    """Writes a GGUF file of random blocks, with GGML's package, and gives the values that it says are in
    them."""
    values, writer, chosen = dict(tensors), gguf.GGUFWriter(path, "any"), matrices(tensors)
    for i, (key, value) in enumerate(tensors.items()):
        if key in chosen:
            kind = kinds[i % len(kinds)]
            packed = random_packed(kind, value.shape[0], value.shape[1], seed=i).data.numpy()
            dense = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]))
            values[key] = dense.bfloat16()
            writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:  # converters write what they do not pack in float32, whose last bits bfloat16 rounds away
            writer.add_tensor(key, value.float().mul(1 + 2**-12).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


class Files:
    """Files of both families, each written when it is first asked for: packed, and with the same values in
    bfloat16."""

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
                    state = source(family).require("text").towers["t5"].state_dict()
                    tensors = scatter(t5.llama().table(state), state)
                packed.append(place / name.replace("safetensors", "gguf"))
                values = blocks(
                    tensors, ("Q8_0",) if kind == "Q8_0" else ("Q4_K", "Q5_K", "Q6_K"), packed[-1]
                )
            else:
                file, values = fp8(tensors, plain=kind == "all fp8")
                if kind == "all in one" and name == big[0]:
                    file = {
                        f"model.diffusion_model.{key.removeprefix('model.diffusion_model.')}": value
                        for key, value in file.items()
                    }
                    file |= {"scaled_fp8": torch.empty(2).to(EIGHT)}
                packed.append(place / name)
                save_file(file, packed[-1])
            dense.append(place / f"dense-{name}")
            save_file({key: value.contiguous() for key, value in values.items()}, dense[-1])
        return packed + others, dense + others


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def told(model: Model, batch: int = 2) -> tuple[Tensor, Tensor, Condition]:
    """What the network is given: noise, times, and a condition of no meaning."""
    generator = torch.Generator().manual_seed(1)
    p: Any = model.network.params
    shapes = {
        "x": (batch, p.in_channels, 8, 12),
        "context": (batch, 7, p.context_dim),
        "vector": (batch, p.vector_dim),
    }
    dtype = next(model.network.parameters()).dtype
    x, context, vector = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes.values())
    guidance = torch.full((batch,), 3.5) if "guidance" in p.takes else None
    return x, torch.linspace(0.9, 0.1, batch), Condition(context, vector=vector, guidance=guidance)


@torch.no_grad()
def outputs(model: Model, batch: int = 2) -> Tensors:
    """Of the network and of every tower."""
    towers = model.require("text").towers
    ids = torch.arange(5, 5 + batch * 6).view(batch, 6)
    found = {"network": model.network(*told(model, batch)), "t5": towers["t5"](ids)}
    return found | {"clip": torch.stack(towers["clip_l"](ids))}


def same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape)
        assert torch.equal(value, theirs[name]), name


# Packed files -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("native_halves")  # in float32 only a dense file's values would be rounded
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NETWORKS)
def test_packed_files_equal_their_values(family: str, kind: str, files: Files) -> None:
    """Networks and images, to the last bit, of packed weights, of those unpacked while loading, and of a
    dense file's."""
    packed, dense = files(family, kind)
    model, wanted = models.load(*packed), models.load(*dense)
    layers = {name: layer for name, layer in model.network.named_modules() if isinstance(layer, PackedLinear)}
    linear = {name for name, layer in model.network.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name in linear if name.startswith(("joint.", "single.", "blocks."))} <= layers.keys()
    assert {layer.packing for layer in layers.values()} == {
        "Q8_0": {"Q8_0"},
        "K": {"Q4_K", "Q5_K", "Q6_K"},
    }.get(kind, {"fp8"})
    for part, dense_part in (
        (model.network, wanted.network),
        tuple(each.require("text").towers["t5"] for each in (model, wanted)),
    ):
        assert {value.dtype for value in part.parameters()} == {torch.bfloat16}
        assert weight_bytes(part) < 0.75 * weight_bytes(dense_part)
    assert model.report is not None
    assert sum("stay packed as in the file" in note for note in model.report.notes) == 2
    model.check_finite()
    same(outputs(model), outputs(wanted))
    if kind in ("fp8", "K"):
        assert torch.equal(generate(model, "a corgi", **SMALL), generate(wanted, "a corgi", **SMALL))
    wide = models.load(*packed, dtype=torch.float32)  # of what is not packed
    assert {value.dtype for value in wide.network.parameters()} == {torch.float32}
    assert sum(isinstance(layer, PackedLinear) for layer in wide.network.modules()) == len(layers)
    loose = model.unpacked(torch.bfloat16)
    assert not any(
        isinstance(layer, PackedLinear) for part in loose.parts.values() for layer in part.modules()
    )
    assert loose.fingerprint == wanted.fingerprint != model.fingerprint
    with pytest.raises(ValueError, match=r"this model has packed weights: choose dtype="):
        models.save(model, files.root / "never.safetensors")
    models.save(model, files.root / "unpacked.safetensors", dtype=torch.bfloat16)
    assert models.load(files.root / "unpacked.safetensors").fingerprint == wanted.fingerprint


def test_what_a_network_computes_in(files: Files, tmp_path: Path) -> None:
    """In bfloat16, whatever lies beside packed weights, or in what it is told: these stay as they are."""
    file, _ = fp8(load_file(files.parts("flux-dev") / "flux-dev.safetensors"))
    others = [path for path in files("flux-dev", "fp8")[0] if path.name != "flux-dev.safetensors"]
    for dtype in (torch.float16, torch.float32):
        path = tmp_path / f"{dtype}.safetensors"
        save_file(
            {key: value.to(dtype) if value.dtype == torch.bfloat16 else value for key, value in file.items()},
            path,
        )
        plain, told = models.load(path, *others), models.load(path, *others, dtype={"backbone": dtype})
        assert {value.dtype for value in plain.network.parameters()} == {torch.bfloat16}
        assert {value.dtype for value in told.network.parameters()} == {dtype}
        assert {is_packed(model.network) for model in (plain, told)} == {True}
        assert torch.equal(outputs(told)["network"], outputs(plain.to(dtype=dtype))["network"])


def test_infinite_scales_of_blocks_are_found(files: Files, tmp_path: Path) -> None:
    """When all weights are read, in networks that stay and in streamed ones."""
    paths, _ = files("flux-dev", "Q8_0")
    [path] = [path for path in paths if path.name == "flux-dev.gguf"]
    others = [other for other in paths if other != path]
    tensor = next(
        tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "single_blocks.1.linear1.weight"
    )
    content = bytearray(path.read_bytes())
    content[tensor.data_offset + 340 : tensor.data_offset + 342] = b"\x00\x7c"  # of the eleventh block
    (tmp_path / "flux-dev.gguf").write_bytes(content)
    for model in (
        models.load(tmp_path / "flux-dev.gguf", *others),
        streamed([tmp_path / "flux-dev.gguf", *others]),
    ):
        with pytest.raises(
            ValueError,
            match=r"flux-dev\.gguf is damaged: the backbone's weight 'single\.1\.qkv_mlp\.packed' holds "
            r"values",
        ):
            model.check_finite()


# Streamed networks ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets are as in a process that takes no memory itself, which they are not large enough for here."""
    monkeypatch.setattr(streaming, "resident_bytes", lambda: 0)


def least(paths: list[Path], **given: Any) -> str:
    """The smallest budget there is, as the refusal of a smaller one says."""
    with pytest.raises(
        ValueError, match=r"^memory='1KB' is too little for this model: give at least [\d.]+[MG]B$"
    ) as refused:
        models.load(*paths, memory="1KB", **given)
    return str(refused.value).split()[-1]


def streamed(paths: list[Path], **given: Any) -> Model:
    """With as few blocks in memory as can be."""
    model = models.load(*paths, memory=least(paths, **given), **given)
    assert is_streamed(model.network)
    assert is_streamed(model.require("text").towers["t5"])
    return model


@pytest.mark.parametrize("kind", ["separate", "diffusers", "fp8", "K"])
@pytest.mark.parametrize("family", NETWORKS)
def test_streamed_equals_resident(family: str, kind: str, files: Files) -> None:
    """To the last bit: both passes, other batches, a pass after one that was broken off, and images; and it
    is the same model."""
    paths, _ = files(family, kind)
    model, wanted = streamed(paths), models.load(*paths)
    assert len(model.network.state_dict()) < len(wanted.network.state_dict())
    first = outputs(wanted)
    same(outputs(model), first)
    same(outputs(model), first)
    same(outputs(model, 1), outputs(wanted, 1))
    stop = next(
        block
        for block in model.network.modules()
        if isinstance(block, Streamed) and block is not block.chain[0]
    )
    for broken in range(2):
        handle = (stop.streamed[0] if broken else stop).register_forward_pre_hook(_stop)
        with pytest.raises(KeyboardInterrupt):
            outputs(model)
        handle.remove()
        same(outputs(model), first)
    assert model.fingerprint == wanted.fingerprint
    model.check_finite()
    with pytest.raises(ValueError, match=r"blocks of this model are in its files only"):
        models.save(model, files.root / "never")
    if kind in ("diffusers", "K"):
        assert torch.equal(generate(model, "a corgi", **SMALL), generate(wanted, "a corgi", **SMALL))


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["separate", "diffusers", "fp8", "K"])
def test_casts_of_streamed_networks(kind: str, files: Files) -> None:
    """While loading or later, down and up again, with a block on its way: as those that stay."""
    paths, _ = files("flux-dev", kind)
    if kind in ("separate", "diffusers"):
        model, wanted = streamed(paths, dtype=torch.float32), models.load(*paths, dtype=torch.float32)
        same(outputs(model), outputs(wanted))
    model, wanted = streamed(paths), models.load(*paths)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        outputs(model)
        same(outputs(model.to(dtype=dtype)), outputs(wanted.to(dtype=dtype)))
        assert model.fingerprint == wanted.fingerprint


def test_some_blocks_stay(files: Files) -> None:
    """As many as the budget has room for, and all of them where it is large."""
    paths, _ = files("sd3.5-medium", "separate")
    smallest, counts = parse_bytes(least(paths)), []
    wanted = outputs(models.load(*paths))
    for factor in (1, 1.15, 10):
        model = models.load(*paths, memory=int(smallest * factor))
        counts.append(
            sum(isinstance(module, Streamed) for part in model.parts.values() for module in part.modules())
        )
        same(outputs(model), wanted)
    assert counts[0] > counts[1] > counts[2] == 0


def test_files_that_change(files: Files, tmp_path: Path) -> None:
    """One that is cut or deleted after loading is one clear line at the next pass, whoever reads it; put
    back, all is well again."""
    paths, _ = files("flux-dev", "separate")
    copies = [tmp_path / path.name for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    model = streamed(copies)
    wanted, network = outputs(model), tmp_path / "flux-dev.safetensors"
    content = network.read_bytes()
    network.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"flux-dev\.safetensors is damaged: it ends within (double|single)_blocks\.\d"
        ) as cut:
            outputs(model), outputs(model)
        assert "\n" not in str(cut.value)
    network.unlink()
    with pytest.raises(FileNotFoundError, match=r"flux-dev\.safetensors"):
        outputs(model), outputs(model)
    network.write_bytes(content)
    same(outputs(model), wanted)


@pytest.mark.parametrize("wrong", ["six", "-1GB", 0, "0GB", "", "6 apples", "1e9GB", "nan", True, -5])
def test_budgets_that_are_none(wrong: Any, files: Files) -> None:
    with pytest.raises(ValueError, match=r"^memory is a size like '6GB' or '800MB', not "):
        models.load(*files("flux-dev", "separate")[0], memory=wrong)


def test_sizes_in_words() -> None:
    assert [parse_bytes(size) for size in ("6GB", "1.5 gb", "800MB", "2GiB", "17", 17)] == [
        6e9,
        1.5e9,
        8e8,
        2**31,
        17,
        17,
    ]
    assert [format_bytes(size) for size in (1, 3.2e6, 9.999e8, 1.01e9, 2e9)] == [
        "1MB",
        "4MB",
        "1000MB",
        "1.1GB",
        "2GB",
    ]
    assert resident_bytes() > 10**7


# Memory -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A Flux of 620 MB in bfloat16, of whose blocks the largest takes 42 MB, with a small autoencoder and
    small towers."""
    network = {"hidden": 768, "heads": 6, "axes": (16, 56, 56), "depth": 2, "depth_single": 30}
    model = models.build(tiny_description("flux-dev", TINY_TOWERS, **network), device="meta")
    model.preview = None
    generator = torch.Generator().manual_seed(0)
    for part in model.parts.values():
        part.bfloat16().to_empty(device="cpu")
        for value in part.parameters():
            value.data.uniform_(-0.03, 0.03, generator=generator)
    model.require("text").tokenizers["t5"] = T5Tokenizer.of_ascii()
    folder = tmp_path_factory.mktemp("large")
    models.save(model, folder, "separate")
    return sorted(folder.iterdir())


def measured(paths: list[Path], weights: int, count: int) -> dict[str, Any]:
    program = [sys.executable, "-m", "tests.models.streamed", str(weights), str(count), *map(str, paths)]
    done = subprocess.run(
        program,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_the_budget_holds(large: list[Path]) -> None:
    """In a process of its own, from loading to the third image: less than what the process had before and the
    weights together."""
    size = sum(path.stat().st_size for path in large)
    found = measured(large, weights=180_000_000, count=3)
    assert found["peak"] <= found["memory"] < found["before"] + size


@pytest.mark.slow
def test_images_do_not_add_up(large: list[Path]) -> None:
    """Ten of them within the budget, which does not hold where none is given."""
    size = sum(path.stat().st_size for path in large)
    free = measured(large, weights=0, count=2)
    assert free["peak"] - free["before"] > size
    found = measured(large, weights=180_000_000, count=10)
    assert found["peak"] <= found["memory"] < free["peak"]
    assert max(found["after"][5:]) - max(found["after"][:5]) < 0.02 * size


def test_no_gradients_through_blocks_that_come_and_go(files: Files) -> None:
    """Their weights are others by the time a gradient would need them: refused in one line, and nothing is
    kept of the buffers."""
    paths, _ = files("flux-dev", "fp8")
    model = streamed(paths)
    x, t, condition = told(model, 1)
    with pytest.raises(
        ValueError, match=r"a model loaded with memory=\.\.\. has no gradients.*load it without"
    ):
        model.network(x.requires_grad_(), t, condition)
    for call in (model.state_dict, lambda: model.unpacked(torch.float32)):
        with pytest.raises(
            ValueError, match=r"blocks of this model are in its files only: load it without memory"
        ):
            call()
    outputs(model)
    blocks = [module for module in model.network.modules() if isinstance(module, Streamed)]
    assert blocks
    assert {value.device.type for block in blocks for value in block.streamed[0].state_dict().values()} == {
        "meta"
    }
