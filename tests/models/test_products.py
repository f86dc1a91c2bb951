"""Linear layer and convolution against torch's own, by every way a CPU may take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import products
from models.products import Conv2d, Linear, UpConv2d, best_layout

HALVES = [torch.bfloat16, torch.float16]
SHAPES = {  # of convolutions, by kernel, stride, padding, dilation, groups
    "3x3": (3, 1, 1, 1, 1),
    "stride": (3, 2, 1, 1, 1),
    "even": (2, 2, 0, 1, 1),
    "wide": (3, 1, 2, 2, 1),
    "1x1": (1, 1, 0, 1, 1),
    "groups": (3, 1, 1, 1, 4),
}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 3), (6, 4), (9, 11)])  # few pixels and many
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_convolution_and_gradients_equal_those_of_torch(
    shape: tuple[int, int, int, int, int], bias: bool, size: tuple[int, int], layout: torch.memory_format
) -> None:
    """Whatever the number of pixels and the layout of the image; the output keeps the layout."""
    kernel, stride, padding, dilation, groups = shape
    layer = Conv2d(16, 12, kernel, stride, padding, dilation, groups, bias).double()
    x = normal(2, 16, *size).to(memory_format=layout).requires_grad_()
    out, expected = layer(x), F.conv2d(x, layer.weight, layer.bias, stride, padding, dilation, groups)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.is_contiguous(memory_format=layout)
    weight = normal(*out.shape)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (out, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_images_of_few_pixels_are_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with fewer pixels, over the batch, than channels; and none with a 1x1 kernel, which is a linear layer already."""
    seen: list[tuple[int, ...]] = []
    unfold = F.unfold

    def watched(x: Tensor, *args: int | tuple[int, ...]) -> Tensor:
        seen.append(tuple(x.shape))
        return unfold(x, *args)

    monkeypatch.setattr(F, "unfold", watched)
    for kernel in (1, 3):
        for batch in (1, 2):
            for size in (3, 4):
                Conv2d(16, 4, kernel, padding=kernel // 2)(torch.zeros(batch, 16, size, size))
    assert seen == [(1, 16, 3, 3)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "transposed"), [((2, 3), False), ((3, 4), True), ((1, 12), True), ((9, 11), True)])
def test_upsampling_is_repetition_and_convolution(
    size: tuple[int, int], transposed: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways, borders included, in value and gradient; the transposed one only where there are as many pixels as channels."""
    ways: list[tuple[int, ...]] = []
    product = F.conv_transpose2d

    def watched(x: Tensor, *args: Tensor | None, **settings: int) -> Tensor:
        ways.append(tuple(x.shape))
        return product(x, *args, **settings)  # type: ignore[arg-type]  # as it is called

    monkeypatch.setattr(F, "conv_transpose2d", watched)
    layer = UpConv2d(12).double()
    x = normal(2, 12, *size).to(memory_format=layout).requires_grad_()
    out = layer(x)
    assert bool(ways) == transposed
    expected = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = normal(*out.shape)
    for mine, theirs in zip(*(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (out, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bias": partial(Linear, 48, 40),
    "none": partial(Linear, 48, 40, bias=False),
    "conv": partial(Conv2d, 48, 40, 3, padding=1),
    "upsampled": partial(UpConv2d, 24),
}


def layer_and_input(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    shape = {"conv": (2, 48, 5, 6), "upsampled": (2, 24, 5, 6)}.get(kind, (3, 7, 48))
    x = normal(*shape, dtype=dtype)
    return LAYERS[kind]().to(dtype), x.requires_grad_()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kind", "at_once"), [*((kind, 2**22) for kind in LAYERS), ("bias", 500), ("none", 500), ("bias", 5)])
def test_half_precision_rounds_once(kind: str, at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the processor's instructions the output is the exact one, rounded; and so are the gradients. In parts as well."""
    monkeypatch.setitem(products.NATIVE, dtype, False)
    monkeypatch.setattr(products, "WIDENED", at_once)
    layer, x = layer_and_input(kind, dtype)
    wide = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    wide_x = x.detach().double().requires_grad_()
    exact = torch.func.functional_call(layer, wide, (wide_x,))
    out = layer(x)
    assert out.dtype == dtype
    weight = normal(*out.shape, dtype=dtype)
    grads = torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])
    exacts = torch.autograd.grad((exact * weight.double()).sum(), [wide_x, *wide.values()])
    for mine, expected in zip([out, *grads], [exact, *exacts], strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_large_weights_are_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many rows at a time as have no more numbers than may exist at once, and at least one."""
    monkeypatch.setitem(products.NATIVE, torch.bfloat16, False)
    seen: list[tuple[int, ...]] = []
    linear = F.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    for at_once in (48 * 40, 48 * 40 - 1, 500, 47):
        monkeypatch.setattr(products, "WIDENED", at_once)
        Linear(48, 40, dtype=torch.bfloat16)(torch.zeros(1, 48, dtype=torch.bfloat16))
    assert seen == [(40, 48), (39, 48), (1, 48), *[(10, 48)] * 4, *[(1, 48)] * 40]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "upsampled"])
def test_half_precision_is_left_to_the_processor(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its instructions nothing is widened: the output is torch's own, bit for bit."""
    monkeypatch.setitem(products.NATIVE, dtype, True)
    layer, x = layer_and_input(kind, dtype)
    parent = nn.Conv2d if kind == "conv" else nn.Linear
    assert torch.equal(layer(x), parent.forward(layer, x))  # type: ignore[arg-type]  # the layer is one of them


def test_layout_is_left_alone_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixel by pixel where the CPU has a unit for products of the dtype; elsewhere as the image comes."""
    for tiles, expected in ((True, torch.channels_last), (False, torch.preserve_format)):
        monkeypatch.setitem(products.TILES, torch.bfloat16, tiles)
        assert best_layout(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)) == expected
        assert best_layout(torch.zeros(1, 1, 1, 1)) == torch.preserve_format
        assert best_layout(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, device="meta")) == torch.preserve_format
