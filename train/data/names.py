"""Names of files: which are pictures, which can be written down, and in which order classes come."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

PICTURES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (  # pictures of other formats, and archives, which may hold some
    ".7z", ".apng", ".arw", ".avif", ".bz2", ".cr2", ".cr3", ".dds", ".dib", ".dng", ".eps", ".exr", ".gif",
    ".gz", ".hdr", ".heic",
    ".heif", ".hif", ".icns", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".jxr", ".nef", ".orf", ".pbm",
    ".pcx", ".pfm", ".pgm",
    ".pnm", ".ppm", ".psd", ".raf", ".rar", ".raw", ".rw2", ".svg", ".tar", ".tga", ".tgz", ".tif", ".tiff",
    ".xz", ".zip", ".zst",
)  # fmt: skip
# Folders of the system, without pictures:
SYSTEM = {"#recycle", "$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"}
# Control characters, and bytes that are not UTF-8 as Python reads them:
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are left out."""
    return name.startswith(".") or name in SYSTEM


def looks_like_picture(suffix: str) -> bool:
    """Whether files with this suffix may be pictures or archives of them: .tif, .jpg_large, .zip, or none."""
    return not suffix or suffix.startswith(PICTURES + NOT_READ)


def describe_suffixes(counts: Mapping[str, int]) -> str:
    """Counts as text: "12 .tif, 3 without a suffix"."""
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(counts.items()))


def check_name(place: str | Path, name: str) -> str:
    """Return the name. ValueError if it cannot be written to text files, such as results and reports."""
    if UNPRINTABLE.search(name):
        shown = UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", name)
        raise ValueError(f"a name in {place} is not UTF-8 or holds control characters: rename {shown}")
    return name


def check_path(path: str | Path) -> str:
    """A path of pictures as text. ValueError as in `check_name`, and if it is empty (Python's ".")."""
    if not str(path):
        raise ValueError("the path of the pictures is empty: give that of a folder, or . for this one")
    return check_name("the path of the pictures", str(path))


def class_order(name: str) -> tuple[bool, tuple[int, str], str]:
    """The sort key of classes: numbers by value, then names."""
    return not name.isdecimal(), by_value(name) if name.isdecimal() else (0, ""), name


def by_value(digits: str) -> tuple[int, str]:
    """The sort key of whole numbers, of any length: the same for 7 and 007."""
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0")
    return len(plain), plain


def nfc(name: str) -> str:
    """The name in Unicode form NFC: some systems write é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def number_names(n: int) -> list[str]:
    """Names for n pictures without names, of equal length."""
    return [f"{i:0{max(6, len(str(n - 1)))}d}" for i in range(n)]
