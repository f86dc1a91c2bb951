"""Readers of pictures: the same pixels whatever they are kept in, and one line about every mistake."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.peers import sklearn
from tests.samplers.test_pictures import of_colours
from train.data.folder import FolderPictures
from train.data.npz import NpzPictures
from train.data.source import Source, Unreadable
from train.data.tar import TarPictures, find_shards, split_name
from train.data.tensors import TensorPictures

UNREADABLE: list[tuple[Callable[[Path], None], str]] = [
    (
        lambda path: Image.fromarray(np.full((8, 8), 300, np.uint16)).save(path),
        "has pixels of more than 8 bits",
    ),
    (
        lambda path: Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(path),
        "is transparent in places: give it a background first",
    ),
    (
        lambda path: Image.new("1", (14000, 14000)).save(path),
        "has 14000x14000 = 196,000,000 pixels, more than max_pixels=",
    ),
]
CAPTIONS = ["a palace", "a dahlia\u2028in flower", "a roof"]


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Three real pictures (3, 40, 48, 3)."""
    china, flower = (
        sklearn.datasets.load_sample_image("china.jpg"),
        sklearn.datasets.load_sample_image("flower.jpg"),
    )
    return np.stack(
        [
            np.asarray(Image.fromarray(picture).resize((48, 40)))
            for picture in (china, flower, china[200:300, 200:300])
        ]
    )


@pytest.fixture(scope="module")
def folder(photographs: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those pictures as PNGs with captions beside them."""
    place = tmp_path_factory.mktemp("photographs")
    for i, (picture, caption) in enumerate(zip(photographs, CAPTIONS, strict=True)):
        Image.fromarray(picture).save(place / f"{i:06d}.png")
        (place / f"{i:06d}.txt").write_text(caption, encoding="utf-8")
    return place


def only(source: Source, index: int = 0) -> Tensor:
    """One picture that can be read."""
    (picture,) = source.read([index])
    assert isinstance(picture, Tensor)
    return picture


def reason(source: Source, index: int = 0) -> str:
    """Why one picture cannot be read."""
    (picture,) = source.read([index])
    assert isinstance(picture, Unreadable)
    assert "\n" not in picture.reason
    return picture.reason


def refusal(open_it: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """What is said, in one line."""
    with pytest.raises(kind) as said:
        open_it()
    assert "\n" not in str(said.value)
    return str(said.value)


def assert_holds(source: Source, photographs: np.ndarray) -> None:
    """These pictures to the last bit, in any order and number."""
    assert len(source) == len(source.names) == len(set(source.names)) == len(photographs)
    for picture, index in zip(source.read([2, 0, 0, 1]), [2, 0, 0, 1], strict=True):
        assert isinstance(picture, Tensor)
        assert picture.dtype == torch.uint8
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), photographs[index])
    assert list(source.read([])) == []


# Folders ----------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_pictures_and_captions(folder: Path, photographs: np.ndarray) -> None:
    """To the last bit, sorted by path, captions from beside them."""
    source = FolderPictures(folder)
    assert_holds(source, photographs)
    assert list(source.names) == ["000000.png", "000001.png", "000002.png"]
    assert source.origin == str(folder)
    assert source.labels is None
    assert source.prompts == CAPTIONS


def test_captions_are_read_when_they_are_asked_for(tmp_path: Path, folder: Path) -> None:
    """A folder with a picture that has no caption can be read, and names it where prompts are needed; a list
    or file goes before."""
    for name in ("000000.png", "000001.png", "000000.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    source = FolderPictures(tmp_path)
    assert len(list(source.read([0, 1]))) == 2
    assert f"1 of 2 pictures have no caption, the first is {tmp_path / '000001.png'}" in refusal(
        lambda: source.prompts
    )
    assert FolderPictures(tmp_path, prompts=["a", "b"]).prompts == ["a", "b"]
    (tmp_path / "prompts.csv").write_text("file_name,prompt\n000001.png,second\n000000.png,first\n")
    assert FolderPictures(tmp_path, prompts=tmp_path / "prompts.csv").prompts == ["first", "second"]
    (tmp_path / "000000.txt").unlink()
    lines = [{"file_name": f"00000{i}.png", "text": f"line {i}"} for i in (1, 0)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert FolderPictures(tmp_path).prompts == ["line 0", "line 1"]


def test_broken_pictures_are_named(folder: Path, tmp_path: Path) -> None:
    """A PNG that ends in its middle, one that is text, an empty file, one that has gone since."""
    whole = (folder / "000000.png").read_bytes()
    for name, content in (
        ("cut", whole[: len(whole) // 2]),
        ("empty", b""),
        ("gone", whole),
        ("text", b"<svg/>"),
    ):
        (tmp_path / f"{name}.png").write_bytes(content)
    source = FolderPictures(tmp_path)
    (tmp_path / "gone.png").unlink()
    for i, name in enumerate(("cut", "empty", "gone", "text")):
        said = (
            f"no such picture: {tmp_path}/gone.png"
            if name == "gone"
            else f"{tmp_path}/{name}.png cannot be read as a picture: "
        )
        assert reason(source, i).startswith(said)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    """Missing, a file, empty."""
    (tmp_path / "file").write_text("")
    assert (
        refusal(lambda: FolderPictures(tmp_path / "none"), OSError)
        == f"no such folder of pictures: {tmp_path / 'none'}"
    )
    assert (
        refusal(lambda: FolderPictures(tmp_path / "file"), OSError)
        == f"{tmp_path / 'file'} is a file, not a folder of pictures"
    )
    assert refusal(lambda: FolderPictures(tmp_path)).startswith(
        f"no pictures in {tmp_path}: expected files ending in .bmp, "
    )


# NumPy files ------------------------------------------------------------------------------------------------


def test_numpy_files_give_their_pictures(photographs: np.ndarray, tmp_path: Path) -> None:
    """.npy and .npz to the last bit, whatever the order of the axes in memory and of the members; labels
    where there are some."""
    np.save(tmp_path / "a.npy", photographs)
    np.savez(tmp_path / "b.npz", photographs, np.array([7, 3, 7]))
    np.savez(tmp_path / "c.npz", mu=np.zeros(5), arr_0=np.asfortranarray(photographs))
    for name, labels in (("a.npy", None), ("b.npz", ["7", "3", "7"]), ("c.npz", None)):
        source = NpzPictures(tmp_path / name)
        assert_holds(source, photographs)
        assert source.labels == labels
        assert source.prompts is None
    assert NpzPictures(tmp_path / "a.npy", prompts=["a", "b", "c"]).prompts == ["a", "b", "c"]


def test_numpy_files_stay_on_disk(tmp_path: Path) -> None:
    """A stored .npz, written member by member as large ones are, is mapped, not read."""
    shape, row = (100, 256, 256, 3), 256 * 256 * 3
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        file.write(header.getvalue())
        for _ in range(shape[0]):
            file.write(bytes(row))
    source = NpzPictures(tmp_path / "a.npz")
    assert isinstance(source._pixels, np.memmap)
    assert only(source, 99).shape == (3, 256, 256)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "hold uint8 (N, H, W, 3), values 0 ... 255, not "
                                                        "float32 (2, 8, 8, 3)"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "hold uint8 (N, H, W, 3), values 0 ... 255, not uint8 "
                                                      "(2, 3, 8, 8)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "not uint8 (0, 8, 8, 3)"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "holds images, and no pictures: these are an array "
                                                       "called arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "holds reference statistics, and no pictures"),
        ({"arr_0": np.array([{}, {}], object)}, "holds pickled objects, which are never read"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)}, "arr_1 of {} must hold a "
                                                                                 "class for each of the 2"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([{}, {}], object)}, "{} holds "
                                                                                           "pickled "
                                                                                           "objects"),
    ],
)  # fmt: skip
def test_numpy_files_of_something_else_are_refused(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Floats, channels first, none, other names, statistics, pickles, labels that do not fit: what is there
    and what should be."""
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    said = refusal(lambda: NpzPictures(path))
    assert message.format(path) in said
    assert str(path) in said


def test_damaged_numpy_files_are_refused(photographs: np.ndarray, tmp_path: Path) -> None:
    """Missing, compressed, cut short, text, a pickle as .npy: one line that names the file."""
    assert (
        refusal(lambda: NpzPictures(tmp_path / "no.npz"), OSError)
        == f"no such file of pictures: {tmp_path / 'no.npz'}"
    )
    np.savez_compressed(tmp_path / "a.npz", photographs)
    assert refusal(lambda: NpzPictures(tmp_path / "a.npz")).startswith(
        f"{tmp_path / 'a.npz'} is compressed, and would fill the memory: save"
    )
    np.savez(tmp_path / "b.npz", photographs)
    np.save(tmp_path / "c.npy", photographs)
    for name in ("b.npz", "c.npy"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5000])
    (tmp_path / "d.npz").write_text("text")
    np.save(tmp_path / "e.npy", np.array([{}], object))
    for name in ("b.npz", "c.npy", "d.npz", "e.npy"):
        assert refusal(lambda name=name: NpzPictures(tmp_path / name)).startswith(  # type: ignore[misc]
            f"{tmp_path / name} cannot be read as a NumPy file: "
        )


def array_file(shape: tuple[int, ...], kind: str = "|u1", content: bytes = b"") -> bytes:
    """The bytes of an .npy file that claims this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def archive(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    """An .npz file of these members."""
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


ONE = array_file((1, 8, 8, 3), content=bytes(192))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"arr_0.npy": array_file((10**12, 8, 8, 3))},
            "says that arr_0.npy is uint8 (1000000000000, 8, 8, 3), but has ",
        ),
        ({"arr_0.npy": array_file((10**30, 8, 8, 3))}, "says that arr_0.npy is uint8 "),
        ({"arr_0.npy": array_file((-1, 8, 8, 3))}, "claims an array of shape (-1, 8, 8, 3)"),
        (
            {"arr_0.npy": array_file((2, 8, 8, 3), content=bytes(192)), "more": bytes(999)},
            "says that arr_0.npy is uint8 (2, 8, 8, 3), but",
        ),
        ({"arr_0": ONE}, "holds nothing, and no pictures"),
        ({"arr_0.npy": b"\x93NUMPY\x09\x00"}, "cannot be read as a NumPy file: "),
        (
            {"arr_0.npy": ONE, "arr_1.npy": array_file((10**12,), "<i8")},
            "a class for each of the 1 pictures, not int64 (1000000000000,)",
        ),
        (
            {"arr_0.npy": ONE, "arr_1.npy": array_file((1,), "<U199999999")},
            "says that arr_1 is <U199999999 (1,), more than the",
        ),
        ({"arr_0.npy": ONE, "arr_1.npy": array_file((1,), "<i8")}, "cannot be read as a NumPy file: "),
        ({"arr_0.npy": ONE, "arr_1.npy": array_file((-1,), "<i8")}, "claims an array of shape (-1,)"),
        (
            {"arr_0.npy": ONE, "arr_1.npy": array_file((1,), "<U2", "a\n".encode("utf-32-le"))},
            "control characters: rename a\\x0a",
        ),
    ],
    ids=[
        "10^12",
        "10^30",
        "negative",
        "beyond its member",
        "no suffix",
        "version",
        "labels",
        "long labels",
        "cut labels",
        "negative labels",
        "labels of two lines",
    ],
)
def test_hostile_numpy_files_end_in_one_line(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    """Shapes that nothing stands behind, stored or deflated: refused before any of it takes memory."""
    path = archive(tmp_path / "a.npz", members)
    said = refusal(lambda: NpzPictures(path))
    assert str(path) in said
    assert message in said
    deflated = archive(tmp_path / "b.npz", members, zipfile.ZIP_DEFLATED)
    assert str(deflated) in refusal(lambda: NpzPictures(deflated))


def test_numpy_files_with_passwords_or_bare_headers_are_refused(tmp_path: Path) -> None:
    """Encrypted pictures would be noise; an .npy file of 10^30 pictures."""
    path = archive(tmp_path / "a.npz", {"arr_0.npy": ONE})
    content = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + at] |= 1
    path.write_bytes(content)
    assert refusal(lambda: NpzPictures(path)).startswith(f"{path} is encrypted")
    for n in (10**12, 10**30, -1):
        (tmp_path / "b.npy").write_bytes(array_file((n, 8, 8, 3)))
        assert str(tmp_path / "b.npy") in refusal(lambda: NpzPictures(tmp_path / "b.npy"))


# Tar shards -------------------------------------------------------------------------------------------------


def pack(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    """A tar file of these members, in this order."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def as_file(picture: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    """The content of a picture file."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, kind, **options)
    return content.getvalue()


def test_shards_give_their_pictures(photographs: np.ndarray, tmp_path: Path) -> None:
    """To the last bit, in the order of shards and members; captions from text or JSON, classes, other members
    left alone."""
    files = [as_file(photographs[0]), as_file(photographs[1], "webp", lossless=True), as_file(photographs[2])]
    first = {
        "a/0.txt": b"a palace\n",
        "a/0.png": files[0],
        "a/0.cls": b"3",
        "a/0.seg.png": b"",
        "a/._0.png": b"",
        "notes.md": b"",
    }
    caption = json.dumps({"caption": CAPTIONS[1], "width": 48, "text": None}).encode()
    second = {
        "1.json": caption,
        "1.WEBP": files[1],
        "1.cls": b"7\n",
        "2.png": files[2],
        "2.json": b'{"text": "a roof"}',
        "2.cls": b"3",
    }
    pack(tmp_path / "s-08.tar", first)
    pack(tmp_path / "s-09.tar", second, "w:")
    for paths in (
        f"{tmp_path}/s-*.tar",
        f"{tmp_path}/s-{{08..09}}.tar",
        [tmp_path / "s-08.tar", tmp_path / "s-09.tar"],
    ):
        source = TarPictures(paths)
        assert_holds(source, photographs)
        assert list(source.names) == ["a/0", "1", "2"]
        assert source.labels == ["3", "7", "3"]
        assert source.prompts == CAPTIONS
    assert TarPictures(tmp_path / "s-08.tar", prompts=["another"]).prompts == ["another"]


def test_members_of_a_folder_packed_from_within(photographs: np.ndarray, tmp_path: Path) -> None:
    """`tar cf a.tar .` writes ./a/0.png: the key is a/0, and lists may have key or name, with ./ or
    without."""
    content = as_file(photographs[0])
    for dot in ("./", ""):
        members = {"a/0.png": content, "a/0.txt": b"hi", "a/1.jpg.png": content, "a/1.jpg.txt": b"ho"}
        path = pack(tmp_path / "a.tar", {dot + name: data for name, data in members.items()})
        source = TarPictures(path)
        assert (list(source.names), source.prompts) == (["a/0", "a/1.jpg"], ["hi", "ho"])
        for first, second in (("a/0", "a/1.jpg"), ("a/0.png", "a/1.jpg.png"), ("./a/0.png", "./a/1.jpg.png")):
            assert TarPictures(path, prompts={second: "two", first: "one"}).prompts == ["one", "two"]
        assert "more than one for a/0" in refusal(
            lambda path=path: TarPictures(path, prompts={"a/0": "", "a/0.png": ""})  # type: ignore[misc]
        )
    twice = pack(tmp_path / "twice.tar", {"0.png": content, "./0.png": content})
    assert "holds 0.png twice" in refusal(lambda: TarPictures(twice))
    shards = [pack(tmp_path / f"{name}.tar", {"0.png": content}) for name in "xy"]
    assert TarPictures(shards, prompts={"x/0.png": "x", "y/0": "y"}).prompts == ["x", "y"]
    beside = TarPictures(pack(tmp_path / "beside.tar", {"0.jpg": content, "0.jpg.txt": b"x"}))
    assert (list(beside.names), beside.prompts) == (["0"], None)


def test_tar_programs_shards_are_read(folder: Path, photographs: np.ndarray, tmp_path: Path) -> None:
    """With folders in them and names of more than 100 characters, in every dialect that tarfile writes."""
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=dialect) as archive:
            archive.add(folder, arcname=f"{60 * 'x'}/{60 * 'y'}")
        source = TarPictures(tmp_path / "a.tar")
        order = np.argsort(source.names)
        for i, picture in enumerate(source.read(order.tolist())):
            assert isinstance(picture, Tensor)
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), photographs[i])


def test_shards_with_the_same_keys(photographs: np.ndarray, tmp_path: Path) -> None:
    """Every picture has a name of its own; the same shard twice is refused."""
    for i in range(2):
        pack(tmp_path / f"s{i}.tar", {"0.png": as_file(photographs[i])})
    source = TarPictures(f"{tmp_path}/s{{0..1}}.tar")
    assert list(source.names) == ["s0/0", "s1/0"]
    assert source.prompts is None
    assert source.labels is None
    assert "has s0/0 twice" in refusal(lambda: TarPictures([tmp_path / "s0.tar", tmp_path / "s0.tar"]))


@pytest.mark.parametrize(("make", "message"), UNREADABLE, ids=["16-bit", "transparent", "bomb"])
def test_pictures_that_cannot_be_used_are_named(
    make: Callable[[Path], None], message: str, photographs: np.ndarray, tmp_path: Path
) -> None:
    """Of folders and shards in the same words, for evaluation and for training; the pictures beside them are
    read."""
    make(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(as_file(photographs[0]))
    shard = pack(tmp_path / "a.tar", {name: (tmp_path / name).read_bytes() for name in ("0.png", "1.png")})
    for source, place in ((FolderPictures(tmp_path), tmp_path), (TarPictures(shard), shard)):
        said = reason(source)
        assert said.startswith(f"{place}/0.png {message}")
        assert refusal(lambda source=source: source.open(0)) == said  # type: ignore[misc]  # bound in the loop
        assert np.array_equal(only(source, 1).permute(1, 2, 0).numpy(), photographs[0])


def test_palettes_grey_and_turned_pictures_are_as_in_folders(photographs: np.ndarray, tmp_path: Path) -> None:
    """To the last bit, whatever the mode: both ways of reading agree."""
    picture = Image.fromarray(photographs[0])
    exif = picture.getexif()
    exif[0x0112] = 6
    for i, (mode, kind) in enumerate(
        [("P", "png"), ("L", "png"), ("CMYK", "jpeg"), ("RGB", "jpeg"), ("RGBA", "png"), ("1", "png")]
    ):
        picture.convert(mode).save(tmp_path / f"{i}.{kind}", exif=exif)
    loose = FolderPictures(tmp_path)
    packed = TarPictures(
        pack(tmp_path / "a.tar", {name: (tmp_path / name).read_bytes() for name in loose.names})
    )
    for i in range(len(loose)):
        assert torch.equal(only(loose, i), only(packed, i))
        assert only(packed, i).shape == (3, 48, 40)


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a/000.JPEG", "a/000", ".jpeg"),
        ("cfg-7.5-000.png", "cfg-7.5-000", ".png"),
        ("photo.1.png", "photo.1", ".png"),
        ("n01440764_10026.seg.png", "n01440764_10026", ".seg.png"),
        ("v1.5/x.0.25.depth.16.txt", "v1.5/x.0.25.depth.16", ".txt"),
        ("Dr. Who.png", "Dr. Who", ".png"),
        ("photo.jpg.png", "photo.jpg", ".png"),
        ("photo.JPG.txt", "photo.JPG", ".txt"),
        ("000.clip_b32.npy", "000", ".clip_b32.npy"),
        ("a.b/000", "a.b/000", ""),
    ],
)
def test_members_have_keys_and_suffixes(name: str, key: str, suffix: str) -> None:
    """Words behind a dot say what of a sample a member is; numbers belong to its name."""
    assert split_name(name) == (key, suffix)


def test_no_member_of_a_shard_is_left_out_without_a_word(photographs: np.ndarray, tmp_path: Path) -> None:
    """Dots in names, captions and classes beside them, suffixes in any case, and what is not read is counted;
    a shard of img2dataset's."""
    png = as_file(photographs[0])
    members = {f"x/cfg-7.5-{i:03d}.png": png for i in range(3)} | {
        f"x/cfg-7.5-{i:03d}.txt": b"a cat" for i in range(3)
    }
    more = {
        "1.tif": b"",
        "1.txt": b"a",
        "2.GIF": b"",
        "x/cfg-7.5-001.seg.png": b"",
        "noname": b"",
        "inner.tar": b"",
        "__MACOSX/._0.png": b"",
        ".x/0.png": b"",
    }
    source = TarPictures(pack(tmp_path / "a.tar", {**members, **more}))
    assert list(source.names) == ["x/cfg-7.5-000", "x/cfg-7.5-001", "x/cfg-7.5-002"]
    assert source.prompts == ["a cat"] * 3
    assert source.ignored == {"": 1, ".gif": 1, ".seg.png": 1, ".tar": 1, ".tif": 1}
    assert np.array_equal(only(source, 2).permute(1, 2, 0).numpy(), photographs[0])
    kinds = {"0.JPG": "jpeg", "1.jfif": "jpeg", "2.jpe": "jpeg", "3.Webp": "webp", "4.bmp": "bmp"}
    odd = TarPictures(
        pack(tmp_path / "b.tar", {name: as_file(photographs[0], kind) for name, kind in kinds.items()})
    )
    assert [only(odd, i).shape for i in range(5)] == [(3, 40, 48)] * 5
    assert TarPictures(f"{tmp_path}/?.tar").ignored == source.ignored
    assert "and found 1 .seg.png, 2 .tif" in refusal(
        lambda: TarPictures(pack(tmp_path / "c.tar", dict.fromkeys(("0.seg.png", "0.tif", "1.tif"), b"")))
    )
    shard = {
        f"{i:09d}.{kind}": png if kind == "jpg" else b'{"caption": "from json"}'
        for i in range(2)
        for kind in ("jpg", "json")
    }
    shard |= {"000000000.txt": b"from text"}
    assert TarPictures(pack(tmp_path / "d.tar", shard)).prompts == ["from text", "from json"]


def linked(name: str, to: str, kind: bytes) -> tarfile.TarInfo:
    """A member that is a link."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def test_links_within_a_shard_are_followed(photographs: np.ndarray, tmp_path: Path) -> None:
    """Hard ones as GNU tar writes them of doubled files, symbolic ones relative to where they lie, and links
    to links."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(as_file(photographs[i]))
    (tmp_path / "2.png").hardlink_to(tmp_path / "0.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(3):
            archive.add(tmp_path / f"{i}.png", f"x/{i}.png")
        archive.addfile(linked("y/3.png", "../x/./1.png", tarfile.SYMTYPE))
        archive.addfile(linked("y/4.png", "3.png", tarfile.SYMTYPE))
        archive.addfile(linked("gone", "nowhere", tarfile.SYMTYPE))
    source = TarPictures(tmp_path / "a.tar")
    assert list(source.names) == ["x/0", "x/1", "x/2", "y/3", "y/4"]
    for i, photograph in enumerate((0, 1, 0, 1, 1)):
        assert np.array_equal(only(source, i).permute(1, 2, 0).numpy(), photographs[photograph])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (linked("1.png", "/etc/passwd", tarfile.SYMTYPE), "holds 1.png, a link to /etc/passwd, which "
                                                          "it lacks: use tar --deref"),
        (linked("1.png", "1.png", tarfile.SYMTYPE), "holds 1.png, a link back to itself through "
                                                    "1.png"),
        (linked("1.png", "2.png", tarfile.LNKTYPE), "holds 1.png, a link to 2.png, which it lacks"),
        (linked("0.txt", "../0.txt", tarfile.SYMTYPE), "holds 0.txt, a link to ../0.txt"),
        (linked("1.png", "", tarfile.FIFOTYPE), "holds 1.png, which is not a file but a folder, pipe or "
                                                "device"),
        (linked("caf\udce9.png", "0.png", tarfile.LNKTYPE), "is not UTF-8 or holds control characters: "
                                                            "rename caf\\xe9.png"),
    ],
    ids=["outside", "itself", "missing", "caption", "pipe", "latin-1"],
)  # fmt: skip
def test_members_that_are_no_files_are_refused(
    entry: tarfile.TarInfo, message: str, photographs: np.ndarray, tmp_path: Path
) -> None:
    """Links out of the shard or in a circle, pipes, names that are not UTF-8: named with the shard."""
    content = as_file(photographs[0])
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        (whole := tarfile.TarInfo("0.png")).size = len(content)
        archive.addfile(whole, io.BytesIO(content))
        archive.addfile(entry)
    said = refusal(lambda: TarPictures(tmp_path / "a.tar"))
    assert str(tmp_path / "a.tar") in said
    assert message in said


def with_size(header: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A member's header that claims another size."""
    changed = bytearray(header)
    changed[124:136], changed[156:157] = size.ljust(12, b"\0"), kind
    changed[148:156] = b"        "
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def test_hostile_shards_end_in_one_line(
    photographs: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holes left out, sizes that are negative (tarfile goes round in circles) or absurd, a second shard
    joined on, endless filling."""
    content = as_file(photographs[0])
    whole = pack(tmp_path / "a.tar", {"0.png": content}).read_bytes()
    sparse = tarfile.TarInfo("1.png")
    sparse.pax_headers = {
        "GNU.sparse.size": "1000000000000000",
        "GNU.sparse.numblocks": "0",
        "GNU.sparse.map": "0,1",
    }
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse)
    cases = {
        "negative": with_size(whole[:512], b"\xff" * 12) + whole[512:],
        "backwards": whole[: len(whole) // 2]
        + with_size(whole[:512], b"\xff" * 10 + b"\xfa\x00")
        + bytes(1024),
        "absurd": with_size(whole[:512], b"\x80" + b"\x7f" * 11) + whole[512:],
        "longname": with_size(whole[:512], b"\xff" * 12, b"L") + whole[512:],
        "pax": with_size(whole[:512], b"77777777777", b"x") + whole[512:],
        "gnu sparse": with_size(whole[:512], b"77777777777", b"S") + bytes(8),
        "chained": (with_size(whole[:512], b"%011o" % 512, b"x") + b"9 path=x\n".ljust(512, b"\0")) * 2000
        + whole,
        "joined": whole + whole,
        "zeros": bytes(10240),
    }
    for name, data in cases.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    (tmp_path / "filled.tar").write_bytes(whole)
    with open(tmp_path / "filled.tar", "ab") as file:
        file.truncate(len(whole) + 2**24 + 1)
    steps, proceed = Counter[str](), tarfile.TarFile.next

    def counted(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        steps[str(archive.name)] += 1
        assert steps[str(archive.name)] < 10, "round in circles"
        return proceed(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    for name in (*cases, "sparse", "filled"):
        said = refusal(lambda name=name: TarPictures(tmp_path / f"{name}.tar"))  # type: ignore[misc]
        assert str(tmp_path / f"{name}.tar") in said, name
    assert "as a sparse file" in refusal(lambda: TarPictures(tmp_path / "sparse.tar"))
    assert "goes on after its end at byte" in refusal(lambda: TarPictures(tmp_path / "joined.tar"))


def test_a_pattern_that_fits_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, or a pipe that would never answer; nor one that fits a name which is not UTF-8."""
    pack(Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.tar")), {"0.png": b""})
    assert "the shards is not UTF-8 or holds control" in refusal(lambda: TarPictures(f"{tmp_path}/c*.tar"))
    os.mkfifo(tmp_path / "a.tar")
    assert (
        refusal(lambda: TarPictures(f"{tmp_path}/*.tar"))
        == f"{tmp_path}/a.tar is not a file: give a pattern that matches only tar files"
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"0.png": b"", "1.txt": b"a", "2.png": b""},
            "holds 1.txt, but no picture for it, like 1.png: write it again",
        ),
        ({"0.png": b"", "0.jpg": b""}, "holds more than one picture called 0: 0.png and 0.jpg"),
        ({"0.png": b"", "0.PNG": b""}, "holds 0.PNG twice"),
        ({"a.md": b""}, "no pictures in "),
        ({}, "no pictures in "),
        (
            {"0.png": b"", "0.cls": b"1", "1.png": b""},
            "1 of 2 pictures have no class, the first is {}/1.png: add key.cls",
        ),
        ({"0.png": b"", "0.cls": b" "}, "the class of {}/0.png is empty"),
        (
            {"0.png": b"", "0.cls": b"3\n4"},
            "a name in {} is not UTF-8 or holds control characters: rename 3\\x0a4",
        ),
        (
            {"0.tar": b"", "1.tar": b""},
            "expected members such as 000.png, 000.jpg or 000.webp, and found 2 .tar",
        ),
    ],
)
def test_shards_with_missing_pairs_are_refused(
    members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    """Captions without a picture, two pictures of one name, none, classes of some: the shard and the member
    are named."""
    path = pack(tmp_path / "a.tar", members)
    said = refusal(lambda: TarPictures(path))
    assert message.format(path) in said
    assert str(path) in said


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"0.png": b"", "0.txt": b"a", "1.png": b""},
            "1 of 2 pictures have no caption, the first is {}/1.png: add key.txt",
        ),
        ({"0.png": b"", "0.txt": b" "}, "the caption of {}/0.png is empty"),
        ({"0.png": b"", "0.json": b"{"}, "{}/0.json is not JSON: "),
        ({"0.png": b"", "0.txt": b"\xff"}, "{}/0.txt is not UTF-8 text: "),
    ],
)
def test_captions_of_shards_that_cannot_be_used(
    members: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    """They stand in nobody's way until they are asked for; then the member is named."""
    path = pack(tmp_path / "a.tar", members)
    source = TarPictures(path)
    assert refusal(lambda: source.prompts).startswith(message.replace("{}", str(path)))


def test_damaged_shards_are_refused(photographs: np.ndarray, tmp_path: Path) -> None:
    """Cut in a picture, in a header, or between members; compressed; no tar file; missing, or an empty range:
    one line that names it."""
    content = as_file(photographs[0])
    whole = pack(tmp_path / "a.tar", {"0.png": content, "1.png": content}).read_bytes()
    member = 512 + -(-len(content) // 512) * 512
    for cut in (member + 700, member + 100, member, 2 * member):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        said = refusal(lambda: TarPictures(tmp_path / "b.tar"))
        assert said.startswith(
            (
                f"{tmp_path / 'b.tar'} is damaged or cut short",
                f"{tmp_path / 'b.tar'} cannot be read as a tar file",
            )
        )
    (tmp_path / "b.tar").write_bytes(whole[:member] + b"x" * 512 + whole[member + 512 :])
    assert f"{tmp_path / 'b.tar'} is damaged or cut short at byte {member}" in refusal(
        lambda: TarPictures(tmp_path / "b.tar")
    )
    for mode, program in (("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")):
        path = pack(tmp_path / "c.tar", {"0.png": content}, mode)
        assert refusal(lambda: TarPictures(tmp_path / "c.tar")) == (
            f"{path} is compressed and cannot be read in place: {program} it first"
        )
    (tmp_path / "d.tar").write_bytes(content)
    assert f"{tmp_path / 'd.tar'} cannot be read as a tar file" in refusal(
        lambda: TarPictures(tmp_path / "d.tar")
    )
    assert (
        refusal(lambda: TarPictures(f"{tmp_path}/e-*.tar"), OSError)
        == f"no such tar file: {tmp_path}/e-*.tar"
    )
    assert refusal(lambda: find_shards(f"{tmp_path}/{{a..b}}.tar"), OSError).startswith("no such tar file: ")
    assert (
        refusal(lambda: find_shards(f"{tmp_path}/f-{{08..09}}.tar"), OSError)
        == f"no such tar file: {tmp_path}/f-08.tar"
    )
    assert "is an empty range of shards: 9 comes after 2" in refusal(lambda: find_shards("{9..2}.tar"))


# Memory -----------------------------------------------------------------------------------------------------


def test_pictures_in_memory(photographs: np.ndarray) -> None:
    """uint8 as it is; [0, 1] and [-1, 1] to the same values; grey is three equal channels; labels as text."""
    whole = torch.from_numpy(photographs).permute(0, 3, 1, 2)
    for source in (
        TensorPictures(whole),
        TensorPictures.from_unit(whole.float() / 255),
        TensorPictures.from_signed(whole.double() / 127.5 - 1, origin="a test"),
    ):
        assert_holds(source, photographs)
    grey = TensorPictures(whole[:, :1], labels=torch.tensor([3, 1, 2]), prompts=CAPTIONS)
    assert torch.equal(only(grey, 1), whole[1, :1].expand(3, -1, -1))
    assert (grey.labels, grey.prompts, grey.origin) == (["3", "1", "2"], CAPTIONS, "memory")
    assert torch.equal(
        only(TensorPictures.from_signed(torch.tensor([-1.2, 1.2]).reshape(1, 1, 1, 2))),
        torch.tensor([0, 255]).expand(3, 1, 2),
    )


EMPTY = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorPictures(torch.zeros(1, 3, 8, 8)), "pictures are uint8, 0 ... 255, not "
                                                          "torch.float32: from_unit takes"),
        (lambda: TensorPictures(EMPTY[:1].permute(0, 2, 3, 1)), "need a shape (N, 3, H, W) or (N, "
                                                                "1, H, W), not (1, 8, 8, 3)"),
        (lambda: TensorPictures(EMPTY[:0]), "not (0, 3, 8, 8)"),
        (lambda: TensorPictures(EMPTY, labels=[1]), "1 labels for 2 pictures: give one each"),
        (lambda: TensorPictures(EMPTY, prompts=["a"]), "the list of prompts has 1 prompts for 2 pictures"),
        (lambda: TensorPictures.from_unit(torch.full((1, 3, 8, 8), -0.5)), "values from -0.5 to -0.5 are not "
                                                                           "in [0, 1]: from_signed"),
        (lambda: TensorPictures.from_unit(torch.full((1, 3, 8, 8), torch.nan)), "values from nan to nan"),
        (lambda: TensorPictures.from_signed(torch.full((1, 3, 8, 8), torch.nan)), "images with NaN"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_pictures_are_refused(make: Callable[[], TensorPictures], message: str) -> None:
    """Another type, shape, number or range: what is wrong and what would be right."""
    assert message in refusal(make)


def test_profiles_change_no_value(tmp_path: Path) -> None:
    """Published protocols read the values of the file, and so do folders and shards."""
    Image.new("RGB", (8, 8), (200, 20, 100)).save(tmp_path / "0.png", icc_profile=of_colours("g", "r", "b"))
    shard = pack(tmp_path / "a.tar", {"0.png": (tmp_path / "0.png").read_bytes()})
    for source in (FolderPictures(tmp_path), TarPictures(shard)):
        (picture,) = source.read([0])
        assert isinstance(picture, torch.Tensor)
        assert picture[:, 0, 0].tolist() == [200, 20, 100]
