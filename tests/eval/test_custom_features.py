"""Extractors of one's own and of digits, and what names weights that came from no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from eval.features.custom import Custom
from eval.features.digits import DigitClassifier, DigitFeatures, train_classifier
from eval.features.sizes import by_size
from eval.features.weights import sha256_of_tensors
from train.data import TensorData


def pictures(n: int, *size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(n)]


def colours(batch: Sequence[Tensor]) -> Tensor:
    """The mean colour of each, 0 ... 1."""
    return torch.stack([picture.float().mean((1, 2)) / 255 for picture in batch])


def custom(fn: Callable[[Tensor], Tensor], weights: str | None = None) -> Custom:
    return Custom(fn, name="mine", prepared="mean colour", width=2, prepare=colours, weights=weights)


def test_order_is_kept_over_sizes() -> None:
    """One call per size, and rows in the order of the pictures."""
    mixed = [picture for pair in zip(pictures(3, 4, 4), pictures(3, 5, 2), strict=True) for picture in pair]
    calls: list[torch.Size] = []

    def mean(batch: Tensor) -> Tensor:
        calls.append(batch.shape)
        return batch.float().mean((2, 3))

    torch.testing.assert_close(by_size(mixed, mean), colours(mixed) * 255)
    assert calls == [(3, 3, 4, 4), (3, 3, 5, 2)]


def test_the_hash_names_values_names_and_shapes() -> None:
    """Equal tensors, equal hash; one bit, another shape, name or dtype, another hash; the order of making
    does not matter."""
    network = nn.Linear(3, 2)
    same = nn.Linear(3, 2)
    same.load_state_dict(network.state_dict())
    assert sha256_of_tensors(network.state_dict()) == sha256_of_tensors(same.state_dict())
    with torch.no_grad():
        same.bias[0] = torch.nextafter(same.bias[0], torch.tensor(torch.inf))
    turned = nn.Module()
    turned.weight, turned.bias = nn.Parameter(network.weight.detach().reshape(3, 2)), network.bias
    reordered = nn.Module()
    reordered.bias, reordered.weight = network.bias, network.weight
    renamed = nn.Sequential(network)
    assert sha256_of_tensors(reordered.state_dict()) == sha256_of_tensors(network.state_dict())
    others = [same, turned, renamed, nn.Linear(3, 2).bfloat16()]
    assert len({sha256_of_tensors(module.state_dict()) for module in (network, *others)}) == 5


def test_a_module_of_ones_own() -> None:
    """Its rows in float32, in inference, named by its tensors and by what was said of the preparation."""
    linear = nn.Linear(3, 2).double()
    network = nn.Sequential(linear, nn.Dropout(0.5))
    extractor = Custom(
        network, name="mine", prepared="mean colour", width=2, prepare=lambda batch: colours(batch).double()
    )
    batch = pictures(4, 6, 7)
    rows = extractor(batch, ["features"])["features"]
    expected = colours(batch) @ linear.weight.float().T + linear.bias.float()
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)
    assert not rows.requires_grad
    assert (extractor.identity.network, extractor.identity.prepared) == ("mine", "mean colour")
    assert extractor.identity.weights == custom(network).identity.weights
    with pytest.raises(ValueError, match="mine gives features, not 'pool'"):
        extractor(batch, ["pool"])


def test_a_function_of_ones_own() -> None:
    """It has no tensors, so that its weights must be named; then it is an extractor as any."""
    with pytest.raises(ValueError, match="mine has no tensors to identify its weights by: give weights="):
        custom(lambda x: x[:, :2])
    with pytest.raises(ValueError, match="has no tensors"):
        custom(nn.Identity())
    extractor = custom(lambda x: x[:, :2], weights="version 3")
    assert (extractor.identity.weights, extractor.device) == ("version 3", torch.device("cpu"))
    assert torch.equal(
        extractor(pictures(2, 3, 3), ["features"])["features"], colours(pictures(2, 3, 3))[:, :2]
    )


@pytest.mark.parametrize(
    ("fn", "found"),
    [
        (lambda x: x, r"torch.float32 of shape \(4, 3\)"),
        (lambda x: x[:3, :2], r"torch.float32 of shape \(3, 2\)"),
        (lambda x: x[:, :2, None], r"torch.float32 of shape \(4, 2, 1\)"),
        (lambda x: x[:, :2].int(), r"torch.int32 of shape \(4, 2\)"),
        (lambda x: x.tolist(), "a list"),
    ],
)
def test_what_is_no_row_of_features_is_refused(fn: Callable[[Tensor], Tensor], found: str) -> None:
    """Another width, fewer rows, more dimensions, whole numbers, no tensor: one line says what came and what
    would be right."""
    with pytest.raises(
        ValueError,
        match=rf"mine must give floating point of shape \(4, 2\), \(pictures, width\), not {found}",
    ):
        custom(fn, weights="x")(pictures(4, 3, 3), ["features"])


def test_digits() -> None:
    """All outputs equal the classifier's own on grey pictures in -1 ... 1; ten classes; other sizes are
    refused."""
    network = DigitClassifier()
    extractor = DigitFeatures(network)
    grey = [picture[:1].expand(3, -1, -1) for picture in pictures(5, 8, 8)]
    images = torch.stack([picture[:1] for picture in grey]).float() / 127.5 - 1
    found = extractor(grey, ["features", "logits", "pixels"])
    torch.testing.assert_close(found["features"], network.features(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["logits"], network(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pixels"], images.flatten(1), rtol=0, atol=1e-6)
    assert extractor.widths == {"features": 64, "logits": len(extractor.classes), "pixels": 64}
    assert list(extractor(grey, ["logits"])) == ["logits"]
    assert extractor.identity.weights == sha256_of_tensors(network.state_dict())
    with pytest.raises(ValueError, match=r"takes pictures of 8x8 pixels, \(3, 8, 8\), not \(3, 8, 9\)"):
        extractor([*grey, *pictures(1, 8, 9)], ["features"])


def test_digits_are_trained_alike() -> None:
    """The same digits, the same weights; its logits tell dark pictures from bright ones, which stand for two
    digits."""
    labels = torch.arange(100) % 2
    images = (
        torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1
        + (labels * 1.0 - 0.5)[:, None, None, None]
    )
    data = TensorData(images, labels)
    extractor = DigitFeatures(train_classifier(data))
    assert extractor.identity == DigitFeatures(train_classifier(data)).identity
    two = [torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (64, 191)]
    assert extractor(two, ["logits"])["logits"].argmax(1).tolist() == [0, 1]
