"""Folders of pictures: one listing for training, captions and evaluation, and nothing left out without a
word."""

from __future__ import annotations

import base64
import os
import socket
import tarfile
import unicodedata
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from eval.images.open import open_source
from train.data import PictureData
from train.data.change import PACKED, describe_change, pack
from train.data.folder import FolderPictures
from train.data.names import class_order
from train.data.pictures import CaptionedImages
from train.data.source import Unreadable
from train.data.tar import TarPictures
from train.run import run
from train.state import require_same


def put(path: Path, caption: str | None = None, colour: int = 0) -> Path:
    """A picture, whatever its name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(path, "png")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def packed(folder: Path) -> str:
    return str(PictureData(folder).fixed_settings[PACKED])


def refusal(folder: Path) -> str:
    """What all readers say of a folder, in one line."""
    found = set()
    for read in (PictureData, FolderPictures):
        with pytest.raises(ValueError, match=str(folder)) as said:
            read(folder)
        found.add(str(said.value))
    (one,) = found
    assert "\n" not in one
    return one


def test_all_readers_find_the_same_pictures(tmp_path: Path) -> None:
    """Hidden entries and those of systems left aside, every suffix in any case, sub-folders of classes and
    linked ones entered."""
    store = tmp_path / "store"
    for name in ("a.png", "deep/b.JPG", "deep/c.Jfif", "d.jpe", "e.jpeg", "f.webp", "g.bmp"):
        put(store / name, "a picture")
    root = tmp_path / "root"
    put(root / "cat" / "z.png", "a cat")
    (root / "dog").symlink_to(store)
    for name in (
        ".ipynb_checkpoints/0.png",
        "cat/.ipynb_checkpoints/0.png",
        "cat/._z.png",
        "__MACOSX/cat/z.png",
        "cat/@eaDir/z.png",
    ):
        put(root / name)
    (root / "cat" / "Thumbs.db").touch()
    (root / "cat" / "notes.md").touch()
    expected = [
        "cat/z.png",
        *(
            f"dog/{name}"
            for name in ("a.png", "d.jpe", "deep/b.JPG", "deep/c.Jfif", "e.jpeg", "f.webp", "g.bmp")
        ),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data, captioned, scored = PictureData(root), CaptionedImages(root), FolderPictures(root)
    assert list(data.pictures.names) == list(captioned.pictures.names) == list(scored.names) == expected
    assert [scored.file(i) for i in range(8)] == [root / name for name in expected]
    assert captioned.captions == scored.prompts == ["a cat", *["a picture"] * 7]
    assert data.classes == ["cat", "dog"]
    assert data.labels is not None
    assert [data.classes[i] for i in data.labels] == scored.labels == ["cat", *["dog"] * 7]
    assert data.fixed_settings == {"classes": ["cat", "dog"], PACKED: packed(root)}


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    """Training warns, evaluation keeps count: other formats in any case, odd suffixes of known ones, and
    files without any."""
    put(tmp_path / "a.png", "a")
    for name in (
        "b.tif",
        "c.TIF",
        "d.heic",
        "e.jpg_large",
        "f.gif",
        "8c7f",
        "more.tar.gz",
        "notes.md",
        "labels.csv",
    ):
        (tmp_path / name).touch()
    said = (
        f"files of {tmp_path} that are not read: 1 without a suffix, 1 .gif, 1 .gz, 1 .heic, 1 .jpg_large, "
        "2 .tif"
    )
    for read in (PictureData, CaptionedImages):
        with pytest.warns(UserWarning) as warned:  # noqa: PT030
            read(tmp_path)
        assert [str(each.message) for each in warned] == [said]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = FolderPictures(tmp_path)
        assert source.prompts == ["a"]
    assert source.ignored == {"": 1, ".gif": 1, ".gz": 1, ".heic": 1, ".jpg_large": 1, ".tif": 2}


def test_a_class_without_pictures_is_refused(tmp_path: Path) -> None:
    """One of .tif alone, of text alone, or empty would change the numbers of the classes after it. Beside
    loose pictures, it is none."""
    put(tmp_path / "cat" / "a.png")
    for name in ("ant/a.tif", "ant/a.txt", "ant/.hidden.png", "ant/"):
        (tmp_path / "ant").mkdir()
        if not name.endswith("/"):
            (tmp_path / name).touch()
        assert refusal(tmp_path).startswith(
            f"{tmp_path / 'ant'} is a class without a picture that can be read: add some (.bmp, .jfif, "
        )
        for path in (tmp_path / "ant").iterdir():
            path.unlink()
        (tmp_path / "ant").rmdir()
    put(tmp_path / "loose" / "b.png")
    (tmp_path / "loose" / "masks").mkdir()
    assert PictureData(tmp_path / "loose").num_classes is None
    assert FolderPictures(tmp_path / "loose").labels is None


def test_mixed_and_doubled_folders_are_refused_alike(tmp_path: Path) -> None:
    """Classes beside loose pictures; links in a circle, to themselves, nowhere, or to one folder twice; one
    name in two Unicode forms."""
    put(tmp_path / "mixed" / "cat" / "a.png")
    put(tmp_path / "mixed" / "b.png")
    assert "mixes class folders (cat, ...) and loose pictures (b.png, ...)" in refusal(tmp_path / "mixed")
    put(tmp_path / "circle" / "cat" / "a.png")
    (tmp_path / "circle" / "cat" / "again").symlink_to(tmp_path / "circle")
    assert refusal(tmp_path / "circle").endswith(
        f"again is the same folder as {tmp_path / 'circle'}: keep one of them"
    )
    (tmp_path / "circle" / "cat" / "again").unlink()
    for target in ("loop", "nothing"):  # otherwise a class would vanish
        (tmp_path / "circle" / "loop").symlink_to(target)
        assert (
            refusal(tmp_path / "circle")
            == f"{tmp_path / 'circle' / 'loop'} is a link that cannot be followed: mend or remove it"
        )
        (tmp_path / "circle" / "loop").unlink()
    (tmp_path / "circle" / "cat" / "b.png").symlink_to("nothing.png")
    (unreadable,) = FolderPictures(tmp_path / "circle").read([1])
    assert "b.png" in getattr(unreadable, "reason", "")
    put(tmp_path / "forms" / "caf\u00e9" / "a.png")
    put(tmp_path / "forms" / "cafe\u0301" / "a.png")
    assert "two folders caf\u00e9, whose names differ in Unicode form only" in refusal(tmp_path / "forms")


def test_names_that_cannot_be_written_down_are_refused(tmp_path: Path) -> None:
    """Latin-1, and line breaks, in the name of a picture or of a folder on the way: shown so that it can be
    found. Empty paths too."""
    for name, shown in (
        (b"caf\xe9.png", r"caf\xe9.png"),
        (b"caf\xe9/a.png", r"caf\xe9"),
        (b"a\nb.png", r"a\x0ab.png"),
    ):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        put(Path(os.fsdecode(os.path.join(os.fsencode(place), name))))
        assert refusal(place) == f"a name in {place} is not UTF-8 or holds control characters: rename {shown}"
    for read in (FolderPictures, PictureData, CaptionedImages, open_source):
        with pytest.raises(
            ValueError,
            match=r"^the path of the pictures is empty: give that of a folder, or \. for this one$",
        ):
            read("")
    with pytest.raises(
        ValueError, match=r"a name in the path of the pictures is not UTF-8 .* rename .*caf\\xe9$"
    ):
        FolderPictures(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"1", b"caf\xe9")))


def test_captions_are_found_whatever_the_form_of_names(tmp_path: Path) -> None:
    """é in two characters beside é in one, .TXT, and metadata.jsonl written on another system; two that
    differ are refused."""
    put(tmp_path / "caf\u00e9.png")
    put(tmp_path / "b.png")
    put(tmp_path / "na\u00efve.png")
    (tmp_path / "cafe\u0301.txt").write_text("coffee")
    (tmp_path / "b.TXT").write_text("b")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "nai\u0308ve.png", "text": "simple"}', encoding="utf-8"
    )
    expected = {"b.png": "b", "caf\u00e9.png": "coffee", "na\u00efve.png": "simple"}
    assert (
        dict(zip(FolderPictures(tmp_path).names, CaptionedImages(tmp_path).captions, strict=True)) == expected
    )
    assert FolderPictures(tmp_path).prompts == list(expected.values())
    (tmp_path / "caf\u00e9.txt").write_text("tea")
    with pytest.raises(
        ValueError,
        match=r"caf\u00e9.png has two captions, in caf.*txt and caf.*txt: keep one",
    ):
        CaptionedImages(tmp_path)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not left out, as by os.walk."""
    put(tmp_path / "cat" / "a.png")
    put(tmp_path / "dog" / "a.png")
    scandir = os.scandir

    def guarded(place: Path) -> object:
        if place.name == "dog":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path / 'dog'}'"):
        FolderPictures(tmp_path)


def test_classes_are_in_one_order() -> None:
    """Numbers first, by value, however long; then names."""
    wanted = ["2", "007", "\u0668", "10", "1" * 5000, "2" * 5000, "a", "b", "\u00b2"]
    given = sorted(wanted)
    assert sorted(given, key=class_order) == wanted


def test_the_limit_of_pixels_can_be_raised(tmp_path: Path) -> None:
    """By the setting that the message names, in training, captions and evaluation."""
    put(tmp_path / "a.png", "a")
    for read in (
        lambda **limit: PictureData(tmp_path, **limit),
        lambda **limit: CaptionedImages(tmp_path, **limit).read(0, 4, 4),
        lambda **limit: CaptionedImages(tmp_path, **limit).fingerprint(),
    ):
        read(max_pixels=16)
        with pytest.raises(ValueError, match=r"a\.png .* more than max_pixels=15: .* raise max_pixels"):
            read(max_pixels=15)
    (picture,) = FolderPictures(tmp_path, max_pixels=15).read([0])
    assert "raise max_pixels" in getattr(picture, "reason", "")
    assert FolderPictures(tmp_path, max_pixels=15).stamp != FolderPictures(tmp_path).stamp
    (tmp_path / "a.png").write_bytes(bytes(2**20 + 9))
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(tmp_path / "a.png", "a.png")
    for source, place in (
        (FolderPictures(tmp_path, max_pixels=1), tmp_path),
        (TarPictures(tmp_path / "a.tar", max_pixels=1), "a.tar"),
    ):
        (picture,) = source.read([0])  # not even opened
        assert f"{place}/a.png has 1,048,585 bytes, more than 8 per pixel of max_pixels=1: " in getattr(
            picture, "reason", ""
        )


def test_pipes_and_sockets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called like a picture, a caption or a list of captions, they are what cannot be read, and nobody waits
    for them."""
    put(tmp_path / "a.png", "a")
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("b.png")
        said = f"{tmp_path / 'b.png'} cannot be read: it is a device or pipe, not a file"
        with pytest.raises(ValueError, match=f"^{said}$"):
            PictureData(tmp_path).__getitems__([0, 1])
        whole, unreadable = FolderPictures(tmp_path).read([0, 1])
        assert (isinstance(whole, Tensor), unreadable) == (True, Unreadable(said))
    (tmp_path / "b.png").unlink()
    for name in ("a.txt", "metadata.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        for read in (lambda: CaptionedImages(tmp_path), lambda: FolderPictures(tmp_path).prompts):
            with pytest.raises(
                ValueError,
                match=f"^{tmp_path / name} cannot be read: it is a (folder|device or pipe), not a file$",
            ):
                read()
        (tmp_path / name).unlink()


def test_the_form_of_names_changes_no_order(tmp_path: Path) -> None:
    """\u00e9 in one character, which sorts behind z, or in two, which sort before: the same pictures have the
    same numbers."""
    for form in ("NFC", "NFD"):
        for name in ("caf\u00e9/1.png", "caff/\u00e9.png", "caff/f.png"):
            put(tmp_path / form / unicodedata.normalize(form, name))
    one, other = (PictureData(tmp_path / form) for form in ("NFC", "NFD"))
    assert [unicodedata.normalize("NFC", name) for name in other.pictures.names] == list(one.pictures.names)
    assert other.fixed_settings == one.fixed_settings


def test_a_run_goes_on_with_the_same_pictures_and_classes_alone(tmp_path: Path) -> None:
    """Which number is which class is kept, and what the pictures are called. They may move, and max_pixels
    may be raised."""
    for name in ("cat", "horse"):
        for i in range(2):
            put(tmp_path / "a" / name / f"{i}.png", colour=len(name))
    network = {
        "name": "dit",
        "in_channels": 1,
        "image_size": 4,
        "patch_size": 2,
        "hidden": 8,
        "depth": 1,
        "heads": 1,
    }
    data = {"name": "folder", "channels": 1}
    config = {
        "run": str(tmp_path / "run"),
        "objective": {"name": "denoising", "weighting": {"name": "uniform"}},
        "progress": False,
        "wandb": False,
        "device": "cpu",
    }

    def go_on(folder: str, steps: int, classes: int = 2, **more: int) -> None:
        run(
            {
                **config,
                "model": {
                    "network": {**network, "num_classes": classes},
                    "schedule": {"name": "flow"},
                    "prediction": "flow",
                },
                "data": {**data, "folder": str(tmp_path / folder), **more},
                "train": {"steps": steps, "batch_size": 2},
                "resume": True,
            }
        )

    def refused(change: str) -> None:
        with pytest.raises(ValueError, match=change) as said:
            go_on("b", 3)
        assert len(str(said.value).replace(str(tmp_path), "")) < 200

    go_on("a", 1)
    (tmp_path / "a").rename(tmp_path / "b")
    go_on("b", 2, max_pixels=16)
    cat, horse, eel = (tmp_path / "b" / name for name in ("cat", "horse", "eel"))
    put(eel / "0.png")
    refused(
        r"run was trained with classes\[1\]='horse', not 'eel': use"
    )  # whatever number of classes is asked for
    with pytest.raises(ValueError, match=r"classes\[1\]='horse', not 'eel': use"):
        go_on("b", 3, classes=3)
    (eel / "0.png").unlink()
    eel.rmdir()
    cat.rename(eel)
    horse.rename(cat)
    eel.rename(horse)
    refused(r"run was trained with what is now cat/0\.png as horse/0\.png: use the same pictures")
    cat.rename(eel)
    horse.rename(cat)
    eel.rename(horse)
    put(cat / "0.png", colour=99)  # a picture may be mended
    (cat / "1.png").write_bytes(b"broken")
    go_on("b", 2)
    before = packed(tmp_path / "b")
    (cat / "0.png").write_bytes((horse / "0.png").read_bytes())  # no class has moved
    assert describe_change(before, packed(tmp_path / "b")) == ""
    for i in range(2):
        (horse / f"{i}.png").rename(horse / f"{i}.jpg")
    refused(r"run was trained with horse/0\.png and without horse/0\.jpg: use")
    horse.rename(tmp_path / "b" / "ant")
    refused(r"classes\[0\]='cat', not 'ant'")


def test_changed_names_are_told_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first picture that went and the first that came, however many and however long; numbers take few
    bytes each."""

    before = [f"{i:07d}.png" for i in range(20_000)]
    then = pack(before)
    assert len(then) < 4 * len(before)
    for now, change in (
        (before, ""),
        (before[:7] + before[8:], "with 0000007.png"),
        ([*before, "a" * 9000], "without " + "a" * 60),
        (["a.png", "b.png", *before[2:]], "with 0000000.png and without a.png"),
    ):
        assert describe_change(then, pack(now)) == change
    earlier = pack(
        sorted(f"{name}/0.png" for name in ("a", "e\u0301te\u0301", "f", "zebra"))
    )  # names as macOS keeps them
    sorted_now = pack([f"{name}/0.png" for name in ("a", "f", "zebra", "\u00e9t\u00e9")])
    with pytest.raises(
        ValueError,
        match=r"^a run cannot be resumed: an earlier version .* Unicode form .*: start anew in another",
    ):
        require_same(Path("a run"), {PACKED: earlier}, {PACKED: sorted_now})
    monkeypatch.setattr("train.data.change.MAX_NAMES", 2**20)
    bomb = base64.b64encode(zlib.compress(bytes(2**20 + 1), 1)).decode()
    for damaged in (then[:-8], then[:9], "no base64", bomb, 3):
        with pytest.raises(
            ValueError, match=r"a run cannot be resumed: the checkpoint's list of pictures is damaged"
        ):
            require_same(Path("a run"), {PACKED: damaged}, {PACKED: then})
