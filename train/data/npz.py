"""Pictures of NumPy files, as Dhariwal & Nichol 2021 (ADM) exchange samples. They are memory-mapped."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from diffusion.messages import one_line
from samplers.pictures import Before, no_wait
from train.data.captions import Prompts, prompts_for
from train.data.names import check_name, nfc, number_names
from train.data.source import Unreadable, stamp_files

PICTURES, LABELS = "arr_0", "arr_1"
# Bytes of an array that is read whole: a covariance of 8,192 features, labels of millions of pictures
MAX_ARRAY = 2**29


class NpzPictures:
    """arr_0 of an .npz file, or all of an .npy file: uint8 (N, H, W, 3). Labels are arr_1 (N,), if any.

    prompts  one per picture, or a file of them (`read_prompts`). Pictures are called 000000, 000001, ...

    FileNotFoundError, or ValueError in one line for a file that is damaged, compressed, or holds something
    else. Nothing is unpickled.
    """

    labels: Sequence[str] | None
    prompts: Sequence[str] | None
    ignored: Mapping[str, int] = {}
    _pixels: np.ndarray

    def __init__(self, path: str | Path, prompts: Prompts | None = None) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such file of pictures: {path}")
        labels = None
        with one_line_errors(path):
            if is_npy(path):
                self._pixels = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                self._pixels, labels = _read_members(path)
        shape, dtype = self._pixels.shape, self._pixels.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"{path} must hold uint8 (N, H, W, 3), values 0 ... 255, not {dtype} {shape}")
        self.origin, self.stamp = str(path), stamp_files([path])
        self.names: Sequence[str] = number_names(len(self._pixels))
        self.labels = None
        if labels is not None:
            self.labels = [check_name(path, nfc(str(label))) for label in labels.tolist()]
        self.prompts = None if prompts is None else prompts_for(prompts, self.names)

    def __len__(self) -> int:
        return len(self._pixels)

    def content(self, index: int) -> bytes:
        """See `StoredPictures`."""
        return self._pixels[index].tobytes()

    def open(self, index: int, mode: Literal["RGB", "L"] = "RGB", before: Before = no_wait) -> Image.Image:
        """See `StoredPictures`."""
        return Image.fromarray(np.ascontiguousarray(self._pixels[index])).convert(mode)

    def read(self, indices: Sequence[int]) -> Iterator[Tensor | Unreadable]:
        """See `Source`."""
        return (rearrange(torch.from_numpy(np.array(self._pixels[i])), "h w c -> c h w") for i in indices)


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turns errors of NumPy and zipfile into ValueError in one line that names the file."""
    try:
        yield
    except Exception as error:  # neither documents what it raises: an encrypted member is a RuntimeError
        reason = one_line(error)
        if str(path) not in reason:
            reason = f"{path} cannot be read as a NumPy file: {reason}"
        raise ValueError(reason) from None


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an .npz file."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_array(
    path: Path, name: str, check: Callable[[tuple[int, ...], np.dtype], None] = lambda shape, dtype: None
) -> np.ndarray:
    """An array of an .npz file, after `check` and a limit: a small compressed file can claim any size."""
    with zipfile.ZipFile(path) as archive:
        with archive.open(f"{name}.npy") as file:
            shape, _, dtype = _header(path, file)
        check(shape, dtype)
        if math.prod(shape) * max(dtype.itemsize, 8) > MAX_ARRAY:  # integers become float64
            raise ValueError(
                f"{path} says that {name} is {dtype} {shape}, more than the limit of {MAX_ARRAY:,} bytes"
            )
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of an array, whose values `file` then stands at."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError(f"{path} holds pickled objects, which are never read: save plain arrays")
    if min(shape, default=1) < 0:
        raise ValueError(f"{path} claims an array of shape {shape}")
    return shape, fortran, dtype


def is_npy(path: Path) -> bool:
    """Whether a file is in NumPy's format of one array, whatever its name."""
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _read_members(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures, mapped, and labels."""
    names = array_names(path)
    if PICTURES not in names:
        statistics = {"mu", "sigma"} <= set(names)
        content = "reference statistics" if statistics else ", ".join(names)[:200] or "nothing"
        raise ValueError(f"{path} holds {content}, and no pictures: these are an array called {PICTURES}")
    with zipfile.ZipFile(path) as archive:
        pictures = _map_member(path, archive.getinfo(f"{PICTURES}.npy"))

    def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
        if shape != pictures.shape[:1] or dtype.kind not in "iuU":
            raise ValueError(
                f"{LABELS} of {path} must hold a class for each of the {len(pictures)} pictures, not "
                f"{dtype} {shape}"
            )

    return pictures, read_array(path, LABELS, check) if LABELS in names else None


def _map_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """An uncompressed array in a zip file. It begins after the member's header and NumPy's."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"{path} is compressed, and would fill the memory: save it again with np.savez(path, "
            "**np.load(path))"
        )
    if member.flag_bits & 1:
        raise ValueError(f"{path} is encrypted: save it again without a password")
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        name, extra = struct.unpack("<26x2H", file.read(30))
        start = file.seek(name + extra, 1)
        shape, fortran, dtype = _header(path, file)
        size = member.file_size
        if file.tell() - start + math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{path} says that {member.filename} is {dtype} {shape}, but has {size:,} bytes")
        return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape, order="F" if fortran else "C")
