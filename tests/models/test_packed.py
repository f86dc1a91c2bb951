"""Packed weights: their values against GGML's own package and explicit formulas, to the last bit; and the
layers that hold them."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.layers import packed
from models.layers.finite import find_nonfinite
from models.layers.packed import (
    BLOCKS,
    FLOAT8,
    MAX_UNPACKED,
    Packed,
    PackedLinear,
    pack,
    unpack_blocks,
    unpack_float8,
    weight_bytes,
)
from models.model import Model, build

HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q8_0": (0,),
}  # where a block has its float16s
KINDS = ["fp8", "fp8 of rows", "Q8_0", "Q4_K"]


def random_blocks(packing: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Bytes (rows, bytes of a row): any at all, but for the float16s, which are finite, of every size, and of
    either sign."""
    kind, generator = BLOCKS[packing], torch.Generator().manual_seed(seed)
    data = torch.randint(
        0, 256, (rows * columns // kind.values, kind.size), dtype=torch.uint8, generator=generator
    )
    for at in HALVES.get(packing, (0, 2)):
        halves = torch.randn(len(data), 1, generator=generator) * 10 ** (
            8 * torch.rand(len(data), 1, generator=generator) - 7
        )
        data[:, at : at + 2] = halves.half().view(torch.uint8)
    return data.view(rows, -1)


def random_packed(kind: str, rows: int, columns: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    if kind in BLOCKS:
        data = random_blocks(kind, rows, columns, seed).view(-1, BLOCKS[kind].size)
        for at in HALVES.get(kind, (0, 2)):  # small ones, for sums that are rounded alike
            data[:, at : at + 2] = (
                (torch.rand(len(data), 1, generator=generator) / 1000).half().view(torch.uint8)
            )
        return Packed(kind, data.view(rows, -1))
    scale = torch.tensor(0.37) if kind == "fp8" else torch.rand(rows, 1, generator=generator) + 0.5
    return Packed("fp8", torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn), scale)


@pytest.mark.parametrize("packing", BLOCKS)
def test_blocks_equal_those_of_ggml(packing: str) -> None:
    """Any bytes, to the last bit; as its package says how large a block is."""
    kind = gguf.GGMLQuantizationType[packing]
    assert gguf.GGML_QUANT_SIZES[kind] == (BLOCKS[packing].values, BLOCKS[packing].size)
    data = random_blocks(packing, 64, 2048)
    wanted = gguf.dequantize(data.numpy(), kind)
    assert np.isfinite(wanted).all()
    assert np.array_equal(
        unpack_blocks(packing, data).numpy().reshape(64, 2048).view(np.int32), wanted.view(np.int32)
    )
    assert np.array_equal(Packed(packing, data).dense().numpy().view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("packing", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weights_that_ggml_packed(packing: str) -> None:
    """Come back as its package gives them back, and near to what they were."""
    kind = gguf.GGMLQuantizationType[packing]
    weight = np.random.default_rng(0).normal(size=(96, 320)).astype(np.float32)
    data = gguf.quantize(weight, kind)
    found = Packed(packing, torch.from_numpy(data)).dense()
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(data, kind)))
    step = (
        np.abs(weight).reshape(96, -1, 32).max(axis=2).max()
        * {"8": 1 / 127, "5": 1 / 15, "4": 1 / 7}[packing[1]]
    )
    assert np.abs(found.numpy() - weight).max() <= step


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_8_bit_float(dtype: torch.dtype) -> None:
    """All 256, as torch converts them, times scales of any size: what is infinite or no number stays it."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    for scale in (1.0, 0.3, 2.0**-140, 1e30):
        found, wanted = unpack_float8(values, torch.tensor(scale)), values.float() * torch.tensor(scale)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(0, 1, 2), wanted.nan_to_num(0, 1, 2))
    scales = torch.rand(100, 1)
    assert torch.equal(unpack_float8(values[:100, None], scales), values[:100, None].float() * scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_layer_is_the_layer_of_its_unpacked_weight(
    kind: str, bias: bool, dtype: torch.dtype
) -> None:
    """In the dtype of x, to the last bit."""
    weight = random_packed(kind, 96, 512)
    plain = nn.Linear(512, 96, bias).to(dtype)
    plain.weight = nn.Parameter(weight.dense().to(dtype))
    layer = PackedLinear(weight, plain.bias)
    x = torch.randn(2, 5, 512, dtype=dtype)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.dense(dtype), plain.weight)
    assert (layer.in_features, layer.out_features) == (512, 96)


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are unpacked at once, and gradients reach x."""
    weight, x = random_packed(kind, 96, 512), torch.randn(3, 512, dtype=torch.float64, requires_grad=True)
    bias = nn.Parameter(torch.randn(96, dtype=torch.float64))
    layer, dense = PackedLinear(weight, bias), weight.dense(torch.float64)
    monkeypatch.setitem(packed.MAX_UNPACKED, "cpu", 512 * 7)
    monkeypatch.setattr(packed, "CHUNK", 512 * 3)
    assert torch.equal(weight.dense(torch.float64), dense)
    out = layer(x)
    torch.testing.assert_close(out, x @ dense.T + bias, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, dense.sum(0).expand(3, -1), rtol=1e-12, atol=1e-12)


def bits(value: Tensor) -> Tensor:
    return value.view(torch.uint8 if value.itemsize == 1 else torch.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_casts_leave_the_packed_weight_alone(kind: str) -> None:
    """Of all that a module can be cast to; copies, moves and state dicts keep it as it is."""
    weight = random_packed(kind, 64, 256)
    layer = nn.Sequential(PackedLinear(weight, nn.Parameter(torch.zeros(64))))
    before = {
        key: (value.dtype, bits(value).clone())
        for key, value in layer.state_dict().items()
        if "bias" not in key
    }
    for cast in (
        layer.half,
        layer.double,
        layer.bfloat16,
        lambda: layer.to(torch.float16),
        lambda: layer.to("cpu", torch.float32),
    ):
        cast()
        for key, (dtype, value) in before.items():
            assert layer.state_dict()[key].dtype == dtype
            assert torch.equal(bits(layer.state_dict()[key]), value)
    assert layer[0].bias.dtype == torch.float32
    layer.half()
    assert layer[0].bias.dtype == torch.float16
    x = torch.randn(2, 256).half()
    wanted = layer(x)
    empty = copy.deepcopy(layer).to("meta")
    assert {value.device.type for value in empty.state_dict().values()} == {"meta"}
    assert {key: value.dtype for key, value in empty.state_dict().items()} == {
        key: value.dtype for key, value in layer.state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    empty.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    assert torch.equal(empty(x), wanted)


class InParts(nn.Linear):
    """A linear layer with a forward of its own, as a modulation is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(super().forward(x).chunk(2, dim=-1))


def test_packing_layers_of_a_network() -> None:
    """In their place, on the meta device or not; a layer of a class of its own goes on to be of that."""
    weight = random_packed("Q8_0", 64, 32)
    with torch.device("meta"):
        network = nn.ModuleDict(
            {"a": nn.Linear(32, 64), "b": InParts(32, 64, bias=False), "c": nn.Linear(32, 64)}
        )
    network["a"].bias = nn.Parameter(torch.ones(64))
    network["c"] = nn.Linear(32, 64)
    x = torch.randn(3, 32)
    for name in "abc":
        pack(network, name, weight)
        assert isinstance(network[name], PackedLinear)
    assert torch.equal(network["a"](x), nn.functional.linear(x, weight.dense(), torch.ones(64)))
    assert isinstance(network["b"], InParts)
    assert torch.equal(network["b"](x), torch.stack((x @ weight.dense().T).chunk(2, dim=-1)))
    assert sorted(network.state_dict()) == ["a.bias", "a.packed", "b.packed", "c.bias", "c.packed"]
    assert weight_bytes(network) == 64 * 34 + 2 * 64 * 4  # the weight is shared
    assert weight.nbytes == 64 * 34
    assert "packing=Q8_0" in repr(network)
    pack(network, "a", random_packed("fp8", 64, 32))  # anew
    assert network["a"].packing == "fp8"
    for name, message in (
        ("d", "there is no layer 'd'"),
        ("", "only linear layers can be packed, and  is a ModuleDict"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(network, name, weight)
    with pytest.raises(ValueError, match=r"a is \(64, 32\), and the packed weight \(64, 64\)"):
        pack(network, "a", random_packed("Q8_0", 64, 64))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("fp8", "Q8_0", "Q4_K") else pytest.mark.slow)
        for kind in ("fp8", "fp8 of rows", *BLOCKS)
    ],
)
def test_compiled_whole(kind: str) -> None:
    """One graph, without a break; the other kinds are unpacked by the same operations."""
    torch._dynamo.reset()
    layer, x = PackedLinear(random_packed(kind, 32, 256), nn.Parameter(torch.randn(32))), torch.randn(4, 256)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_looks_at_all_weights(tmp_path: Path) -> None:
    """The check for what is not finite, and the fingerprint, which differs where a packed bit does."""
    model = build(
        {
            "network": {"name": "dit", "in_channels": 1, "hidden": 64, "depth": 1, "heads": 2},
            "schedule": {"name": "flow"},
            "prediction": "flow",
        }
    )
    name, layer = next(
        (name, layer)
        for name, layer in model.network.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features == 64
    )
    prints = set()
    for kind in ("fp8", "Q8_0"):
        weight = random_packed(kind, layer.out_features, 64)
        pack(model.network, name, weight)
        model.check_finite()
        prints |= {model.fingerprint}
        weight.data.view(torch.uint8)[0, 5] ^= 1
        prints |= {model.fingerprint}
    assert len(prints) == 4
    weight = random_packed("fp8", layer.out_features, 64)
    weight.data.view(torch.uint8)[3, 3] = 0x7F
    pack(model.network, name, weight)
    assert find_nonfinite(model.network) == f"{name}.packed"
    assert isinstance(model, Model)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_single_block(kind: str) -> None:
    """Which calls itself contiguous wherever it begins: at any even byte of a file, where its size leads
    to."""
    data = torch.zeros(2 + BLOCKS[kind].size, dtype=torch.uint8)
    data[2:] = random_blocks(kind, 1, BLOCKS[kind].values).flatten()
    expected = gguf.dequantize(data[2:].numpy()[None], gguf.GGMLQuantizationType[kind])
    assert np.array_equal(unpack_blocks(kind, data[2:]).numpy(), expected, equal_nan=True)


def test_pieces_of_a_weight_suit_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows come in whole numbers of what its products take at once."""
    monkeypatch.setitem(MAX_UNPACKED, "cpu", 300 * 64)
    weight, x = random_packed("Q8_0", 700, 64), torch.randn(2, 64)
    pieces: list[tuple[int, int]] = []
    layer = PackedLinear(weight)

    def product(x: Tensor, start: int, stop: int) -> Tensor:
        pieces.append((start, stop))
        return x.new_zeros(2, min(stop, 700) - start)

    monkeypatch.setattr(layer, "_product", product)
    assert layer(x).shape == (2, 700)
    assert pieces == [(0, 256), (256, 512), (512, 768)]
