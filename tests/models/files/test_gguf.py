"""GGUF files as GGML's own package writes them, read back; and damaged, foreign and hostile ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from models.files.tensors import open_tensors
from models.layers.packed import BLOCKS, Packed
from tests.models.test_packed import random_blocks


def write(path: Path, tensors: dict[str, Any], metadata: dict[str, Any] | None = None) -> Path:
    """Arrays, or (bytes, type) of packed ones."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, value in (metadata or {}).items():
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            list: writer.add_array,
            float: writer.add_float32,
            bool: writer.add_bool,
        }
        add[type(value)](key, value)
    for key, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(key, tensor[0], raw_dtype=gguf.GGMLQuantizationType[tensor[1]])
        else:
            writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("packing", BLOCKS)
def test_packed_matrices(packing: str, tmp_path: Path) -> None:
    """The bytes as they lie in the file, and the values that GGML's package makes of them, to the last bit;
    more than is read at once."""
    rows, columns = 700, 1024
    data = random_blocks(packing, rows, columns).numpy()
    stored = open_tensors(
        write(tmp_path / "a.gguf", {"first": np.ones(3, np.float32), "w": (data, packing)})
    ).tensors["w"]
    assert (stored.shape, stored.dtype, stored.packing) == ((rows, columns), torch.float32, packing)
    assert stored.raw
    packed = Packed(packing, stored.raw.mapped())
    assert packed.shape == (rows, columns)
    assert np.array_equal(packed.data.numpy(), data)
    wanted = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[packing]))
    read, half = torch.empty(rows, columns), torch.empty(rows, columns, dtype=torch.bfloat16)
    stored.read_into(read)
    stored.read_into(half)
    for found in (read, stored.mapped(), packed.dense()):
        assert torch.equal(found, wanted)
    assert torch.equal(half, wanted.bfloat16())
    assert all(len(chunk) % 512 == 0 for chunk in stored.chunks(512))


def test_plain_tensors_and_metadata(tmp_path: Path) -> None:
    """Dimensions in torch's order; floats of every width mapped; metadata as texts, whatever they were."""
    rng = np.random.default_rng(0)
    full, half = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float16)
    brain = torch.randn(3, 32).bfloat16()
    raw = brain.view(torch.uint8).numpy()
    metadata = {"note": "ü", "n": 3, "list": [1, 2], "words": ["a", "b"], "yes": True}
    file = open_tensors(
        write(tmp_path / "a.GGUF", {"full": full, "half": half, "brain": (raw, "BF16")}, metadata)
    )
    assert {key: stored.packing for key, stored in file.tensors.items()} == {
        "full": None,
        "half": None,
        "brain": None,
    }
    for key, value in {
        "full": torch.from_numpy(full),
        "half": torch.from_numpy(half),
        "brain": brain,
    }.items():
        assert file.tensors[key].dtype == value.dtype
        assert torch.equal(file.tensors[key].mapped(), value)
    assert file.metadata["general.architecture"] == "flux"
    assert file.metadata["note"] == "ü"
    assert {key: json.loads(file.metadata[key]) for key in ("n", "list", "words", "yes")} == {
        key: metadata[key] for key in ("n", "list", "words", "yes")
    }


def test_reshaped_tensors_have_their_own_shape_again(tmp_path: Path) -> None:
    """Converters reshape what does not divide into blocks, and note what it was; such a tensor is only read
    unpacked."""
    data = random_blocks("Q4_K", 12, 256).numpy()
    wanted = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_K))
    key = "comfy.gguf.orig_shape.w"
    for shape, packing in ([24, 128], None), ([8, 4, 3, 32], None), ([6, 512], "Q4_K"):
        stored = open_tensors(
            write(tmp_path / f"{len(shape)}{shape[0]}.gguf", {"w": (data, "Q4_K")}, {key: shape})
        ).tensors["w"]
        assert (list(stored.shape), stored.packing) == (shape, packing)
        assert torch.equal(stored.mapped(), wanted.view(shape))
    with pytest.raises(
        ValueError, match=r"odd\.gguf is damaged: w of shape \[12, 256\] cannot have been \[5, 5\]"
    ):
        open_tensors(write(tmp_path / "odd.gguf", {"w": (data, "Q4_K")}, {key: [5, 5]}))


def header(tensors: bytes, count: int = 1, pairs: int = 0, version: int = 3, metadata: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, count, pairs) + metadata + tensors


def entry(key: str = "w", shape: tuple[int, ...] = (32,), kind: int = 0, start: int = 0) -> bytes:
    return text(key) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, start)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


DAMAGED = {
    "empty": (b"", "holds no weights: it is empty"),
    "a web page": (b"<!doctype html><p>", "holds no weights: it is a web page"),
    "something else": (b"PK\3\4 and so on", "is damaged or not a weights file"),
    "two letters": (b"GG", r"is not a GGUF file: it begins with b'GG'"),
    "the magic number alone": (b"GGUF", "cannot be read: its header does not end"),
    "an old version": (
        header(b"", 0, version=1),
        "cannot be read: Sorry, file appears to be version 1 which we cannot handle",
    ),
    "another machine's": (
        header(b"", 0, version=3 << 24),
        "cannot be read: it is big-endian",
    ),
    "a header that ends": (header(entry(), count=2), "cannot be read: its header does not end"),
    "many tensors": (header(b"", 2**60), "cannot be read: its header does not end"),
    "a long name": (header(struct.pack("<Q", 2**60)), "cannot be read: its header does not end"),
    "a name of two lines": (
        header(entry("a\nb") + bytes(200)),
        r"is damaged: 'a\\nb' is not a tensor's name",
    ),
    "many dimensions": (
        header(text("w") + struct.pack("<I", 2**31)),
        "cannot be read: its header does not end",
    ),
    "a huge shape": (
        header(entry(shape=(2**60, 2**60))),
        r"is damaged: w has the impossible shape \[1152921504606846976",
    ),
    "an unknown type": (
        header(entry(kind=77)),
        "cannot be read: w has the type 77; take a file of one of Q4_0",
    ),
    "a type not read here": (
        header(entry(kind=23)),
        "cannot be read: w has the type IQ4_XS; take a file of one of Q4_0",
    ),
    "half a block": (
        header(entry(shape=(2, 48), kind=8)),
        r"is damaged: w, Q8_0 of shape \[2, 48\], does not divide into blocks",
    ),
    "a block of one number": (
        header(entry(shape=(), kind=8)),
        r"is damaged: w, Q8_0 of shape \[\], does not divide",
    ),
    "a tensor twice": (header(entry() + entry(), 2) + bytes(300), "is damaged: it holds a tensor twice"),
    "tensors that overlap": (
        header(entry("a") + entry("b", start=64), 2) + bytes(300),
        "is damaged: b overlaps a",
    ),
    "too little data": (
        header(entry()) + bytes(100),
        r"is damaged: w ends at byte 192, the file at 157; download it again",
    ),
    "a place far away": (
        header(entry(start=2**40)) + bytes(300),
        "is damaged: w ends at byte 1,099,511,627,968",
    ),
    "metadata of no type": (
        header(entry(), pairs=1, metadata=pair("k", 99, b"")),
        r"cannot be read: .*99.* is not a valid GGUFValueType",
    ),
    "an endless list": (
        header(entry(), pairs=1, metadata=pair("k", 9, struct.pack("<IQ", 0, 2**62))),
        "cannot be read: its header does not end",
    ),
    "a list of texts without end": (
        header(entry(), pairs=1, metadata=pair("k", 9, struct.pack("<IQ", 8, 2**62))) + bytes(999),
        "cannot be read: its header does not end",
    ),
    "a long list": (  # of a million, in as many bytes
        header(entry(), pairs=1, metadata=pair("k", 9, struct.pack("<IQ", 0, 2**20))) + bytes(2**20),
        "cannot be read: its header does not end",
    ),
    "metadata twice": (
        header(entry(), pairs=2, metadata=2 * pair("k", 0, b"1")) + bytes(300),
        "cannot be read: 'Duplicate k already in list",
    ),
    "a text that is none": (
        header(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(100)),
        "cannot be read: 'utf-8' codec",
    ),
    "a place that wraps around": (
        header(entry(start=2**64 - 64)) + bytes(300),
        "is damaged: w has the impossible shape",
    ),
    "dimensions that wrap around": (
        header(entry(shape=(2**32, 2**32))) + bytes(300),
        "is damaged: w ends at byte 73,786,976,294,838,2",
    ),
    "lists in lists": (
        header(entry(), pairs=1, metadata=pair("k", 9, struct.pack("<IQ", 9, 1) * 5000)) + bytes(300),
        "cannot be read: maximum recursion",
    ),
    "a list of lists": (
        header(entry(), pairs=1, metadata=pair("k", 9, struct.pack("<IQ", 9, 2))),
        "cannot be read: its header does not end",
    ),
    "an odd alignment": (
        header(entry(), pairs=1, metadata=pair("general.alignment", 4, struct.pack("<I", 33))) + bytes(300),
        "cannot be read: Invalid alignment: must be a non-zero power of two",
    ),
    "a piece": (
        header(entry(), pairs=1, metadata=pair("split.count", 2, struct.pack("<H", 3))) + bytes(300),
        "is one of 3 pieces: merge them into one file",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    """One line that names the file, and the tensor where there is one."""
    content, message = DAMAGED[case]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.gguf {message}") as raised:
        open_tensors(tmp_path / "a.gguf")
    assert "\n" not in str(raised.value)


def test_files_cut_or_flipped_anywhere(tmp_path: Path) -> None:
    """Wherever a file ends or a bit of its header is another: it is read, or refused in one line."""
    data = random_blocks("Q8_0", 4, 64).numpy()
    path = write(
        tmp_path / "a.gguf",
        {"w": (data, "Q8_0"), "b": np.ones(8, np.float32)},
        {"words": ["one", "two"], "n": 4},
    )
    content = path.read_bytes()
    cut = [content[:end] for end in range(0, len(content) - 32, 7)]
    rng = np.random.default_rng(0)
    flipped = []
    for at in rng.integers(0, 400, 400):
        bits = bytearray(content)
        bits[at] ^= 1 << int(rng.integers(8))
        flipped.append(bytes(bits))
    refused = []
    for case in [*cut, *flipped]:
        path.write_bytes(case)
        try:
            for stored in open_tensors(path).tensors.values():
                stored.mapped()
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) >= len(cut)
    assert [message for message in refused if "\n" in message or str(path) not in message] == []
