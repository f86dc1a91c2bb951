"""Pictures of tar shards, as of WebDataset and img2dataset: 000.jpg, 000.txt, 000.cls are one sample, 000."""

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

SIDECARS = (".txt", ".json", ".cls")  # what belongs to a picture
MAX_PADDING = 2**24  # zero bytes after the end of an archive: programs fill up their last record
# What tarfile raises for damaged files:
DAMAGE = (tarfile.TarError, EOFError, ValueError, IndexError, OverflowError, OSError, RecursionError)
# The program that unpacks a file, by the file's first bytes:
UNPACK = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class TarPictures(FilePictures):
    """The pictures of tar files, in the order of files and members. They are read in place, never unpacked.

    A picture's name is its key, the member's name without suffix (`split_name`), or "shard/key" if several
    shards share keys. Its caption is in key.txt, or else in key.json under "prompt", "text" or "caption"; its
    class is in key.cls. Links to other members are followed; hidden members are left out.

    paths     one or several: a path, a pattern ("shard-*.tar"), or a range ("shard-{000000..000009}.tar")
    prompts   one per picture, or a file of them (`read_prompts`), by key or by name (a/000, a/000.png),
              instead of those in the shards

    FileNotFoundError, or ValueError in one line for shards that are compressed, damaged, cut short, joined or
    without pictures, for keys with two pictures or none, and if only some pictures have a class.
    """

    remedy = "add key.txt, or key.json with a caption"

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        prompts: Prompts | None = None,
        max_pixels: int = MAX_PIXELS,
        classes: bool = True,
    ) -> None:
        patterns = [paths] if isinstance(paths, (str, Path)) else list(paths)
        shards, ignored = [shard for path in patterns for shard in find_shards(str(path))], Counter[str]()
        self._samples = [sample for shard in shards for sample in _read_samples(shard, ignored)]
        self._pictures = [
            next(sample[suffix] for suffix in sample if suffix in PICTURES) for sample in self._samples
        ]
        self.origin, self.max_pixels = ", ".join(map(str, patterns)), max_pixels
        self.stamp = stamp_files(shards, max_pixels)
        self.ignored = dict(sorted(ignored.items()))
        if not self._samples:
            expected = "expected members such as 000.png, 000.jpg or 000.webp"
            raise ValueError(f"no pictures in {self.origin}: {expected}{self._describe_ignored()}")
        self.names = [split_name(file.name)[0] for file in self._pictures]
        if len(set(self.names)) < len(self.names):
            self.names = [f"{file.shard.stem}/{split_name(file.name)[0]}" for file in self._pictures]
        if doubled := [name for name, times in Counter(self.names).items() if times > 1]:
            raise ValueError(f"{self.origin} has {doubled[0]} twice: give each shard once, with its own name")
        labels = [_read_label(sample) for sample in self._samples] if classes else []
        self.labels = self._require_all("class", labels, "add key.cls") if classes else None
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
        return [_read_caption(sample) for sample in self._samples]


def find_shards(pattern: str) -> list[Path]:
    """The files of a path, a pattern or a range, in order. FileNotFoundError if one is missing."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = span.groups()
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise ValueError(f"{pattern} is an empty range of shards: {first} comes after {last}")
        before, after, width = pattern[: span.start()], pattern[span.end() :], len(first)
        return [shard for n in numbers for shard in find_shards(f"{before}{n:0{width}d}{after}")]
    if Path(pattern).is_file():
        paths = [pattern]
    else:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else []
    if not paths:
        raise FileNotFoundError(f"no such tar file: {pattern}")
    if others := [path for path in paths if not Path(path).is_file()]:
        raise ValueError(f"{others[0]} is not a file: give a pattern that matches only tar files")
    return [Path(check_name("the shards", path)) for path in paths]


@dataclass(frozen=True)
class Member:
    """A file in a shard, and the offset of its content."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:  # opened every time, so that threads can read at once
            file.seek(self.offset)
            return file.read(self.size)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    def text(self, limit: int = MAX_CAPTION) -> str:
        if self.size > limit:
            raise ValueError(f"{self} has {self.size:,} bytes, more than the limit of {limit:,}")
        return decode_text(self, self.read()).strip()

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


Sample = Mapping[str, Member]  # a picture and what belongs to it, by suffix


def _read_label(sample: Sample) -> str | None:
    member = sample.get(".cls")
    return None if member is None else check_name(member.shard, nfc(member.text()))


def _read_caption(sample: Sample) -> str | None:
    if ".txt" in sample:
        return sample[".txt"].text()
    entry = parse_json(str(sample[".json"]), sample[".json"].text(MAX_LIST)) if ".json" in sample else None
    if isinstance(entry, Mapping):
        for key in KEYS:
            if isinstance(entry.get(key), str):
                return entry[key].strip()
    return None


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member: "a/000.seg.png" is "a/000" and ".seg.png".

    As in WebDataset, words before the last suffix belong to the suffix: they say which part of its sample a
    member is. Other parts belong to the key, as in cfg-7.5-000.png, and so does a picture's suffix before
    another, as in photo.jpg.png.
    """
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    first = len(parts) - 1
    if first == 0:
        return name, ""
    while first > 1 and parts[first - 1].isidentifier() and f".{parts[first - 1].lower()}" not in PICTURES:
        first -= 1
    return f"{folder}{slash}{'.'.join(parts[:first])}", "." + ".".join(parts[first:]).lower()


def _read_samples(shard: Path, ignored: Counter[str]) -> list[Sample]:
    """The samples of a shard, in the order of their first members. Counts pictures that are not read."""
    samples: dict[str, dict[str, Member]] = {}
    unread: set[str] = set()
    for name, find in _members(shard):
        key, suffix = split_name(name)
        if suffix in PICTURES or suffix in SIDECARS:
            parts = samples.setdefault(key, {})
            if suffix in parts:
                raise ValueError(f"{shard} holds {name} twice: write the shard again")
            parts[suffix] = find(check_name(shard, name))
        elif looks_like_picture(suffix[suffix.rfind(".") :] if suffix else ""):
            ignored[suffix] += 1
            unread.add(key)
    for key, parts in samples.items():
        pictures = [part for suffix, part in parts.items() if suffix in PICTURES]
        if len(pictures) > 1:
            first, second = pictures[0].name, pictures[1].name
            raise ValueError(f"{shard} holds more than one picture called {key}: {first} and {second}")
        # Some programs write photo.jpg.txt for photo.jpg.
        if not pictures and key not in unread and not key.lower().endswith(PICTURES):
            part = next(iter(parts.values())).name
            raise ValueError(f"{shard} holds {part}, but no picture for it, like {key}.png: write it again")
    return [parts for parts in samples.values() if any(suffix in PICTURES for suffix in parts)]


def _members(shard: Path) -> Iterator[tuple[str, Callable[[str], Member]]]:
    """Names of all files but hidden ones, each with a function that finds the file.

    That function raises ValueError for a file that cannot be read in place.
    """
    entries = _read_entries(shard)
    by_name = {posixpath.normpath(entry.name): entry for entry in entries}

    def find(name: str, entry: tarfile.TarInfo) -> Member:
        visited, holds = [entry], f"{shard} holds {name}"
        while entry.islnk() or entry.issym():
            folder = "" if entry.islnk() else posixpath.dirname(entry.name)
            target = posixpath.join(folder, entry.linkname)
            linked = by_name.get(posixpath.normpath(target))
            if linked is None:
                raise ValueError(
                    f"{holds}, a link to {one_line(target)}, which it lacks: use tar --dereference"
                )
            if linked in visited:
                raise ValueError(f"{holds}, a link back to itself through {one_line(target)}: write it again")
            visited.append(entry := linked)
        if not entry.isfile():
            raise ValueError(f"{holds}, which is not a file but a folder, pipe or device: write it again")
        if entry.issparse():
            raise ValueError(f"{holds} as a sparse file: write the shard again without --sparse")
        return Member(shard, name, entry.offset_data, entry.size)

    for entry in entries:
        name = posixpath.normpath(entry.name)  # `tar cf a.tar .` writes ./000.png
        if not entry.isdir() and not any(is_hidden(part) for part in name.split("/") if part != ".."):
            yield name, partial(find, entry=entry)


def _read_entries(shard: Path) -> list[tarfile.TarInfo]:
    """All members. ValueError for a file that is compressed, damaged, or without the end of a tar file."""
    with open(shard, "rb") as file:
        start = file.read(8)
    for magic, program in UNPACK.items():
        if start.startswith(magic):
            raise ValueError(f"{shard} is compressed and cannot be read in place: {program} it first")
    entries: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if entry.size < 0:  # tarfile would go back, and read in circles
                    raise tarfile.ReadError(f"a member has {entry.size} bytes")
                entries.append(entry)
            end = archive.offset  # of what tarfile could read: the end of the file, or damage
    except DAMAGE as error:
        raise ValueError(f"{shard} cannot be read as a tar file: {one_line(error)}") from None
    _check_end(shard, end)
    return entries


def _check_end(shard: Path, end: int) -> None:
    """ValueError unless only empty blocks follow the last member."""
    with open(shard, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(
                f"{shard} is damaged or cut short at byte {end}: a tar file ends with empty blocks; write it "
                "again"
            )
        rest = file.read(MAX_PADDING + 1)
    if len(rest) > MAX_PADDING or rest.count(0) < len(rest):
        raise ValueError(
            f"{shard} goes on after its end at byte {end}, as joined files do: give them one by one"
        )
