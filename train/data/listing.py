"""Lists the pictures of a folder, their order and their classes, for training and evaluation alike."""

from __future__ import annotations

import base64
import hashlib
import os
import posixpath
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from samplers.picture_files import inflate

PICTURES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (  # pictures of other formats, and archives, which may hold some
    ".7z", ".apng", ".arw", ".avif", ".bz2", ".cr2", ".cr3", ".dds", ".dib", ".dng", ".eps", ".exr", ".gif", ".gz", ".hdr", ".heic",
    ".heif", ".hif", ".icns", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".jxr", ".nef", ".orf", ".pbm", ".pcx", ".pfm", ".pgm",
    ".pnm", ".ppm", ".psd", ".raf", ".rar", ".raw", ".rw2", ".svg", ".tar", ".tga", ".tgz", ".tif", ".tiff", ".xz", ".zip", ".zst",
)  # fmt: skip
SYSTEM = {"#recycle", "$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"}  # folders without pictures
PACKED = "files, packed"  # the checkpoint's setting that identifies the pictures: see `Listing.packed`
MAX_NAMES = 2**28  # bytes of the names of all pictures: those of millions
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8 as Python reads them


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder and its sub-folders.

    names     paths of the pictures relative to the folder, with slashes, sorted by their parts
    texts     paths of the .txt files, unsorted
    folders   names of the immediate sub-folders
    left_out  counts of files that look like pictures, or may hold some, but are not read, by suffix: {".tif": 12}
    """

    folder: Path
    names: Sequence[str]
    texts: Sequence[str]
    folders: Sequence[str]
    left_out: Mapping[str, int]

    @cached_property
    def files(self) -> list[Path]:
        """The paths of the pictures."""
        return [self.folder / name for name in self.names]

    @cached_property
    def labels(self) -> list[str] | None:
        """The class of each picture, which is its immediate sub-folder; None without sub-folders.

        ValueError for pictures both in sub-folders and beside them, and for a class without pictures: leaving it out would change the
        numbers of later classes.
        """
        loose = [name for name in self.names if "/" not in name]
        labels = [same_text(name.split("/", 1)[0]) for name in self.names if "/" in name]
        if not labels:
            return None
        if loose:
            raise ValueError(
                f"{self.folder} mixes class folders ({labels[0]}, ...) and loose pictures ({loose[0]}, ...): "
                f"keep one kind, or give a folder in it, such as {self.folder / labels[0]}"
            )
        there = set(labels)
        if empty := sorted(name for name in self.folders if same_text(name) not in there):
            raise ValueError(
                f"{self.folder / empty[0]} is a class without a picture that can be read: "
                f"add some ({', '.join(PICTURES)}), or move the folder elsewhere"
            )
        if twice := [name for name, times in Counter(map(same_text, self.folders)).items() if times > 1]:
            raise ValueError(f"{self.folder} has two folders {twice[0]}, whose names differ in Unicode form only: make them one")
        return labels

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by their numbers: see `class_order`."""
        return sorted(set(self.labels or ()), key=class_order)

    @cached_property
    def packed(self) -> str:
        """The names of the pictures, and a hash of the first one of each class, compressed: for `describe_change`."""
        first = {label: i for i, label in reversed(list(enumerate(self.labels or ())))}
        marks = {i: _hash_start(self.files[i]) for i in first.values()}
        lines = [same_text(name) + (f"\t{marks[i]}" if i in marks else "") for i, name in enumerate(self.names)]
        return base64.b64encode(zlib.compress("\n".join(lines).encode())).decode()


def list_pictures(folder: str | Path) -> Listing:
    """The pictures of a folder. Links to folders are followed; hidden folders and those in `SYSTEM` are left out.

    FileNotFoundError for a missing folder, OSError for one without permission. ValueError in one line: no pictures, links that are broken
    or lead to the same folder twice, names that are not UTF-8 or hold control characters.
    """
    folder = Path(check_path(folder))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no such folder of pictures: {folder}" if not folder.exists() else f"{folder} is a file, not a folder of pictures"
        )
    names, texts, left_out, folders = [], [], Counter[str](), []
    for name, is_folder in _walk(folder):
        suffix = os.path.splitext(name)[1].lower()
        if is_folder:
            folders += [name] * ("/" not in name)
        elif suffix in PICTURES:
            names.append(check_name(folder, name))
        elif suffix == ".txt":
            texts.append(name)
        elif looks_like_picture(suffix):
            left_out[suffix] += 1
    if not names:
        found = f", and found {describe(left_out)}" if left_out else ""
        raise ValueError(f"no pictures in {folder}: expected files ending in {', '.join(PICTURES)}{found}")
    return Listing(folder, sorted(names, key=_parts), texts, folders, dict(sorted(left_out.items())))


def _parts(name: str) -> tuple[list[str], str]:
    """The sort key of names, independent of the Unicode form in which a file system keeps them."""
    return same_text(name).split("/"), name


def _hash_start(file: Path) -> str:
    """A hash of a file's size and beginning; "" if it cannot be read, which training reports."""
    try:
        if not file.is_file():
            return ""
        with open(file, "rb") as opened:
            return hashlib.sha256(b"%d " % file.stat().st_size + opened.read(2**16)).hexdigest()[:16]
    except OSError:
        return ""


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """The relative paths of all folders and files that are not hidden, and whether each is a folder."""
    entered: dict[str, Path] = {}
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        place = folder / inside
        if place != (first := entered.setdefault(os.path.realpath(place), place)):
            raise ValueError(f"{place} is the same folder as {first}: keep one of them")
        with os.scandir(place) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                name = f"{inside}/{entry.name}" if inside else entry.name
                if is_folder := _leads_to_folder(entry):
                    waiting.append(check_name(folder, name))
                yield name, is_folder


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder. ValueError for a broken link, unless it is named like a picture: reading reports that."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        if os.path.splitext(entry.name)[1].lower() not in PICTURES:
            where = os.path.dirname(entry.path)
            raise ValueError(f"{where}/{check_name(where, entry.name)} is a link that cannot be followed: mend or remove it")
        return False
    return entry.is_dir()


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are left out: hidden ones, and those of the system."""
    return name.startswith(".") or name in SYSTEM


def looks_like_picture(suffix: str) -> bool:
    """Whether files with this suffix, or without one, may be pictures, such as .tif and .jpg_large, or archives of them."""
    return not suffix or suffix.startswith(PICTURES + NOT_READ)


def describe(left_out: Mapping[str, int]) -> str:
    """Counts as text: "12 .tif, 3 without a suffix"."""
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(left_out.items()))


def check_name(place: str | Path, name: str) -> str:
    """Return the name. ValueError if it cannot be written to text files, such as results, reports and lists of prompts."""
    if UNPRINTABLE.search(name):
        shown = UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)
        raise ValueError(f"a name in {place} is not UTF-8 or holds control characters: rename {shown}")
    return name


def check_path(path: str | Path) -> str:
    """The path of pictures, as text. ValueError where it is empty, which Python takes for the folder that one is in, or as `check_name`."""
    if not str(path):
        raise ValueError("the path of the pictures is empty: give that of a folder, or . for the one you are in")
    return check_name("the path of the pictures", str(path))


def class_order(name: str) -> tuple[bool, tuple[int, str], str]:
    """The sort key of classes: numbers first, in their order, then names in theirs."""
    return not name.isdecimal(), by_value(name) if name.isdecimal() else (0, ""), name


def by_value(digits: str) -> tuple[int, str]:
    """The sort key of whole numbers, of any length: the same for 7 and 007."""
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0")
    return len(plain), plain


def describe_change(packed_then: str, packed_now: str) -> str:
    """How two texts of `Listing.packed` differ, such as "with a.png and without b.png"; "" if they are equal.

    Names the first picture that is missing and the first new one. If there is none, a class that has the pictures of another, which then
    has those of another too. ValueError if a text is damaged, or an earlier version sorted the same names differently.
    """
    before, now = (_unpacked(packed) for packed in (packed_then, packed_now))
    had, have = dict(before), dict(now)
    gone = [f"with {name[-60:]}" for name, _ in before if name not in have][:1]
    new = [f"without {name[-60:]}" for name, _ in now if name not in had][:1]
    if gone or new:
        return " and ".join(gone + new)
    if [name for name, _ in before] != [name for name, _ in now]:
        raise ValueError(
            "an earlier version began it, which sorted these pictures by another Unicode form of their names: start anew in another folder"
        )
    was = {mark: name for name, mark in before if mark}
    moved = {name: was[mark] for name, mark in now if mark in was and had[name] != mark}
    swapped = [f"with what is now {name[-60:]} as {earlier[-60:]}" for name, earlier in moved.items() if earlier in moved]
    return swapped[0] if swapped else ""


def _unpacked(packed: Any) -> list[tuple[str, str]]:
    """Names and hashes; earlier versions wrote no hashes, and names in the file system's Unicode form. ValueError if it is damaged."""
    try:
        lines = inflate(base64.b64decode(packed), MAX_NAMES).decode().split("\n")
    except (TypeError, ValueError):
        lines = [""]
    if lines == [""]:
        raise ValueError("the checkpoint's list of pictures is damaged")
    return [(same_text(name), mark) for name, _, mark in (line.partition("\t") for line in lines)]


def same_text(name: str) -> str:
    """The name in Unicode form NFC: macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def find_names(wanted: Iterable[str], names: Sequence[str]) -> list[str | None]:
    """The name that each wanted one stands for, None if there is none: "./é.png" is "é.png", in any Unicode form."""
    forms = Counter(map(same_text, names))
    index = {form: name for name in names if forms[form := same_text(name)] == 1} | {name: name for name in names}
    plain = (posixpath.normpath(name) for name in wanted)
    return [index.get(name) or index.get(same_text(name)) for name in plain]
