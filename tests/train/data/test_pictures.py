"""Pictures to train on, with classes or captions: what is read, what SDXL is told of it, and one line about
every mistake."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.samplers.test_pictures import encoded, of_colours
from train.data.change import PACKED, describe_change
from train.data.pictures import CaptionedImages, PictureData
from train.data.reading import read_batches


def draw(path: Path, width: int = 8, height: int = 8, caption: str | None = "a picture") -> Path:
    """A horizontal ramp from black to white, and a caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_captions_beside_images_and_in_a_list(tmp_path: Path) -> None:
    """Both ways in one folder, sub-folders too, in the order of names; white space around is cut; hidden and
    other files do not count."""
    draw(tmp_path / "b.png", caption="\ufeff a café \n")
    draw(tmp_path / "a.JPEG", caption=None)
    draw(tmp_path / "deep" / "c.png", caption=None)
    draw(tmp_path / ".trash" / "d.png", caption=None)
    (tmp_path / "notes.md").write_text("not an image")
    lines = '{"file_name": "a.JPEG", "text": "first\u2028line", "score": 3}\n\n'
    lines += '{"file_name": "./deep/c.png", "text": " third "}\n'
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    images = CaptionedImages(tmp_path)
    assert images.pictures.names == ["a.JPEG", "b.png", "deep/c.png"]
    assert images.captions == ["first\u2028line", "a café", "third"]
    assert len(images) == 3


@pytest.mark.parametrize(
    ("size", "target", "corner"),
    [
        ((40, 20), (16, 16), (0, 8)),
        ((20, 40), (16, 16), (8, 0)),
        ((16, 16), (16, 16), (0, 0)),
        ((8, 4), (16, 16), (0, 8)),
        ((31, 20), (16, 16), (0, 4)),
        ((32, 32), (8, 16), (4, 0)),
    ],
    ids=str,
)
def test_an_image_comes_with_the_numbers_that_sdxl_is_told(
    tmp_path: Path, size: tuple[int, int], target: tuple[int, int], corner: tuple[int, int]
) -> None:
    """Size before, crop within the resized image, size afterwards, height before width; and the pixels of
    that crop."""
    image, numbers = CaptionedImages(draw(tmp_path / "a.png", *size).parent).read(0, *target)
    width, (top, left) = size[0], corner
    told = {
        "height": size[1],
        "width": width,
        "top": top,
        "left": left,
        "target_height": target[0],
        "target_width": target[1],
    }
    assert numbers == told
    assert image.shape == (3, *target)
    resized = round(width * max(target[1] / width, target[0] / size[1]))
    seen = (torch.arange(target[1]) + left + 0.5) / resized * width - 0.5  # where each pixel was
    inside = (seen > 1) & (seen < width - 2)
    expected = (seen / (width - 1) * 2 - 1)[inside]
    assert float((image[0, target[0] // 2, inside] - expected).abs().max()) < 0.03


def test_photographs_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    """Orientation 6: what the file holds lying on its side stands upright, and height and width are those
    that a viewer shows."""
    path = draw(tmp_path / "a.jpg", 16, 8)
    with Image.open(path) as opened:
        exif = opened.getexif()
        exif[0x0112] = 6  # turned by 90 degrees clockwise
        opened.save(path, exif=exif, quality=100)
    image, numbers = CaptionedImages(tmp_path).read(0, 16, 8)
    assert (numbers["height"], numbers["width"]) == (16, 8)
    assert float(image[:, 0].mean()) < -0.9  # dark was left and is on top
    assert float(image[:, -1].mean()) > 0.9


def test_the_fingerprint_is_of_content_and_order(tmp_path: Path) -> None:
    """The same for a copy elsewhere; another one for other pixels, another caption, another order."""

    def found(folder: str, captions: str = "ab", width: int = 8, names: str = "ab") -> str:
        for name, caption, size in zip(names, captions, (8, width), strict=True):
            draw(tmp_path / folder / f"{name}.png", size, caption=caption)
        return CaptionedImages(tmp_path / folder).fingerprint()

    first = found("first")
    assert found("copy") == first
    others = [
        found("caption", "ac"),
        found("pixels", width=9),
        found("order", names="ba", captions="ab", width=9),
        found("swapped", "ba"),
    ]
    assert len({first, *others}) == 5


MISTAKES: dict[str, tuple[dict[str, str | None], str]] = {
    "nothing": ({}, r"no pictures in {folder}: expected files ending in .*\.png"),
    "no caption": ({"b.png": "x", "a.png": None, "c.png": None}, r"2 of 3 pictures have no caption, the "
                                                                 r"first is {folder}/a\.png: write"),
    "empty caption": ({"a.png": " \n"}, r"the caption of {folder}/a\.png is empty: write it "
                                        r".*\(objective\.drop"),
    "two captions": (
        {"a.png": "a cat", "metadata.jsonl": '{"file_name": "a.png", "text": "a dog"}'},
        r"{folder}/a\.png has two captions, in a\.txt and metadata\.jsonl: keep one",
    ),
    "strange name": (
        {"a.png": "a cat", "metadata.jsonl": '{"file_name": "b.png", "text": "a dog"}'},
        r"metadata\.jsonl has a prompt for b\.png, which is none of the 1 pictures; did you mean a\.png\?",
    ),
    "a line twice": (
        {"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", '
                                          '"text": "b"}'},
        r"metadata\.jsonl has 2 prompts, and more than one for a\.png: keep one",
    ),
    "no json": ({"a.png": None, "metadata.jsonl": "\na.png a cat"}, r"metadata\.jsonl, line 2 is not JSON: "),
    "no text": ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png"}'}, r"metadata\.jsonl, line 1 "
                                                                             r"must be like"),
    "a number": ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": 3}'},
        r"metadata\.jsonl, line 1 must be like"),
    "a list": ({"a.png": None, "metadata.jsonl": '["a.png", "a cat"]'}, r"metadata\.jsonl, line 1 must be "
                                                                        r"like"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_named(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    """One line that names the file and what to do."""
    for name, content in files.items():
        if name.endswith(".png"):
            draw(tmp_path / name, caption=content)
        else:
            (tmp_path / name).write_text(content or "")
    with pytest.raises(ValueError, match=message.format(folder=tmp_path)) as refusal:
        CaptionedImages(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "a.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: "):
        CaptionedImages(tmp_path)


def test_a_folder_gives_classes_and_colours(tmp_path: Path) -> None:
    """Sub-folders are classes, numbers in their order before names; pixels go from -1 to 1; one that is
    broken or unequal is named."""
    for name, colour in (("10/b.png", (255, 0, 51)), ("2/deep/a.PNG", (0, 255, 0)), ("cat/c.png", (0, 0, 0))):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    data = PictureData(tmp_path)
    assert (data.classes, len(data), data.num_classes, data.shape) == (["2", "10", "cat"], 3, 3, (3, 8, 8))
    batch = data.__getitems__([1, 0])
    assert batch["label"].tolist() == [0, 1]
    batch = data.__getitems__([0, 1])
    assert batch["x0"].dtype == torch.float32
    torch.testing.assert_close(batch["x0"][:, :, 0, 0], torch.tensor([[1.0, -1.0, -0.6], [-1.0, 1.0, -1.0]]))
    assert PictureData(tmp_path, channels=1).shape == (1, 8, 8)
    Image.new("RGB", (9, 8)).save(tmp_path / "cat" / "c.png")
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/cat/c\.png has shape \(3, 8, 9\), others \(3, 8, 8\): give a size"
    ):
        data.__getitems__([0, 2])
    (tmp_path / "cat" / "c.png").write_bytes((tmp_path / "10" / "b.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=f"^{tmp_path}/cat/c.png cannot be read as a picture: "):
        data.__getitems__([2])


def test_folders_shards_and_arrays_train_alike(tmp_path: Path) -> None:
    """The same batches of the same classes, and of a folder and shards the same captions; a class that has
    moved is told in shards too."""
    pixels, labels = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8), [10, 2, 10, 2]
    for i, label in enumerate(labels):
        for place in (f"classes/{label}", "flat"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(tmp_path / place / f"{i}.png")
        (tmp_path / "flat" / f"{i}.txt").write_text(f"picture {i}")
        (tmp_path / f"{i}.cls").write_text(str(label))
    np.savez(tmp_path / "arrays.npz", pixels, np.array(labels))

    def pack(name: str, order: str) -> None:
        with tarfile.open(tmp_path / name, "w") as shard:
            for i, j in enumerate(order):
                shard.add(tmp_path / "flat" / f"{j}.png", f"{i}.png")
                shard.add(tmp_path / "flat" / f"{j}.txt", f"{i}.txt")
                shard.add(tmp_path / f"{i}.cls", f"{i}.cls")

    pack("a.tar", "0123")
    pack("b.tar", "1032")
    folder, *others = (PictureData(tmp_path / name, size=4) for name in ("classes", "a.tar", "arrays.npz"))
    wanted = folder.__getitems__([0, 2, 1, 3])
    for data in others:
        found = data.__getitems__(range(4))
        assert (
            (data.classes, data.num_classes, data.shape)
            == (folder.classes, 2, (3, 4, 4))
            == (["2", "10"], 2, (3, 4, 4))
        )
        assert all(torch.equal(found[name], wanted[name]) for name in ("x0", "label"))
    changes = [
        describe_change(
            str(others[0].fixed_settings[PACKED]), str(PictureData(tmp_path / name).fixed_settings[PACKED])
        )
        for name in ("a.tar", "b.tar")
    ]
    assert changes == ["", "with what is now 0 as 1"]
    assert CaptionedImages(tmp_path / "a.tar").captions == [f"picture {i}" for i in range(4)]
    assert (
        CaptionedImages(tmp_path / "a.tar").fingerprint() == CaptionedImages(tmp_path / "flat").fingerprint()
    )
    with pytest.raises(
        ValueError, match=r"^4 of 4 pictures have no caption, the first is .*arrays.npz/000000: write it"
    ):
        CaptionedImages(tmp_path / "arrays.npz")


@pytest.mark.parametrize("size", [(20, 10), (10, 20), (10, 10), (5, 9)], ids=str)
def test_a_size_resizes_and_crops_the_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    """The shorter side becomes `size`, and the middle of the longer one is kept: a mark there stays in the
    middle."""
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


def test_colours_are_those_that_profiles_mean(tmp_path: Path) -> None:
    """Whether they have classes or captions, they are in sRGB."""
    profile = of_colours("g", "r", "b")  # linear light, red and green exchanged
    Image.new("RGB", (8, 8), (200, 20, 100)).save(tmp_path / "a.png", icc_profile=profile)
    (tmp_path / "a.txt").write_text("a cat")
    right = (
        torch.from_numpy(encoded(np.array([20, 200, 100]) / 255) / 127.5 - 1)
        .float()[:, None, None]
        .expand(3, 8, 8)
    )
    torch.testing.assert_close(PictureData(tmp_path).__getitems__([0])["x0"][0], right, rtol=0, atol=0.02)
    torch.testing.assert_close(CaptionedImages(tmp_path).read(0, 8, 8)[0], right, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [None, 8])
def test_a_first_picture_that_is_broken_leaves_the_shape_to_others(size: int | None, tmp_path: Path) -> None:
    """Whether it ends a run or is skipped is for training to say; with no picture at all the first error is
    raised."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:45])
    data = PictureData(tmp_path, size)
    assert data.shape == (3, 8, 8)
    with (
        read_batches(data, iter([[0, 1]]), 1, "skip", 0, pin=False) as batches,
        pytest.warns(UserWarning, match=r"0\.png"),
    ):
        (batch,) = batches.next_step()
    assert (batch["x0"].shape, batches.replaced) == ((2, 3, 8, 8), 1)
    (tmp_path / "1.png").write_bytes(b"")
    if size is None:
        with pytest.raises(ValueError, match=r"0\.png"):
            PictureData(tmp_path)
