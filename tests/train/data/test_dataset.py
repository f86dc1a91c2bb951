"""Data sets and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.samplers.test_pictures import encoded, of_colours
from train.data import PictureData, TensorData, digits, shuffled_batches
from train.data.pictures import CaptionedImages
from train.data.reading import read_batches


def paint(path: Path, size: tuple[int, int] = (8, 8), colour: tuple[int, int, int] = (255, 0, 128)) -> Path:
    """An image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_digits_are_split_once_and_for_all() -> None:
    """1,258 to train on and 539 held out, together all digits, none in both by index, 30 % of each class, the same every time."""
    train, held_out, everything = digits(), digits("held_out"), digits("all")
    assert (len(train), len(held_out), len(everything)) == (1258, 539, 1797)
    rows = [sorted(map(tuple, data.images.flatten(1).tolist())) for data in (train, held_out, everything)]
    assert sorted(rows[0] + rows[1]) == rows[2]
    assert not {*rows[0]} & {*rows[1]}  # no two of the images are equal, so that this says all
    assert train.labels is not None
    assert held_out.labels is not None
    assert everything.labels is not None
    counts = [torch.bincount(labels, minlength=10) for labels in (held_out.labels, everything.labels)]
    assert counts[0].tolist() == [round(0.3 * n) for n in counts[1].tolist()]
    assert torch.equal(digits("held_out").images, held_out.images)
    assert not torch.equal(digits("held_out", seed=1).images, held_out.images)
    assert (train.shape, train.num_classes) == ((1, 8, 8), 10)


def test_digits_are_pixels_in_range() -> None:
    """17 grey levels from -1 to 1, float32."""
    images = digits("all").images
    assert images.dtype == torch.float32
    assert torch.equal(images.unique(), torch.arange(17) / 8 - 1)


def test_a_batch_holds_images_and_their_labels() -> None:
    """By index, in the order asked for; without labels there are none."""
    images = torch.arange(5.0).view(5, 1, 1, 1)
    batch = TensorData(images, torch.tensor([4, 3, 2, 1, 0])).__getitems__([3, 0, 3])
    assert batch["x0"].flatten().tolist() == [3, 0, 3]
    assert batch["label"].tolist() == [1, 4, 1]
    assert list(TensorData(images).__getitems__([0])) == ["x0"]
    assert TensorData(images).num_classes is None
    assert TensorData(images, torch.tensor([0, 1, 2, 0, 0])).num_classes == 3


@pytest.mark.parametrize(("labels", "message"), [([0, 3], r"0 \.\.\. 2; found 0 to 3"), ([-1, 2], r"0 \.\.\. 2; found -1 to 2")])
def test_labels_out_of_range_are_refused(labels: list[int], message: str) -> None:
    """Both the range and what was found are named."""
    with pytest.raises(ValueError, match=message):
        TensorData(torch.zeros(2, 1, 1, 1), torch.tensor(labels), 3)


@pytest.mark.parametrize("split", ["test", "held-out", ""])
def test_an_unknown_split_is_refused(split: str) -> None:
    """The three splits are named; no data is no data set."""
    with pytest.raises(ValueError, match="'train', 'held_out' or 'all'"):
        digits(split)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one image"):
        TensorData(torch.zeros(0, 1, 8, 8))


def test_an_image_folder_reads_classes_and_colours(tmp_path: Path) -> None:
    """Subfolders are classes, in alphabetical order where they are names; pixels go from -1 to 1; other files are not looked at."""
    paint(tmp_path / "dog" / "b.png", colour=(255, 0, 51))
    paint(tmp_path / "cat" / "deep" / "a.PNG", colour=(0, 255, 0))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = PictureData(tmp_path)
    assert (data.classes, len(data), data.num_classes, data.shape) == (["cat", "dog"], 2, 2, (3, 8, 8))
    batch = data.__getitems__([1, 0])
    assert batch["label"].tolist() == [1, 0]
    assert batch["x0"].dtype == torch.float32
    torch.testing.assert_close(batch["x0"][:, :, 0, 0], torch.tensor([[1.0, -1.0, -0.6], [-1.0, 1.0, -1.0]]))
    assert PictureData(tmp_path, channels=1).shape == (1, 8, 8)


@pytest.mark.parametrize("size", [(20, 10), (10, 20), (10, 10), (5, 9)], ids=str)
def test_an_image_folder_resizes_and_crops_the_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    """The shorter side becomes `size`, and the middle of the longer one is kept: a mark there stays in the middle."""
    image = Image.new("L", size, 0)
    width, height = size
    image.paste(
        255,
        (width // 2 - (1 if width % 2 == 0 else 0), 0, width // 2 + 1, height)
        if width >= height
        else (0, height // 2 - (height % 2 == 0), width, height // 2 + 1),
    )
    image.save(tmp_path / "a.png")
    data = PictureData(tmp_path, size=8, channels=1)
    assert data.shape == (1, 8, 8)
    picture = data.__getitems__([0])["x0"][0, 0]
    profile = picture.mean(0) if width >= height else picture.mean(1)
    assert abs(float(((profile + 1) * torch.arange(8)).sum() / (profile + 1).sum()) - 3.5) < 0.6
    assert "label" not in data.__getitems__([0])


UNREADABLE: list[tuple[Callable[[Path], None], str]] = [  # what the samplers refuse to read
    (lambda path: Image.fromarray(np.full((8, 8), 300, np.uint16)).save(path), "has pixels of more than 8 bits"),
    (lambda path: Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(path), "is transparent in places: give it a background first"),
    (lambda path: Image.new("1", (14000, 14000)).save(path), "has 14000x14000 = 196,000,000 pixels, more than max_pixels="),
]


def test_photographs_of_a_folder_are_upright(tmp_path: Path) -> None:
    """Orientation 6: what the file holds lying on its side."""
    photo = Image.new("RGB", (16, 8))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.jpg", exif=exif)
    assert PictureData(tmp_path).shape == (3, 16, 8)


def test_an_image_folder_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    """Missing, empty, mixed, broken and unequal: each is named with what is wrong about it."""
    with pytest.raises(FileNotFoundError, match=f"no such folder of pictures: {tmp_path / 'none'}"):
        PictureData(tmp_path / "none")
    with pytest.raises(ValueError, match=f"no pictures in {tmp_path}: expected files ending in .*\\.png"):
        PictureData(tmp_path)
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png", (9, 8))
    with pytest.raises(ValueError, match=r"b\.png has shape \(3, 8, 9\), others \(3, 8, 8\): give a size"):
        PictureData(tmp_path).__getitems__([0, 1])
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{tmp_path / 'c.png'} cannot be read as a picture: "):
        PictureData(tmp_path).__getitems__([2])
    for make, message in UNREADABLE:
        make(tmp_path / "c.png")
        with pytest.raises(ValueError, match=f"{tmp_path / 'c.png'} {message}") as refusal:
            PictureData(tmp_path).__getitems__([2])
        assert "\n" not in str(refusal.value)
    paint(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"mixes class folders \(cat, \.\.\.\) and loose pictures \(a\.png, \.\.\.\)"):
        PictureData(tmp_path)


@pytest.mark.parametrize(("n", "size"), [(10, 4), (10, 10), (7, 3), (3, 8)])
def test_each_epoch_is_a_permutation(n: int, size: int) -> None:
    """Laid end to end, batches are one permutation after another, of one size also where two epochs meet, in an order of their own."""
    batches = list(islice(shuffled_batches(n, size, seed=0), 5 * n))
    assert {len(batch) for batch in batches} == {size}
    flat = [index for batch in batches for index in batch]
    epochs = [flat[i : i + n] for i in range(0, len(flat) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:4]}) > 1
    assert list(islice(shuffled_batches(n, size, seed=1), 5 * n)) != batches


@pytest.mark.parametrize("start", [1, 2, 5, 13])
def test_starting_later_is_skipping(start: int) -> None:
    """Batch number `start` and those after it do not depend on having drawn the ones before."""
    whole = list(islice(shuffled_batches(10, 4, seed=3), 30))
    assert list(islice(shuffled_batches(10, 4, seed=3, start=start), 30 - start)) == whole[start:]


def test_classes_that_are_numbers_come_in_their_order(tmp_path: Path) -> None:
    """10 comes after 2, as in the folders that `python -m samplers` writes; names come after numbers."""
    for name in ("10", "2", "0", "cat"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "a.png")
    assert PictureData(tmp_path).classes == ["0", "2", "10", "cat"]


def test_colours_are_those_that_profiles_mean(tmp_path: Path) -> None:
    """Folders and captioned images are in sRGB."""
    profile = of_colours("g", "r", "b")  # linear light, red and green exchanged
    Image.new("RGB", (8, 8), (200, 20, 100)).save(tmp_path / "a.png", icc_profile=profile)
    (tmp_path / "a.txt").write_text("a cat")
    right = torch.from_numpy(encoded(np.array([20, 200, 100]) / 255) / 127.5 - 1).float()[:, None, None].expand(3, 8, 8)
    torch.testing.assert_close(PictureData(tmp_path).__getitems__([0])["x0"][0], right, rtol=0, atol=0.02)
    torch.testing.assert_close(CaptionedImages(tmp_path).read(0, 8, 8)[0], right, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [None, 8])
def test_a_first_picture_that_is_broken_leaves_the_shape_to_others(size: int | None, tmp_path: Path) -> None:
    """Whether it ends a run or is skipped is for training to say; with no picture at all the first error is raised."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:45])
    data = PictureData(tmp_path, size)
    assert data.shape == (3, 8, 8)
    with read_batches(data, iter([[0, 1]]), 1, "skip", 0, pin=False) as batches, pytest.warns(UserWarning, match=r"0\.png"):
        (batch,) = batches.next_step()
    assert (batch["x0"].shape, batches.replaced) == ((2, 3, 8, 8), 1)
    (tmp_path / "1.png").write_bytes(b"")
    if size is None:
        with pytest.raises(ValueError, match=r"0\.png"):
            PictureData(tmp_path)
