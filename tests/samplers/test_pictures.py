"""Pictures of files: what is read of them, what is refused, and that nothing but the pixels decides."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from samplers import read_image, read_mask
from samplers.picture_files import PNG, take_apart
from samplers.pictures import (
    MAX_PIXELS,
    open_picture,
    open_srgb,
    pixel_difference,
    read_pixels,
    read_settings,
    thumbnail,
    to_srgb,
)

VALUES = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def pictured(path: Path, values: Any, mode: str | None = None, **saved: Any) -> Path:
    Image.fromarray(np.asarray(values, dtype=np.uint8), mode).save(path, **saved)
    return path


def chunk(kind: bytes, data: bytes, checksum: bool = True) -> bytes:
    return (
        struct.pack(">L", len(data))
        + kind
        + data
        + struct.pack(">L", zlib.crc32(kind + data) ^ (not checksum))
    )


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes) -> bytes:
    """A PNG of unfiltered rows, each behind a zero, with chunks before them."""
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG + head + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A TIFF block of (tag, type, count, bytes)."""
    offset, body, table = 8 + 2 + 12 * len(entries) + 4, b"", struct.pack(f"{order}H", len(entries))
    for tag, kind, count, raw in sorted(entries):
        where = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(f"{order}I", offset + len(body))
        table += struct.pack(f"{order}HHI", tag, kind, count) + where
        body += raw if len(raw) > 4 else b""
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + table + bytes(4) + body


def turned(orientation: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(f"{order}H", orientation)


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def photograph(*segments: bytes, size: tuple[int, int] = (48, 32), **saved: Any) -> bytes:
    """A JPEG with more segments behind its first two bytes."""
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "JPEG", **saved)
    return buffer.getvalue()[:2] + b"".join(segments) + buffer.getvalue()[2:]


def refusal(content: bytes) -> str:
    """What is said of a file that is not read, "" of one that is."""
    try:
        read_pixels("a.png", content)
    except ValueError as error:
        return str(error)
    return ""


def array(content: bytes) -> np.ndarray[Any, Any]:
    return read_pixels("a.png", content)


def test_reading_pictures(tmp_path: Path) -> None:
    """Grey, palette, opaque alpha and a turned photograph come as colours in [0, 1]; masks as one channel."""
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3))
    plain = read_image(pictured(tmp_path / "a.png", values))
    assert plain.shape == (1, 3, 4, 6)
    assert torch.equal(plain, torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255)
    opaque = np.concatenate([values, np.full((4, 6, 1), 255)], axis=2)
    assert torch.equal(read_image(pictured(tmp_path / "b.png", opaque)), plain)
    grey = read_image(pictured(tmp_path / "c.png", values[..., 0]))
    assert torch.equal(grey, plain[:, :1].expand(1, 3, 4, 6))
    assert torch.equal(read_mask(tmp_path / "c.png"), plain[:, :1])
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter clockwise
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "d.png", exif=turned)
    assert torch.equal(read_image(tmp_path / "d.png"), plain.flip(2).transpose(2, 3))
    Image.fromarray(values[..., 0].astype(np.uint8)).convert("P").save(tmp_path / "e.png")
    assert read_image(tmp_path / "e.png").shape == (1, 3, 4, 6)


def test_covering_a_size(tmp_path: Path) -> None:
    """A ramp from left to right, 20x40, to 10x10: halved, and a quarter cut off on both sides; upright ramps
    likewise."""
    ramp = np.linspace(0, 255, 40)[None].repeat(20, 0)
    path = pictured(tmp_path / "ramp.png", ramp)
    half = (np.arange(20) * 2 + 0.5) / 39
    expected = torch.from_numpy(half[5:15]).float().expand(1, 1, 10, 10)
    torch.testing.assert_close(read_mask(path, (10, 10)), expected, rtol=0, atol=0.01)
    torch.testing.assert_close(
        read_mask(pictured(path, ramp.T), (10, 10)), expected.transpose(2, 3), rtol=0, atol=0.01
    )
    assert read_image(path, (33, 7)).shape == (1, 3, 33, 7)
    assert torch.equal(read_image(path, (40, 20)), read_image(path))
    edge = pictured(tmp_path / "edge.png", np.eye(16) * 255)
    assert 0 <= float(read_image(edge, (23, 23)).min()) <= float(read_image(edge, (23, 23)).max()) <= 1


def test_large_images_are_small_on_the_sheet() -> None:
    """By a whole factor, averaged; small ones as they are."""
    image = torch.rand(3, 600, 300)
    small = thumbnail(image)
    assert small.shape == (3, 200, 100)
    torch.testing.assert_close(small[:, 5, 7], image[:, 15:18, 21:24].mean((1, 2)))
    assert thumbnail(image, 600) is image
    assert thumbnail(torch.rand(3, 257, 200)).shape == (3, 129, 100)


def test_differences(tmp_path: Path) -> None:
    """In any channel; another size or kind is as far as can be."""
    a, b = np.zeros((4, 4, 3)), np.zeros((4, 4, 3))
    b[2, 1, 1] = 7
    one, other = pictured(tmp_path / "a.png", a), pictured(tmp_path / "b.png", b)
    assert (pixel_difference(one, other), pixel_difference(one, one)) == (7, 0)
    assert pixel_difference(one, pictured(tmp_path / "c.png", a[..., 0])) == 255


# Masks ------------------------------------------------------------------------------------------------------


def test_masks_paint_where_they_are_white_and_opaque(tmp_path: Path) -> None:
    """Luminance times alpha: alpha channels, palettes with transparent entries, a transparent colour. As
    image= all are refused."""
    white = np.full((8, 8, 4), 255)
    white[:, 4:, 3] = 0
    half = white.copy()
    half[..., 3] = 128
    made: dict[str, tuple[bytes | np.ndarray[Any, Any], float]] = {
        "strokes on nothing": (white, 0.5),
        "soft strokes": (half, 128 / 255),
        "grey with alpha": (white[..., 2:], 0.5),
        "palette": (
            png(2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", bytes([255] * 6)), chunk(b"tRNS", b"\0\xff")),
            0.5,
        ),
        "palette, one entry soft": (
            png(2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", bytes([255] * 6)), chunk(b"tRNS", b"\x33")),
            0.6,
        ),
        "a transparent grey": (
            png(2, 1, 8, 0, b"\0\xff\xfe", chunk(b"tRNS", struct.pack(">H", 255))),
            254 / 255 / 2,
        ),
        "a transparent colour": (
            png(2, 1, 8, 2, b"\0\xff\xff\xff\0\0\0", chunk(b"tRNS", struct.pack(">3H", 0, 0, 0))),
            0.5,
        ),
        "a transparent bit": (png(8, 1, 1, 0, b"\0\xf0", chunk(b"tRNS", struct.pack(">H", 0))), 0.5),
    }
    for name, (pixels, right) in made.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(pixels) if isinstance(pixels, bytes) else pictured(path, pixels)
        mask = read_mask(path)
        assert mask.shape[:2] == (1, 1), name
        assert float(mask.mean()) == pytest.approx(right, abs=1e-6), name
        with pytest.raises(ValueError, match="is transparent in places: give it a background first"):
            read_image(path)
    assert read_mask(tmp_path / "strokes on nothing.png", (16, 8)).shape == (1, 1, 16, 8)
    hole = pictured(
        tmp_path / "a hole in black.png", np.concatenate([np.zeros((8, 8, 3)), white[..., 3:]], axis=2)
    )
    with pytest.raises(
        ValueError,
        match=r"a hole in black\.png is black or transparent everywhere: a mask is white and opaque where",
    ):
        read_mask(hole)
    black = np.zeros((2, 2, 4))
    black[..., 3] = 255
    for name, pixels in (
        ("colour", black[..., :3]),
        ("with alpha", black),
        ("grey with alpha", black[..., 2:]),
    ):
        assert not read_mask(pictured(tmp_path / f"black, {name}.png", pixels)).any(), name
    unused = tmp_path / "black, an unused transparent entry.png"
    unused.write_bytes(png(2, 1, 8, 3, b"\0\0\0", chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\xff\0")))
    assert not read_mask(unused).any()


# Orientation and other metadata -----------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(orientation: int, tmp_path: Path) -> None:
    """As Pillow turns the same file, from every place that orientation is written to."""
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    block = exif(turned(orientation), (0x0110, 2, 6, b"camera"))
    hexadecimal = f"\nexif\n{len(block) + 6:8}\n{(b'Exif' + bytes(2) + block).hex()}\n".encode()
    plain = Image.fromarray(VALUES)
    webp, png_file = io.BytesIO(), io.BytesIO()
    plain.save(webp, "WEBP", lossless=True, exif=b"Exif\0\0" + block)
    plain.save(png_file, "PNG", exif=block)
    rows = b"".join(b"\0" + row.tobytes() for row in VALUES)
    files = {
        "jpeg": photograph(segment(0xE1, b"Exif\0\0" + block)),
        "jpeg, big-endian": photograph(
            segment(0xE1, b"Exif\0\0" + exif(turned(orientation, ">"), order=">"))
        ),
        "jpeg, xmp": photograph(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)),
        "jpeg behind fill bytes": photograph(b"\xff\xff" + segment(0xE1, b"Exif\0\0" + block)),
        "png": png_file.getvalue(),
        "png, raw profile": png(
            6, 4, 8, 2, rows, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexadecimal))
        ),
        "png, xmp": png(6, 4, 8, 2, rows, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        "webp": webp.getvalue(),
    }
    for name, content in files.items():
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            right = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        assert np.array_equal(array(content), right), name


ODD_JPEG = {
    "XMP packet as text": segment(0xE1, b"Exif\0\0" + exif(turned(6), (700, 2, 12, b"<x:xmpmeta/>"))),
    "resolution as text": segment(0xE1, b"Exif\0\0" + exif(turned(6), (0x011A, 2, 6, b"72/1\0\0"))),
    "resolution below zero": segment(
        0xE1, b"Exif\0\0" + exif(turned(6), (0x011A, 10, 1, struct.pack("<ii", -1, 1)))
    ),
    "a text for a number": segment(0xE1, b"Exif\0\0" + exif(turned(6), (0x0213, 2, 2, b"1\0"))),
    "resolution NaN": segment(
        0xE1, b"Exif\0\0" + exif(turned(6), (0x011A, 11, 1, struct.pack("<f", float("nan"))))
    ),
    "cut behind the orientation": segment(0xE1, b"Exif\0\0" + exif(turned(6), (0x0213, 3, 1, b"1\0"))[:24]),
    "a second block": segment(0xE1, b"Exif\0\0" + exif(turned(6))) + segment(0xE1, b"Exif\0\0MM\0*no"),
    "a short JFIF": segment(0xE0, b"JFIF\0\1") + segment(0xE1, b"Exif\0\0" + exif(turned(6))),
    "a cut Photoshop block": segment(0xED, b"Photoshop 3.0\x008BIM\4\4")
    + segment(0xE1, b"Exif\0\0" + exif(turned(6))),
    "other pictures that are none": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")
    + segment(0xE1, b"Exif\0\0" + exif(turned(6))),
    "half a profile": segment(0xE2, b"ICC_PROFILE\0\1\3half") + segment(0xE1, b"Exif\0\0" + exif(turned(6))),
    "a million fill bytes": b"\xff" * 10**6 + segment(0xE1, b"Exif\0\0" + exif(turned(6))),
    "other bytes between segments": segment(0xFE, b"a")
    + b"\0\xff\0\xff\xd8" * 10**5
    + segment(0xE1, b"Exif\0\0" + exif(turned(6))),
    "a profile without an end": segment(0xE2, b"ICC_PROFILE\0")
    + segment(0xE1, b"Exif\0\0" + exif(turned(6))),
}
UPRIGHT = {
    "cut": exif(turned(6))[:12], "no block": b"\xff" * 40,
    "a loop": b"II*\0" + struct.pack("<I", 4) + b"\xff" * 20,
    "orientation 9": exif(turned(9)), "orientation as text": exif((0x0112, 2, 2, b"6\0")),
    "far away": b"II*\0\xff\xff\xff\xff",
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD_JPEG.values(), ids=list(ODD_JPEG))
def test_a_photograph_with_odd_metadata_is_read_and_turned(odd: bytes) -> None:
    assert np.array_equal(array(photograph(odd)), np.rot90(array(photograph()), -1))
    assert open_srgb("a.jpg", content=photograph(odd)).size == (32, 48)


@pytest.mark.parametrize("block", UPRIGHT.values(), ids=list(UPRIGHT))
def test_an_orientation_that_cannot_be_read_is_none(block: bytes) -> None:
    assert np.array_equal(array(photograph(segment(0xE1, b"Exif\0\0" + block))), array(photograph()))


def test_metadata_of_a_png_never_matters() -> None:
    """Long texts, some that unpack to far more, wrong checksums, broken profiles, senseless animation chunks:
    the pixels are the same."""
    rows = b"".join(b"\0" + row.tobytes() for row in VALUES)
    bomb = zlib.compress(bytes(2**26))
    odd = {
        "2 MiB of text": chunk(b"tEXt", b"workflow\0" + b"x" * 2**21),
        "70 texts of 1 MiB": b"".join(chunk(b"tEXt", b"%d\0" % i + b"x" * 2**20) for i in range(70)),
        "a packed text of 64 MiB": chunk(b"zTXt", b"settings\0\0" + bomb),
        "another one": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
        "as EXIF": chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb),
        "as profile": chunk(b"iCCP", b"name\0\0" + bomb),
        "no profile": chunk(b"iCCP", b"name\0\0nothing"),
        "a profile packed in another way": chunk(b"iCCP", b"name\0\7nothing"),
        "an unknown way of packing": chunk(b"zTXt", b"text\0\7nothing"),
        "wrong checksum": chunk(b"tEXt", b"a\0b", checksum=False),
        "half a gamma": chunk(b"gAMA", b"\0"),
        "animation": chunk(b"acTL", b"\0") + chunk(b"fcTL", bytes(26)),
        "odd EXIF": chunk(b"eXIf", b"II*\0\xff"),
    }
    for name, extra in odd.items():
        assert np.array_equal(array(png(6, 4, 8, 2, rows, extra)), VALUES), name
        assert np.array_equal(np.asarray(open_srgb("a.png", content=png(6, 4, 8, 2, rows, extra))), VALUES), (
            name
        )


def test_settings_are_read_within_bounds(tmp_path: Path) -> None:
    """From any kind of text, unless it is longer than 1 MiB; what does not end, or holds what JSON does not
    know, are no settings."""
    rows, path = b"\0\0", tmp_path / "a.png"
    for text in (
        (b"tEXt", b"settings\0" + b'{"a": 1}'),
        (b"zTXt", b"settings\0\0" + zlib.compress(b'{"a": 1}')),
        (b"iTXt", b'settings\0\0\0\0\0{"a": 1}'),
    ):
        path.write_bytes(png(1, 1, 8, 0, rows, chunk(*text)))
        assert read_settings(path) == {"a": 1}
    long = b'{"a": "' + b"x" * 2**20 + b'"}'
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    no_settings = [long, deep, b'{"a": NaN}', b'{"a": 1e999}', b"\xff", b"[]", b'{"a": ' + b"1" * 5000 + b"}"]
    for content in [chunk(b"tEXt", b"settings\0" + text) for text in no_settings] + [
        chunk(b"zTXt", b"settings\0\0" + zlib.compress(bytes(2**26)))
    ]:
        path.write_bytes(png(1, 1, 8, 0, rows, content))
        with pytest.raises(ValueError, match=r"a\.png has no settings"):
            read_settings(path)


# What is refused --------------------------------------------------------------------------------------------


def transparent(path: Path) -> None:
    pictured(path, np.zeros((4, 4, 4)))


def deep(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(path)


def cut(path: Path) -> None:
    pictured(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    path.write_bytes(path.read_bytes()[:5000])


def huge(path: Path) -> None:
    path.write_bytes(png(20000, 20000, 1, 0, b""))


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, behind a comment that holds the mark of the end."""
    content = photograph(progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    scans = count - content.count(b"\xff\xda")
    return content[:-2] + segment(0xFE, b"\xff\xd9") + last * scans + content[-2:]


def thin(path: Path) -> None:
    path.write_bytes(png(1, 2**27, 8, 2, b""))


def huge_webp(path: Path) -> None:
    head = b"VP8X" + struct.pack("<L", 10) + bytes(4) + b"\xff\x3f\0" * 2
    path.write_bytes(b"RIFF" + struct.pack("<L", len(head) + 4) + b"WEBP" + head)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    path.symlink_to("/dev/zero")


def spread(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


def animated(path: Path) -> None:
    Image.new("L", (4, 4)).save(path, "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 255)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("no"), "cannot be read as a picture: it is not a PNG, JPEG, WebP or "
                                             "BMP file"),
        (lambda path: path.write_text(""), "cannot be read as a picture: it is not a PNG, JPEG, WebP or "
                                           "BMP file"),
        (lambda path: path.mkdir(), "cannot be read: it is a folder, not a file"),
        (lambda path: None, "no such picture"),
        (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "it is not a PNG, JPEG, WebP or BMP file"),
        (animated, "it is not a PNG, JPEG, WebP or BMP file"),
        (pipe, "cannot be read: it is a device or pipe, not a file"),
        (listening, "cannot be read: it is a device or pipe, not a file"),
        (transparent, "is transparent in places: give it a background first"),
        (deep, "has pixels of more than 8 bits"),
        (lambda path: path.write_bytes(png(1, 1, 16, 2, bytes(7), chunk(b"tRNS", bytes(6)))),
            "its transparent colour has 16 bits"),
        (lambda path: path.write_bytes(png(4, 1, 2, 0, bytes(2), chunk(b"tRNS", bytes(2)))), "its "
                                                                                             "transparent "
                                                                                             "colour has "
                                                                                             "2 bits"),
        (cut, "cannot be read as a picture: "),
        (lambda path: path.write_bytes(photograph()[:-200]), "cannot be read as a picture: "),
        (huge, "has 20000x20000 = 400,000,000 pixels, more than max_pixels=134,217,728: make it smaller, "
               "or raise max_pixels"),
        (thin, "has 1x134217728 pixels, but a side may have at most 1,048,576"),
        (huge_webp, "has 16384x16384 = 268,435,456 pixels, more than max_pixels=134,217,728: make it "
                    "smaller, or raise max_pixels"),
        (lambda path: path.write_bytes(png(1, 1, 8, 0, b"\0\0", chunk(b"tEXt", b"") * 12_000)),
            "it has far more pieces"),
        (lambda path: path.write_bytes(photograph(segment(0xFE, b"") * 12_000)),
            "it has far more pieces"),
        (lambda path: path.write_bytes(many_scans(101)), "cannot be read as a picture: it has more than "
                                                         "100 scans"),
        (spread, "has 1,099,511,627,776 bytes"),
    ],
    ids=[
        "text", "empty", "folder", "missing", "PostScript", "GIF", "pipe", "device", "transparent", "16 bits",
        "a transparent colour of 16 bits", "a transparent grey of 2 bits",
        "cut off", "half a photograph", "huge", "thin", "huge WebP", "many chunks", "many segments",
        "many scans", "a file of 1 TB",
    ],
)  # fmt: skip
def test_what_is_no_picture(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    """One line that names the file, whoever reads it."""
    path = tmp_path / "a.png"
    make(path)
    for read in (read_image, open_srgb, read_pixels, lambda path: pixel_difference(path, path)):
        if read not in (read_image, open_srgb, read_pixels) and "transparent in" in message:
            continue
        with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
            read(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_files_end_in_one_line(kind: str) -> None:
    """Cut anywhere, or with bytes changed: read, or ValueError in one line; a link and any suffix are as good
    as the file itself."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    content, random = buffer.getvalue(), np.random.default_rng(0)
    assert array(content).shape == (16, 16, 3)
    damaged = [content[:n] for n in range(0, len(content), 7)]
    for _ in range(200):
        changed = np.frombuffer(content, np.uint8).copy()
        changed[random.integers(0, min(len(changed), 200), 3)] = random.integers(0, 256, 3)
        damaged.append(changed.tobytes())
    assert not any("\n" in refusal(data) for data in damaged)


def test_by_content_not_by_name(tmp_path: Path) -> None:
    pictured(tmp_path / "a.png", VALUES).rename(tmp_path / "a.jpg")
    (tmp_path / "b").symlink_to(tmp_path / "a.jpg")
    assert np.array_equal(read_pixels(tmp_path / "b"), VALUES)


# Size and memory --------------------------------------------------------------------------------------------


def test_the_limit_can_be_raised(tmp_path: Path) -> None:
    """A photograph of 102 million pixels is read; a limit of one's own holds in every reader."""
    path = tmp_path / "a.png"
    path.write_bytes(png(11648, 8736, 1, 0, bytes(8736 * (1 + 11648 // 8))))
    assert MAX_PIXELS > 11648 * 8736 == 101_756_928
    assert open_picture(path, "L").size == (11648, 8736)
    pictured(path, VALUES)
    for read in (open_picture, open_srgb, read_image, read_mask, read_pixels):
        assert read(path, max_pixels=24) is not None
        with pytest.raises(
            ValueError,
            match=r"a\.png has 6x4 = 24 pixels, more than max_pixels=23: make it smaller, or raise "
            r"max_pixels",
        ):
            read(path, max_pixels=23)


def test_strips_are_the_whole_picture() -> None:
    """More than a strip's worth of pixels, in grey and colour, come out as Pillow's own array."""
    grey = np.random.default_rng(0).integers(0, 256, (1500, 1001), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", compress_level=1)
    assert np.array_equal(array(buffer.getvalue()), np.repeat(grey[..., None], 3, axis=2))


# Kinds of pixels --------------------------------------------------------------------------------------------


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.fromarray(VALUES), Image.fromarray(255 - VALUES)]
    for kind in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
        with Image.open(io.BytesIO(buffer.getvalue())) as picture:
            assert picture.n_frames == 2
        assert np.array_equal(array(buffer.getvalue()), VALUES), kind


def test_deep_colours_cmyk_palettes_and_bits() -> None:
    """16 bits to within one step of 255; ink by complement, as Pillow and torchvision have it; 1, 2 and 4
    bits over the whole range."""
    deep = np.random.default_rng(0).integers(0, 65536, (4, 6, 3))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    assert np.abs(array(png(6, 4, 16, 2, rows)) - deep / 257).max() < 1
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (255, 0, 0, 51)).save(buffer, "JPEG", quality=100)
    assert np.abs(array(buffer.getvalue()) - np.array([0, 204, 204])).max() <= 2
    assert array(png(8, 1, 1, 0, b"\0\x0f"))[0, :, 0].tolist() == [0] * 4 + [255] * 4
    assert array(png(4, 1, 2, 0, b"\0\x1b"))[0, :, 0].tolist() == [0, 85, 170, 255]
    assert array(png(2, 1, 4, 0, b"\0\x3f"))[0, :, 0].tolist() == [51, 255]
    assert (
        array(png(4, 1, 2, 3, b"\0\x1b", chunk(b"PLTE", VALUES[0, :4].tobytes())))[0].tolist()
        == VALUES[0, :4].tolist()
    )


def test_what_the_decoder_tells_colours_by_is_kept() -> None:
    """An Adobe segment says that a JPEG's three channels are colours as they stand; other applications'
    segments and comments go."""
    plain = take_apart(photograph(segment(0xEE, b"Adobe\0d\0\0\0\0\0")))
    assert b"Adobe\0d" in plain.pixels
    assert take_apart(photograph(segment(0xEC, b"Ducky"), segment(0xFE, b"hello"))).pixels == photograph()
    buffer = io.BytesIO()
    Image.fromarray(np.tile(VALUES, (8, 8, 1))).save(buffer, "JPEG", keep_rgb=True)
    with Image.open(io.BytesIO(buffer.getvalue())) as picture:
        assert np.array_equal(array(buffer.getvalue()), np.asarray(picture))


# Colour profiles --------------------------------------------------------------------------------------------

SRGB = {
    "r": (0.4360, 0.2225, 0.0139),
    "g": (0.3851, 0.7169, 0.0971),
    "b": (0.1431, 0.0606, 0.7141),
}  # primaries as profiles hold them


def profile(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">L", 2) + b"x\0" + bytes(78),
        b"wtpt": xyz(0.9642, 1, 0.8249),
        **tags,
    }
    table, body, start = struct.pack(">L", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sLL", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">L4sL4s4s4s12x4s", start + len(body), b"", 0x02400000, kind, space, connection, b"acsp"
    )
    return head.ljust(68, b"\0") + struct.pack(">3L", 0xF6D6, 0x10000, 0xD32D) + bytes(48) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3l", *(round(value * 65536) for value in values))


LINEAR = b"curv" + bytes(4) + struct.pack(">L", 0)


def of_colours(r: str, g: str, b: str, curve: bytes = LINEAR) -> bytes:
    """Linear light in these primaries."""
    primaries = {f"{to}XYZ".encode(): xyz(*SRGB[source]) for to, source in zip("rgb", (r, g, b), strict=True)}
    return profile(b"RGB ", b"mntr", b"XYZ ", {**primaries, **{f"{to}TRC".encode(): curve for to in "rgb"}})


def of_ink() -> bytes:
    """CMYK in which any amount of black is black, any other ink alone a grey of L* = 50, and none is white;
    from a table of corners."""
    corners = np.array([255 if not any(ink) else 0 if ink[3] else 128 for ink in np.ndindex(2, 2, 2, 2)])
    table = np.stack([corners, np.full(16, 128), np.full(16, 128)], axis=1).astype(np.uint8).tobytes()
    identity = struct.pack(">9l", *(65536 * (i % 4 == 0) for i in range(9)))
    ramp = bytes(range(256))
    return profile(
        b"CMYK",
        b"prtr",
        b"Lab ",
        {b"A2B0": b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp},
    )


def encoded(light: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """sRGB's curve, on 0 ... 255."""
    return 255 * np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055
    )


def with_profile(values: Any, icc: bytes, kind: str = "PNG", mode: str | None = None, **saved: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8), mode).save(buffer, kind, icc_profile=icc, **saved)
    return buffer.getvalue()


def in_srgb(content: bytes, mode: Any = "RGB") -> np.ndarray[Any, Any]:
    return np.asarray(open_srgb("a.png", mode, content)).astype(float)


def test_colours_are_converted_to_srgb() -> None:
    """Linear light, and red and green exchanged, by sRGB's formula; whatever is read raw keeps its values."""
    for order, name in (((0, 1, 2), "rgb"), ((1, 0, 2), "grb")):
        icc = of_colours(*name)
        for kind in ("PNG", "WEBP"):
            content = with_profile(VALUES, icc, kind, lossless=True)
            assert np.abs(in_srgb(content) - encoded(VALUES[..., order] / 255)).max() <= 1.5, (name, kind)
            assert np.array_equal(array(content), VALUES)
    flat = with_profile(np.full((16, 16, 3), 100), of_colours(*"rgb"), "JPEG", quality=100)
    assert np.abs(in_srgb(flat) - encoded(np.float64(100 / 255))).max() <= 2
    alpha = np.concatenate([VALUES, np.full((4, 6, 1), 255)], axis=2)
    assert np.array_equal(
        in_srgb(with_profile(alpha, of_colours(*"rgb"))), in_srgb(with_profile(VALUES, of_colours(*"rgb")))
    )


def test_grey_and_ink_are_converted() -> None:
    """Linear greys by sRGB's formula, also where the profile is one of colours; ink by its table, and not by
    complement."""
    grey = profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": LINEAR})
    for icc in (grey, of_colours(*"rgb")):
        values = VALUES[..., 0].clip(
            15
        )  # LittleCMS resamples the curve of a grey profile, which is steep below
        content = with_profile(values, icc)
        assert np.abs(in_srgb(content, "L") - encoded(values / 255)).max() <= 1.5
        assert in_srgb(content).shape == (4, 6, 3)
    for ink, right in (
        ((0, 0, 0, 0), 255),
        ((0, 0, 0, 255), 0),
        ((255, 0, 0, 0), encoded(np.float64(0.1842))),
    ):
        content = with_profile(np.full((8, 8, 4), ink), of_ink(), "JPEG", "CMYK", quality=100)
        assert np.abs(in_srgb(content) - right).max() <= 4, ink


def test_profiles_that_change_nothing() -> None:
    """sRGB's own, to the bit; a broken one, one for another kind of picture, and none at all, which costs
    nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ink, grey = of_ink(), profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": LINEAR})
    for icc in (srgb, srgb[:200], b"nothing", of_colours(*"rgb")[:300], ink, grey):
        assert np.array_equal(in_srgb(with_profile(VALUES, icc)), VALUES)
    picture = Image.fromarray(VALUES)
    assert to_srgb(picture) is picture
