"""What people look at: images in a notebook, and the few lines that a model shows of itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import models
from models import Report
from samplers import show


def dark(picture: Image.Image, box: tuple[int, int, int, int]) -> bool:
    """Whether there is writing in a part of a picture."""
    return bool((np.asarray(picture.crop(box)) < 128).any())


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_where_they_belong(channels: int) -> None:
    """Magnified by a whole factor, row by row, grey or colour, with white between."""
    images = torch.arange(6).view(6, 1, 1, 1).expand(6, channels, 8, 8) / 5
    picture = np.asarray(show(images, 3))
    assert picture.shape == (4 + 2 * (96 + 4), 4 + 3 * (96 + 4), 3)
    for i in range(6):
        y, x = 4 + i // 3 * 100, 4 + i % 3 * 100
        assert (picture[y : y + 96, x : x + 96] == i * 51).all()
    assert (picture[:4] == 255).all()
    assert np.array_equal(np.asarray(show(2 * images - 1, 3, low=-1.0)), picture)


def test_labels_rows_and_title() -> None:
    """Above each image, before each row, at the top; and large images are made smaller."""
    images = torch.ones(4, 3, 300, 200)
    plain, named = (
        show(images, 2),
        show(images, 2, labels=["a very long label " * 9, 2, 3, 4], rows=["first", "second"], title="Ours"),
    )
    assert plain.size == (4 + 2 * 104, 4 + 2 * 154)
    left = named.width - plain.width
    assert dark(named, (left, 0, named.width, 20))
    assert dark(named, (left, 20, left + 104, 36))
    assert not dark(named, (left + 103, 20, left + 108, 36))  # a long label is cut
    assert dark(named, (0, 60, left, 200))
    assert not dark(plain, (0, 0, *plain.size))


def test_mistakes_are_named() -> None:
    images = torch.zeros(4, 1, 8, 8)
    with pytest.raises(
        ValueError, match=r"show takes images \(N, 1 or 3, H, W\), at least one, not \(8, 8\)"
    ):
        show(images[0, 0])
    with pytest.raises(ValueError, match="labels has 3 texts, but 4 are needed"):
        show(images, labels=[1, 2, 3])
    with pytest.raises(ValueError, match="rows has 1 texts, but 2 are needed"):
        show(images, 2, rows=["one"])


def test_a_model_and_its_report_show_few_lines() -> None:
    lines = repr(models.miniature("sdxl")).splitlines()
    assert (
        lines[0]
        == "Model of Stable Diffusion XL: predicts eps on the schedule scaled_linear, samples 4x16x16"
    )
    assert [line.split()[0] for line in lines[1:]] == ["backbone", "vae", "text", "preview"]
    assert all("M parameters, float32 on cpu" in line for line in lines[1:])
    report = Report(("a",), {f"key {i}": f"reason {i}" for i in range(9)})
    assert len(repr(report).splitlines()) == 6
    assert repr(report).endswith("5 more lines: print(model.report)")
    assert repr(Report(("a",))) == "1 tensors loaded (native layout), 0 ignored"
