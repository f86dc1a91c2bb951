"""Splits picture files: Pillow gets only what pixels need; orientation, profile and texts are read here."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from PIL import ImageFile

T = TypeVar("T")
MAX_METADATA = 2**24  # bytes of one decompressed text or profile
MAX_PIECES, PIECE = 10_000, 256  # chunks or segments of a small file; bytes of a large one per further piece
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10
PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xda-\xfe]")  # of segments with a length
JPEG_SCAN = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # the same, and the end of the image
RAW_EXIF = b"Raw profile type exif\0"  # the name of ImageMagick's text chunk with EXIF
PNG_METADATA = {b"eXIf": b"", b"iCCP": b"", b"iTXt": b"XML:com.adobe.xmp\0"}  # and their first bytes
PNG_METADATA |= {b"tEXt": RAW_EXIF, b"zTXt": RAW_EXIF}


class PictureFile(NamedTuple):
    """The parts of a picture file; b"" for missing ones.

    kind     PNG, JPEG, WEBP or BMP, by the first bytes
    pixels   the file without metadata
    exif     the TIFF block
    xmp      the XMP packet
    profile  the ICC colour profile
    """

    kind: str
    pixels: bytes
    exif: bytes = b""
    xmp: bytes = b""
    profile: bytes = b""

    @property
    def orientation(self) -> int:
        """EXIF's orientation, 1 ... 8; 1, upright, if there is none that can be read."""
        if tag := _orientation(self.exif):
            return tag
        match = re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])", self.xmp)
        return int(match[1]) if match else 1

    def open(self) -> ImageFile.ImageFile:
        """Opens it with Pillow, without decoding. Raises Pillow's errors."""
        from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

        readers: dict[str, type[ImageFile.ImageFile]] = {
            "PNG": PngImagePlugin.PngImageFile,
            "JPEG": JpegImagePlugin.JpegImageFile,
            "WEBP": WebPImagePlugin.WebPImageFile,
            "BMP": BmpImagePlugin.BmpImageFile,
        }
        return readers[self.kind](io.BytesIO(self.pixels))


def take_apart(content: bytes) -> PictureFile:
    """Splits a file into its parts. ValueError for other kinds of files; Pillow finds damage."""
    if content.startswith(PNG):
        return _png(content)
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg(content)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        pieces = _limit_pieces(content, _webp_chunks(content))
        kinds = b"EXIF", b"XMP ", b"ICCP"
        chunks = {kind: content[start:end] for kind, start, end in pieces if kind in kinds}
        exif = chunks.get(b"EXIF", b"").removeprefix(b"Exif\0\0")
        return PictureFile("WEBP", content, exif, chunks.get(b"XMP ", b""), chunks.get(b"ICCP", b""))
    if content.startswith(b"BM"):
        return PictureFile("BMP", content)
    raise ValueError("it is not a PNG, JPEG, WebP or BMP file")


def png_text(content: bytes, name: bytes) -> str | None:
    """The text of that name in a PNG, None without one; "" if it is damaged or exceeds MAX_METADATA."""
    for kind, start, end in _png_chunks(content):
        if kind in (b"tEXt", b"zTXt", b"iTXt") and content.startswith(name + b"\0", start):
            encoding = "utf-8" if kind == b"iTXt" else "latin-1"
            return _png_text_chunk(kind, content[start:end]).decode(encoding, "replace")
    return None


def webp_size(content: bytes) -> tuple[int, int]:
    """Width and height of a WebP file, before its reader allocates memory; (0, 0) if unknown."""
    kind, head = content[12:16], content[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        sides = int.from_bytes(head[1:5], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", head[6:10])
    return (width & 0x3FFF, height & 0x3FFF) if kind == b"VP8 " else (0, 0)


def _limit_pieces(content: bytes, pieces: Iterator[T]) -> Iterator[T]:
    """The pieces of a file. ValueError if there are too many for its size."""
    for count, piece in enumerate(pieces):
        if count > MAX_PIECES + len(content) // PIECE:
            raise ValueError("it has far more pieces than a picture has: save it again with any program")
        yield piece


def _png(content: bytes) -> PictureFile:
    spans, found = [(0, len(PNG))], {}
    for kind, start, end in _limit_pieces(content, _png_chunks(content)):
        if kind in PNG_PIXELS:
            spans.append((start - 8, end + 4))
        elif kind in PNG_METADATA and content.startswith(PNG_METADATA[kind], start):
            found[kind] = content[start:end]
        if kind == b"tRNS" and content[25:26] in b"\0\2" and content[24:25] in b"\2\4\x10":
            advice = "save it with an alpha channel of 8 bits"
            raise ValueError(f"its transparent colour has {content[24]} bits: {advice}")
    profile = inflate(found.get(b"iCCP", b"").partition(b"\0")[2][1:])
    texts = b"iTXt", b"tEXt", b"zTXt"
    xmp, *raw = (_png_text_chunk(kind, found[kind]) if kind in found else b"" for kind in texts)
    exif = found.get(b"eXIf") or _raw_exif(raw[0] or raw[1])
    return PictureFile("PNG", _join(content, spans), exif, xmp, profile)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of every chunk, and where its content starts and ends."""
    at = len(PNG)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">L4s", content, at)
        yield kind, at + 8, at + 8 + length
        at += length + 12


def _jpeg(content: bytes) -> PictureFile:
    """Drops application segments and comments, but complete JFIF and Adobe ones: they name colour spaces."""
    found: dict[str, bytes] = {}
    spans, rest, profiles = [(0, 2)], 2, []
    for marker, start, end in _limit_pieces(content, _jpeg_segments(content)):
        rest = end
        if marker == 0xE1 and content.startswith(b"Exif\0\0", start):
            found.setdefault("exif", content[start + 6 : end])
        elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0", start):
            found.setdefault("xmp", content[start + 29 : end])
        elif marker == 0xE2 and content.startswith(b"ICC_PROFILE\0", start) and end - start > 14:
            profiles.append((content[start + 12], content[start + 14 : end]))
        jfif = marker == 0xE0 and content.startswith(b"JFIF\0", start) and end - start >= 14
        adobe = marker == 0xEE and content.startswith(b"Adobe", start) and end - start >= 12
        if jfif or adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            spans.append((start - 4, end))
    begin = found_marker.start() if (found_marker := JPEG_MARKER.search(content, rest)) else len(content)
    many = content.count(b"\xff\xda", begin) > MAX_SCANS  # fast, but counts bytes of pixels too
    if many and _count_scans(content, begin) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans: save it again with any program")
    pixels = _join(content, [*spans, (begin, len(content))])
    return PictureFile("JPEG", pixels, profile=b"".join(part for _, part in sorted(profiles)), **found)


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of content of every segment before the pixels; skips bytes between segments."""
    at = 2
    while found := JPEG_MARKER.search(content, at):
        marker, at = content[found.end() - 1], found.end()
        start, end = at + 2, at + int.from_bytes(content[at : at + 2], "big")
        if not start <= end <= len(content) or marker == 0xDA:  # not a segment, or the pixels
            return
        yield marker, start, end
        at = end


def _count_scans(content: bytes, at: int) -> int:
    """The number of scans up to the end of the image, at most one more than allowed."""
    scans = 0
    while scans <= MAX_SCANS and (found := JPEG_SCAN.search(content, at)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        at = found.end() + max(2, int.from_bytes(content[found.end() : found.end() + 2], "big"))
    return scans


def _webp_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 12
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sL", content, at)
        yield kind, at + 8, at + 8 + length
        at += 8 + length + length % 2


def _orientation(exif: bytes) -> int | None:
    """The tag 0x0112 of a TIFF block, None unless it is 1 ... 8."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, at)
            if tag == 0x0112 and kind in (1, 3, 4):
                (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "L"}[kind], exif, at + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:  # cut short
        pass
    return None


def _raw_exif(text: bytes) -> bytes:
    """EXIF from ImageMagick's text: a line feed, a name, a length, and lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split()[2:]).decode("ascii", "replace")).removeprefix(b"Exif\0\0")
    except ValueError:
        return b""


def _png_text_chunk(kind: bytes, chunk: bytes) -> bytes:
    """The decompressed text of a PNG's tEXt, zTXt or iTXt chunk."""
    text, packed = chunk.partition(b"\0")[2], False
    if kind == b"iTXt":  # flag, method, language, the name in that language
        packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    elif kind == b"zTXt":
        packed, text = True, text[1:]
    return inflate(text) if packed else text


def inflate(packed: bytes, most: int = MAX_METADATA) -> bytes:
    """zlib's decompressed bytes; b"" if they are damaged or more than `most`."""
    decoder = zlib.decompressobj()
    try:
        plain = decoder.decompress(packed, most)
    except zlib.error:
        return b""
    return plain if decoder.eof else b""


def _join(content: bytes, spans: Iterable[tuple[int, int]]) -> bytes:
    """The bytes of these spans; `content` itself if they cover it."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    if merged[0][1] >= len(content):
        return content
    view = memoryview(content)
    return b"".join(view[start:end] for start, end in merged)
