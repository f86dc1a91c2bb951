"""Pictures of a folder."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from models.files.text import read_text
from samplers.pictures import MAX_PIXELS, read_file
from train.data.captions import MAX_CAPTION, Prompts, prompts_for, read_metadata
from train.data.files import FilePictures
from train.data.names import PICTURES, check_name, check_path, is_hidden, looks_like_picture, nfc
from train.data.source import stamp_files

METADATA = "metadata.jsonl"


class FolderPictures(FilePictures):
    """The pictures of a folder and its sub-folders, named and sorted by their paths in it (with slashes).

    Links to folders are followed; hidden folders and those in `SYSTEM` are left out. Sub-folders, if any, are
    classes, as `plain-diffusion samplers` writes them. The caption of cat.png is the text of cat.txt beside
    it, or of a line {"file_name": "cat.png", "text": "a cat"} in metadata.jsonl, with paths relative to the
    folder; other entries of a line are not read.

    FileNotFoundError for a missing folder, OSError without permission. ValueError in one line if there are no
    pictures, pictures both in sub-folders and beside them, a class without pictures, broken links, two links
    to the same folder, or names that are not UTF-8 or hold control characters.
    """

    remedy = f"write it into a .txt file of its name beside it, or into {METADATA}"

    def __init__(
        self,
        folder: str | Path,
        prompts: Prompts | None = None,
        max_pixels: int = MAX_PIXELS,
        classes: bool = True,
    ) -> None:
        self.folder, self.max_pixels, self.origin = Path(check_path(folder)), max_pixels, str(folder)
        if self.folder.is_file():
            raise FileNotFoundError(f"{folder} is a file, not a folder of pictures")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no such folder of pictures: {folder}")
        names, ignored, folders = [], Counter[str](), []
        self._texts: dict[str, list[str]] = {}  # .txt files, by their paths without suffix
        for name, is_folder in _walk(self.folder):
            stem, suffix = os.path.splitext(name)
            if is_folder:
                folders += [name] * ("/" not in name)
            elif suffix.lower() in PICTURES:
                names.append(check_name(folder, name))
            elif suffix.lower() == ".txt":
                self._texts.setdefault(nfc(stem), []).append(name)
            elif looks_like_picture(suffix.lower()):
                ignored[suffix.lower()] += 1
        self.ignored = dict(sorted(ignored.items()))
        if not names:
            expected = f"expected files ending in {', '.join(PICTURES)}"
            raise ValueError(f"no pictures in {folder}: {expected}{self._describe_ignored()}")
        # The same order whatever Unicode form the file system uses:
        self.names = sorted(names, key=lambda name: (nfc(name).split("/"), name))
        self.labels = self._classes(folders) if classes else None
        if prompts is not None:
            self.prompts = prompts_for(prompts, self.names)

    def file(self, index: int) -> Path:
        """The path of a picture."""
        return self.folder / self.names[index]

    @cached_property
    def stamp(self) -> str:
        """A hash of the files' stamp, of max_pixels, and of their paths, which include the classes."""
        files = stamp_files(map(self.file, range(len(self))), self.max_pixels)
        return hashlib.sha256("\n".join([*self.names, files]).encode()).hexdigest()

    def content(self, index: int) -> bytes:
        """See `StoredPictures`."""
        return read_file(self.file(index), self.max_pixels)

    def _classes(self, folders: Sequence[str]) -> list[str] | None:
        """The class of each picture, its sub-folder. An empty one is refused: it would number others anew."""
        loose = [name for name in self.names if "/" not in name]
        labels = [nfc(name.split("/", 1)[0]) for name in self.names if "/" in name]
        if not labels:
            return None
        if loose:
            raise ValueError(
                f"{self.folder} mixes class folders ({labels[0]}, ...) and loose pictures ({loose[0]}, ...): "
                f"keep one kind, or give a folder in it, such as {self.folder / labels[0]}"
            )
        classes = set(labels)
        if empty := sorted(name for name in folders if nfc(name) not in classes):
            raise ValueError(
                f"{self.folder / empty[0]} is a class without a picture that can be read: "
                f"add some ({', '.join(PICTURES)}), or move the folder elsewhere"
            )
        if twice := [name for name, times in Counter(map(nfc, folders)).items() if times > 1]:
            raise ValueError(
                f"{self.folder} has two folders {twice[0]}, whose names differ in Unicode form only: make "
                "them one"
            )
        return labels

    def _captions(self) -> list[str | None]:
        metadata = self.folder / METADATA
        listed = read_metadata(metadata, self.names) if metadata.exists() else {}
        return [self._caption(name, listed.get(name)) for name in self.names]

    def _caption(self, name: str, listed: str | None) -> str | None:
        texts = self._texts.get(nfc(os.path.splitext(name)[0]), ())
        captions = {text: read_text(self.folder / text, MAX_CAPTION).strip() for text in texts}
        if listed is not None:
            captions[METADATA] = listed
        if len(set(captions.values())) > 1:
            raise ValueError(f"{self.folder / name} has two captions, in {' and '.join(captions)}: keep one")
        return next(iter(captions.values()), None)


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """The relative paths of all folders and files but hidden ones, and whether each is a folder."""
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
    """Whether an entry is a folder. ValueError for a broken link, but for pictures, whose readers do that."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        if os.path.splitext(entry.name)[1].lower() not in PICTURES:
            where = os.path.dirname(entry.path)
            link = f"{where}/{check_name(where, entry.name)}"
            raise ValueError(f"{link} is a link that cannot be followed: mend or remove it")
        return False
    return entry.is_dir()
