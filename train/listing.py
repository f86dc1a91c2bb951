"""Which files of a folder are its pictures, in which order, and what its classes are: one answer for training and evaluation."""

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

PICTURES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (  # pictures of other formats, and archives, which may hold some
    ".7z", ".apng", ".arw", ".avif", ".bz2", ".cr2", ".cr3", ".dds", ".dib", ".dng", ".eps", ".exr", ".gif", ".gz", ".hdr", ".heic",
    ".heif", ".hif", ".icns", ".ico", ".j2k", ".jp2", ".jpf", ".jpx", ".jxl", ".jxr", ".nef", ".orf", ".pbm", ".pcx", ".pfm", ".pgm",
    ".pnm", ".ppm", ".psd", ".raf", ".rar", ".raw", ".rw2", ".svg", ".tar", ".tga", ".tgz", ".tif", ".tiff", ".xz", ".zip", ".zst",
)  # fmt: skip
SYSTEM = {"#recycle", "$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"}  # folders nobody made for pictures
PACKED = "files, packed"  # the setting in which checkpoints keep what the pictures were: see `Listing.packed`
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8 as Python reads them


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder and its sub-folders.

    names     relative to the folder, with slashes, in the order of their parts
    texts     names of the .txt files, in no order
    folders   names of the folders directly in it
    left_out  how many files look like pictures or may hold some, but are not read, by suffix: {".tif": 12}
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
        """The class of each picture: the folder that its name begins with; None where there are no folders with pictures.

        ValueError where classes and loose pictures are mixed, or a class has no picture that can be read: the numbers of the classes
        after it would change without a word.
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
        """What `describe_change` compares: the names, and of the first picture of each class what is in it. Takes a few bytes each."""
        first = {label: i for i, label in reversed(list(enumerate(self.labels or ())))}
        marks = {i: _mark(self.files[i]) for i in first.values()}
        lines = [same_text(name) + (f"\t{marks[i]}" if i in marks else "") for i, name in enumerate(self.names)]
        return base64.b64encode(zlib.compress("\n".join(lines).encode())).decode()


def list_pictures(folder: str | Path) -> Listing:
    """The pictures of a folder. Linked folders are entered; hidden ones and those of `SYSTEM` are not looked at.

    FileNotFoundError where there is no such folder, OSError for one that may not be read. ValueError, in one line: no pictures, links that
    lead to one folder twice or nowhere, a name that is not UTF-8 or holds control characters.
    """
    folder = Path(folder)
    check_name("the path of the pictures", str(folder))
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
    """The sort key of names: the same order whatever the Unicode form in which a file system keeps them."""
    return same_text(name).split("/"), name


def _mark(file: Path) -> str:
    """Of the size of a file and of how it begins; "" for one that cannot be read, which training has to say."""
    try:
        if not file.is_file():
            return ""
        with open(file, "rb") as opened:
            return hashlib.sha256(b"%d " % file.stat().st_size + opened.read(2**16)).hexdigest()[:16]
    except OSError:
        return ""


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """Relative names of all folders and files that are not hidden, and whether they are folders."""
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
    """ValueError for a link that leads nowhere, unless it is called like a picture, which is then one that cannot be read."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        if os.path.splitext(entry.name)[1].lower() not in PICTURES:
            where = os.path.dirname(entry.path)
            raise ValueError(f"{where}/{check_name(where, entry.name)} is a link that cannot be followed: mend or remove it")
        return False
    return entry.is_dir()


def is_hidden(name: str) -> bool:
    """Whether files and folders of this name are left to the system: hidden ones, and what file managers leave behind."""
    return name.startswith(".") or name in SYSTEM


def looks_like_picture(suffix: str) -> bool:
    """Whether files with this suffix are probably pictures, such as .tif and .jpg_large, or archives; without any, they may be."""
    return not suffix or suffix.startswith(PICTURES + NOT_READ)


def describe(left_out: Mapping[str, int]) -> str:
    """In words: "12 .tif, 3 without a suffix"."""
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(left_out.items()))


def check_name(place: str | Path, name: str) -> str:
    """The name as it is. ValueError where it cannot be written down: results, reports and lists of prompts name pictures."""
    if UNPRINTABLE.search(name):
        shown = UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)
        raise ValueError(f"a name in {place} is not UTF-8 or holds control characters: rename {shown}")
    return name


def class_order(name: str) -> tuple[bool, tuple[int, str], str]:
    """The sort key of classes: numbers first, in their order, then names in theirs."""
    return not name.isdecimal(), by_value(name) if name.isdecimal() else (0, ""), name


def by_value(digits: str) -> tuple[int, str]:
    """The sort key of whole numbers, of any length: the same for 7 and 007."""
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0")
    return len(plain), plain


def describe_change(packed_then: str, packed_now: str) -> str:
    """What tells two texts of `Listing.packed` apart, in words: "with a.png and without b.png"; "" for nothing.

    That is the first name that went and the first that came or, if names are the same, a class that has another one's pictures.
    """
    before, now = (_unpacked(packed) for packed in (packed_then, packed_now))
    had, have = dict(before), dict(now)
    gone = [f"with {name[-60:]}" for name, _ in before if name not in have][:1]
    new = [f"without {name[-60:]}" for name, _ in now if name not in had][:1]
    if gone or new:
        return " and ".join(gone + new)
    if [name for name, _ in before] != [name for name, _ in now]:
        return "with the pictures in another order"
    was = {mark: name for name, mark in before if mark}
    moved = [(was[mark], name) for name, mark in now if mark in was and had[name] != mark]
    return "".join(f"with what is now {name[-60:]} as {earlier[-60:]}" for earlier, name in moved[:1])


def _unpacked(packed: str) -> list[tuple[str, str]]:
    """Names and marks; earlier versions wrote no marks, and names in the form that the file system gave them."""
    lines = zlib.decompress(base64.b64decode(packed)).decode().split("\n")
    return [(same_text(name), mark) for name, _, mark in (line.partition("\t") for line in lines)]


def same_text(name: str) -> str:
    """One form (NFC) for names that look alike: macOS writes é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def find_names(wanted: Iterable[str], names: Sequence[str]) -> list[str | None]:
    """Which of the names each of the wanted ones is, if any: "./é.png" in a list written elsewhere is "é.png" here, whatever its form."""
    forms = Counter(map(same_text, names))
    index = {form: name for name in names if forms[form := same_text(name)] == 1} | {name: name for name in names}
    plain = (posixpath.normpath(name) for name in wanted)
    return [index.get(name) or index.get(same_text(name)) for name in plain]
