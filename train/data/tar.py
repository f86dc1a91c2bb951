"""Pictures of tar shards, as WebDataset and img2dataset write them: 000.jpg, 000.txt, 000.json, 000.cls are
one sample, called 000."""

from __future__ import annotations

import glob
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusion.messages import one_line
from models.files.text import decode_text
from samplers.pictures import MAX_PIXELS, check_size
from train.data.captions import KEYS, MAX_CAPTION, MAX_LIST, Prompts, parse_json, prompts_for
from train.data.files import FilePictures
from train.data.names import PICTURES, check_name, is_hidden, looks_like_picture, nfc
from train.data.source import stamp_files

BESIDE = (".txt", ".json", ".cls")  # what is read beside a picture
MAX_PADDING = 2**24  # zero bytes after the end of an archive: programs fill up their last record
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}  # by their first bytes


class TarPictures(FilePictures):
    """The pictures of tar files, in the order of the files and of what is in them; read where they lie, and
    never unpacked.

    A picture is called by its key, its name without its suffix (`split_name`), and where shards have keys in
    common by "shard/key". Its caption is in key.txt or, where there is none, in key.json under "prompt",
    "text" or "caption"; its class in key.cls. Links to other members are followed; hidden members are not
    looked at.

    paths     one or several: a path, a pattern ("shard-*.tar"), or a range ("shard-{000000..000009}.tar")
    prompts   one per picture, or a file of them (`read_prompts`), by key or by name (a/000, a/000.png),
              instead of what is in the shards
    ignored   how many members look like pictures or may hold some, but are not read, by suffix: {".tif": 12,
              ".seg.png": 3}

    FileNotFoundError, or ValueError in one line for shards that are compressed, damaged, cut short or joined,
    without pictures, or in which a key has two of them or none, and where some pictures have a class and
    others have none.
    """

    remedy = "add key.txt, or key.json with a caption"

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        prompts: Prompts | None = None,
        max_pixels: int = MAX_PIXELS,
        classes: bool = True,
    ) -> None:
        given = [paths] if isinstance(paths, (str, Path)) else list(paths)
        shards, left_out = [shard for path in given for shard in find_shards(str(path))], Counter[str]()
        self._samples = [sample for shard in shards for sample in _samples(shard, left_out)]
        self._pictures = [
            next(sample[suffix] for suffix in sample if suffix in PICTURES) for sample in self._samples
        ]
        self.origin, self.stamp, self.max_pixels = (
            ", ".join(map(str, given)),
            stamp_files(shards, max_pixels),
            max_pixels,
        )
        self.ignored = dict(sorted(left_out.items()))
        if not self._samples:
            raise ValueError(
                f"no pictures in {self.origin}: expected members such as 000.png, 000.jpg or "
                f"000.webp{self._found()}"
            )
        self.names = [split_name(file.name)[0] for file in self._pictures]
        if len(set(self.names)) < len(self.names):
            self.names = [
                f"{file.shard.stem}/{key}" for file, key in zip(self._pictures, self.names, strict=True)
            ]
        if doubled := [name for name, times in Counter(self.names).items() if times > 1]:
            raise ValueError(
                f"{self.origin} gives {doubled[0]} twice: give every shard once, and shards names of their "
                "own"
            )
        self.labels = (
            self._all("class", [_label(sample) for sample in self._samples], "add key.cls")
            if classes
            else None
        )
        if prompts is not None:
            files = [name + file.suffix for name, file in zip(self.names, self._pictures, strict=True)]
            self.prompts = prompts_for(prompts, self.names, files)

    def file(self, index: int) -> Member:
        """The member that is a picture."""
        return self._pictures[index]

    def content(self, index: int) -> bytes:
        """See `StoredPictures`."""
        member = self._pictures[index]
        check_size(member, member.size, self.max_pixels)
        return member.read()

    def _captions(self) -> list[str | None]:
        return [_caption(sample) for sample in self._samples]


def find_shards(pattern: str) -> list[Path]:
    """The files that a path, a pattern or a range names, in order. FileNotFoundError if one is missing, or
    nothing matches."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = span.groups()
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise ValueError(f"{pattern} is an empty range of shards: {first} comes after {last}")
        return [
            shard
            for n in numbers
            for shard in find_shards(pattern[: span.start()] + f"{n:0{len(first)}d}" + pattern[span.end() :])
        ]
    found = (
        [pattern]
        if Path(pattern).is_file()
        else sorted(glob.glob(pattern))
        if glob.has_magic(pattern)
        else []
    )
    if not found:
        raise FileNotFoundError(f"no such tar file: {pattern}")
    if strange := [path for path in found if not Path(path).is_file()]:
        raise ValueError(f"{strange[0]} is not a file: give a pattern that only fits tar files")
    return [Path(check_name("the shards", path)) for path in found]


@dataclass(frozen=True)
class Member:
    """A file in a shard, and the offset of its content."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:  # opened for each, so that threads can read at once
            file.seek(self.offset)
            return file.read(self.size)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    def text(self, most: int = MAX_CAPTION) -> str:
        if self.size > most:
            raise ValueError(f"{self} has {self.size:,} bytes, more than the {most:,} that it may have")
        return decode_text(self, self.read()).strip()

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


Sample = Mapping[str, Member]  # a picture and what belongs to it, by suffix


def _label(sample: Sample) -> str | None:
    member = sample.get(".cls")
    return None if member is None else check_name(member.shard, nfc(member.text()))


def _caption(sample: Sample) -> str | None:
    if ".txt" in sample:
        return sample[".txt"].text()
    entry = parse_json(str(sample[".json"]), sample[".json"].text(MAX_LIST)) if ".json" in sample else None
    texts = (
        [entry[key] for key in KEYS if isinstance(entry.get(key), str)] if isinstance(entry, Mapping) else []
    )
    return texts[0].strip() if texts else None


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member: "a/000.seg.png" is "a/000" and ".seg.png".

    As in WebDataset, words before the last suffix belong to the suffix: they say which part of its sample a
    member is. What is not a word belongs to the key, as in cfg-7.5-000.png, and so does the suffix of a
    picture, as in photo.jpg.png.
    """
    folder, slash, own = name.rpartition("/")
    parts = own.split(".")
    first = len(parts) - 1
    while first > 1 and parts[first - 1].isidentifier() and f".{parts[first - 1].lower()}" not in PICTURES:
        first -= 1
    return (
        (f"{folder}{slash}{'.'.join(parts[:first])}", "." + ".".join(parts[first:]).lower())
        if first
        else (name, "")
    )


def _samples(shard: Path, left_out: Counter[str]) -> list[Sample]:
    """The samples of a shard, in the order of their first members. Counts in `left_out` what looks like a
    picture but is not read."""
    found: dict[str, dict[str, Member]] = {}
    others: set[str] = set()
    for name, place in _members(shard):
        key, suffix = split_name(name)
        if suffix in PICTURES or suffix in BESIDE:
            parts = found.setdefault(key, {})
            if suffix in parts:
                raise ValueError(f"{shard} holds {name} twice: write the shard again")
            parts[suffix] = place(check_name(shard, name))
        elif looks_like_picture(suffix[suffix.rfind(".") :] if suffix else ""):
            left_out[suffix] += 1
            others.add(key)
    for key, parts in found.items():
        pictures = [part for suffix, part in parts.items() if suffix in PICTURES]
        if len(pictures) > 1:
            raise ValueError(
                f"{shard} holds more than one picture called {key}: {pictures[0].name} and {pictures[1].name}"
            )
        if (
            not pictures and key not in others and not key.lower().endswith(PICTURES)
        ):  # some programs write photo.jpg.txt to photo.jpg
            raise ValueError(
                f"{shard} holds {next(iter(parts.values())).name}, but no picture to it, such as {key}.png: "
                "write it again"
            )
    return [parts for parts in found.values() if any(suffix in PICTURES for suffix in parts)]


def _members(shard: Path) -> Iterator[tuple[str, Callable[[str], Member]]]:
    """The names of all files that are not hidden, and a function that finds the file. ValueError if it cannot
    be read in place."""
    entries = _entries(shard)
    there = {posixpath.normpath(entry.name): entry for entry in entries}

    def member(name: str, entry: tarfile.TarInfo) -> Member:
        passed = [entry]
        while entry.islnk() or entry.issym():
            target = (
                entry.linkname
                if entry.islnk()
                else posixpath.join(posixpath.dirname(entry.name), entry.linkname)
            )
            linked = there.get(posixpath.normpath(target))
            if linked is None:
                raise ValueError(
                    f"{shard} holds {name}, a link to {one_line(target)}, which it does not hold: use tar "
                    "--dereference"
                )
            if linked in passed:
                raise ValueError(
                    f"{shard} holds {name}, a link that leads back to itself by way of {one_line(target)}: "
                    "write the shard again"
                )
            passed.append(entry := linked)
        if not entry.isfile():
            raise ValueError(
                f"{shard} holds {name}, which is not a file but a folder, a pipe or a device: write the "
                "shard again"
            )
        if entry.issparse():
            raise ValueError(
                f"{shard} holds {name} with its holes left out: write the shard again without --sparse"
            )
        return Member(shard, name, entry.offset_data, entry.size)

    for entry in entries:
        name = posixpath.normpath(entry.name)  # `tar cf a.tar .` writes ./000.png
        if not entry.isdir() and not any(is_hidden(part) for part in name.split("/") if part != ".."):
            yield name, partial(member, entry=entry)


def _entries(shard: Path) -> list[tarfile.TarInfo]:
    """All members. ValueError for a file that is compressed, damaged, or without the end of a tar file."""
    with open(shard, "rb") as file:
        start = file.read(8)
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"{shard} is compressed, so that no picture in it can be reached by itself: {program} it "
                "first"
            )
    entries: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if entry.size < 0:  # from which tarfile would go back, and round in circles
                    raise tarfile.ReadError(f"a member has {entry.size} bytes")
                entries.append(entry)
            end = archive.offset  # where tarfile saw no further member, be it the end, or damage
    except (
        tarfile.TarError,
        EOFError,
        ValueError,
        IndexError,
        OverflowError,
        OSError,
        RecursionError,
    ) as error:
        raise ValueError(f"{shard} is no tar file that can be read: {one_line(error)}") from None
    _check_end(shard, end)
    return entries


def _check_end(shard: Path, end: int) -> None:
    """ValueError unless only empty blocks follow the last member."""
    with open(shard, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(
                f"{shard} is damaged or cut short at byte {end}: a tar file ends with empty blocks; make it "
                "again"
            )
        rest = file.read(MAX_PADDING + 1)
    if len(rest) > MAX_PADDING or rest.count(0) < len(rest):
        raise ValueError(
            f"{shard} goes on behind its end at byte {end}, as joined tar files do: give them one by one"
        )
