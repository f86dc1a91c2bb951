"""One pass over pictures for the features that metrics need, shared among torchrun's processes and resumable.

Picture i belongs to group i % groups, and each group to one process. A group is summed in the order of its
pictures, and groups are merged in their order, so that the result is bitwise the same for any number of
processes. Groups also give the error bars (eval.metrics.jackknife).
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffusion.messages import one_line
from diffusion.settings import setting
from diffusion.spec import check_at_least_one
from eval.features.extractor import Extractor
from eval.metrics.moments import GroupedMoments
from models.layouts import native
from samplers.pictures import MAX_PIXELS
from train.data.source import Source, Unreadable, reading
from train.world import World

WORTH_SAVING = 30.0  # seconds of work; less is not worth a file of half a gigabyte
FORMAT = "work 2"  # of the saved file
MAX_TOGETHER = 2**24  # pixels of the pictures that are prepared together; a larger picture is prepared alone


@dataclass(frozen=True, kw_only=True)
class PassParams:
    """How to go through pictures."""

    groups: int = setting(
        17,
        "parts of the pictures, for processes and error bars: a prime, so that classes in turn mix in each; "
        "31 suits eight processes",
        heading="The pass over pictures",
    )
    on_error: Literal["refuse", "skip"] = setting(
        "refuse", "skip: pictures that cannot be used are left out and counted"
    )
    sizes: Literal["equal", "any"] = setting("equal", "any: pictures may differ in size")
    max_pixels: int = setting(
        MAX_PIXELS,
        "of one picture: larger ones cannot be used. Colour profiles are ignored, as in published protocols",
    )
    batch_size: int = setting(64, "pictures per call of a network", kind="place")
    save_every: float = setting(
        300.0, "seconds between savings of unfinished work, for a later start to continue", kind="place"
    )
    device: str | None = setting(None, "null: a GPU if there is one", kind="place")
    progress: bool = setting(True, "false: no bar", kind="place")

    def __post_init__(self) -> None:
        check_at_least_one(self, "groups", "batch_size", "max_pixels")


@dataclass
class Features:
    """The result of a pass. Outputs are named "extractor.output", as in "inception.pool".

    indices  (n,) the numbers of the pictures in the source, ascending
    digests  (n, 32) SHA-256 of each picture's size and pixels
    moments  sums of the features, by output
    rows     (n, width) features of each picture, by output
    skipped  why pictures were left out, one text each
    sizes    the heights and widths of the pictures
    """

    indices: Tensor
    digests: Tensor
    moments: dict[str, GroupedMoments]
    rows: dict[str, Tensor]
    skipped: list[str] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)

    @property
    def n(self) -> int:
        """How many pictures were used."""
        return len(self.indices)

    @property
    def sha256(self) -> str:
        """The hash of all pictures in their order."""
        return hashlib.sha256(self.digests.numpy().tobytes()).hexdigest()


def size_names(sizes: Iterable[tuple[int, int]]) -> list[str]:
    """Heights and widths as sorted texts such as "640x480", width first as is usual."""
    return [f"{width}x{height}" for height, width in sorted(sizes)]


Seen = Callable[[int, Tensor], None]


def unseen(index: int, pixels: Tensor) -> None:
    """The default of `extract_features`: does nothing."""


def extract_features(
    source: Source,
    extractors: Mapping[str, Extractor],
    moments: Iterable[str],
    rows: Iterable[str],
    params: PassParams,
    where: World,
    state: Path | None = None,
    keep: bool = False,
    seen: Seen = unseen,
) -> Features | None:
    """Go through the source once. Returns the features in the leading process, and None in the others.

    moments, rows  outputs "extractor.output" whose features are summed, and kept one by one
    state          file in which unfinished work is saved every `save_every` seconds and when it is
                   interrupted; a later call with the same arguments continues from it. It stays if the work
                   took long
    keep           the file stays however short the work was
    seen           called with the number and the pixels of every picture that is used, in this process and
                   call

    ValueError for pictures that cannot be used (see `params`), fewer groups than processes, and features that
    are not finite.
    """
    if where.size > params.groups:
        raise ValueError(
            f"{where.size} processes share {params.groups} groups: give groups={where.size} or more"
        )
    work = _Work(source, extractors, list(moments), list(rows), params, where)
    if state is not None and where.size > 1:
        state = state.with_name(f"{state.name}.{where.rank}-of-{where.size}")
    if state is not None and state.exists():
        work.load(state)
    left = work.share[work.done :]
    batches = [left[i : i + params.batch_size] for i in range(0, len(left), params.batch_size)]
    groups = _groups(source, batches)
    if not getattr(source, "computes", False):  # reading would only compete with the networks for the device
        groups = _read_ahead(groups)
    began = saved = time.monotonic()
    bar = tqdm(
        total=len(work.share), initial=work.done, desc=source.origin[-40:], unit="picture",
        disable=not (params.progress and where.leads),
    )  # fmt: skip
    with bar, closing(groups):
        try:
            for group in groups:
                work.take(group, seen)
                bar.update(len(group.indices))
                if group.ends_batch and state is not None and time.monotonic() - saved > params.save_every:
                    _save(work, state)
                    saved = time.monotonic()
        except BaseException:  # Ctrl-C included
            if state is not None and work.done:
                _save(work, state)
            raise
    if state is not None and batches and (keep or time.monotonic() - began > WORTH_SAVING):
        _save(work, state)
    return _gather(work.features(), where)


def _save(work: _Work, state: Path) -> None:
    """Save the work so far, or warn that it cannot be saved: the result does not depend on it."""
    try:
        work.save(state)
    except OSError as error:
        warnings.warn(f"the work so far cannot be saved: {error}", stacklevel=3)


def forget(state: Path) -> None:
    """Remove what `extract_features` has saved there, with any number of processes."""
    for path in (state, *state.parent.glob(f"{escape(state.name)}.*-of-*")):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Picture:
    pixels: Tensor  # uint8 (3, H, W)
    digest: bytes


@dataclass(frozen=True)
class _Group:
    """Pictures of one batch that are in memory together, and their numbers."""

    indices: list[int]
    pictures: list[_Picture | Unreadable]
    ends_batch: bool


def _groups(source: Source, batches: Sequence[Sequence[int]]) -> Generator[_Group]:
    """The pictures of each batch together, or in groups of about MAX_TOGETHER pixels if they are large."""
    for batch in batches:
        first, size, pictures = 0, 0, list[_Picture | Unreadable]()
        with reading(source, batch) as read:
            for last, picture in enumerate(read, 1):
                size += 0 if isinstance(picture, Unreadable) else picture[0].numel()
                pictures.append(picture if isinstance(picture, Unreadable) else _with_digest(picture))
                del picture
                if last == len(batch) or size >= MAX_TOGETHER:
                    yield _Group(list(batch[first:last]), pictures, last == len(batch))
                    first, size, pictures = last, 0, []


def _with_digest(picture: Tensor) -> _Picture:
    pixels = picture.contiguous()
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.numpy().data)
    return _Picture(pixels, digest.digest())


def _read_ahead(groups: Generator[_Group]) -> Generator[_Group]:
    """The same groups, each read in a thread while the previous one is in use."""
    with closing(groups), ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, groups, None)
        while (group := coming.result()) is not None:
            coming = pool.submit(next, groups, None)
            yield group


@dataclass
class _Batch:
    """The part of a batch that has been read: its numbers, digests and errors, and the networks' inputs."""

    indices: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    size: int = 0


class _Work:
    """The work of this process in a pass: what is done, and what remains."""

    def __init__(
        self,
        source: Source,
        extractors: Mapping[str, Extractor],
        moments: list[str],
        rows: list[str],
        params: PassParams,
        where: World,
    ) -> None:
        self.source, self.extractors, self.params = source, extractors, params
        self.share = [i for i in range(len(source)) if i % params.groups % where.size == where.rank]
        self.outputs: dict[str, set[str]] = {}
        for key in (*moments, *rows):
            name, output = key.split(".")
            self.outputs.setdefault(name, set()).add(output)
        self.moments = {key: GroupedMoments(self._width(key), params.groups) for key in moments}
        self.rows: dict[str, list[Tensor]] = {key: [] for key in rows}
        self.indices: list[int] = []
        self.digests: list[bytes] = []
        self.skipped: list[str] = []
        self.sizes: set[tuple[int, int]] = set()
        self.done = 0  # pictures of the share
        self.batch = _Batch()  # being read

    def _width(self, key: str) -> int:
        name, output = key.split(".")
        return self.extractors[name].widths[output]

    def take(self, group: _Group, seen: Seen) -> None:
        """Prepare pictures for the networks and free them. A batch counts as a whole, or not at all on
        errors."""
        batch = self.batch
        broken = [picture.reason for picture in group.pictures if isinstance(picture, Unreadable)]
        if broken and self.params.on_error == "refuse":
            self._refuse(group.indices, broken)
        used = [
            (i, picture)
            for i, picture in zip(group.indices, group.pictures, strict=True)
            if isinstance(picture, _Picture)
        ]
        group.pictures.clear()
        for i, picture in used:
            self._check_size(i, picture)
        for i, picture in used:
            seen(i, picture.pixels)
        batch.indices += [i for i, _ in used]
        batch.digests += [picture.digest for _, picture in used]
        batch.broken += broken
        batch.size += len(group.indices)
        if used:
            self._prepare([picture.pixels for _, picture in used])
        if group.ends_batch:
            del used
            self._finish_batch(batch)
            self.batch = _Batch()

    def _finish_batch(self, batch: _Batch) -> None:
        if batch.indices:
            features = self._features(batch)
            self._check_finite(features, batch.indices)
            for key, moments in self.moments.items():
                moments.update(torch.tensor(batch.indices), features[key])
            for key, rows in self.rows.items():
                rows.append(features[key].cpu())
        self.indices += batch.indices
        self.digests += batch.digests
        self.skipped += batch.broken
        self.done += batch.size

    @torch.inference_mode()
    def _prepare(self, pictures: list[Tensor]) -> None:
        alike = all(picture.shape == pictures[0].shape for picture in pictures)
        for name in self.outputs:
            extractor = self.extractors[name]
            if alike:
                moved = list(torch.stack(pictures).to(extractor.device, non_blocking=True))
            else:
                moved = [picture.to(extractor.device) for picture in pictures]
            self.batch.inputs.setdefault(name, []).append(extractor.prepare(moved))

    @torch.inference_mode()
    def _features(self, batch: _Batch) -> dict[str, Tensor]:
        """The features of a batch. The last batch is padded, in every process: smaller ones round
        differently."""
        missing = min(self.params.batch_size, len(self.source)) - len(batch.indices)
        found = {}
        for name, outputs in self.outputs.items():
            parts = batch.inputs[name]
            x = torch.cat([*parts, *[parts[-1][-1:]] * missing]) if missing or len(parts) > 1 else parts[0]
            extractor = self.extractors[name]
            extractor.check_outputs(outputs)
            for output, values in extractor.features(x, outputs).items():
                found[f"{name}.{output}"] = values[: len(batch.indices)]
        return found

    def _refuse(self, indices: Sequence[int], broken: list[str]) -> None:
        """Count all broken pictures, and raise."""
        rest = self.share[self.share.index(indices[-1]) + 1 :]
        for i in range(0, len(rest), self.params.batch_size):
            with reading(self.source, rest[i : i + self.params.batch_size]) as pictures:
                broken += [picture.reason for picture in pictures if isinstance(picture, Unreadable)]
        more = f"; {len(broken) - 1} more of {len(self.source)} cannot be used" if len(broken) > 1 else ""
        raise ValueError(f"{broken[0]}{more} (on_error=skip leaves such pictures out)")

    def _check_size(self, index: int, picture: _Picture) -> None:
        size = (picture.pixels.shape[1], picture.pixels.shape[2])
        if self.params.sizes == "equal" and self.sizes and size not in self.sizes:
            (found,), (other, *_) = size_names([size]), size_names(self.sizes)
            raise ValueError(
                f"{self.source.names[index]} of {self.source.origin} is {found}, others are {other}: "
                f"sizes=any "
                "resizes each from its own size"
            )
        self.sizes.add(size)

    def _check_finite(self, features: Mapping[str, Tensor], indices: Sequence[int]) -> None:
        for key, values in features.items():
            bad = (~values.isfinite()).any(1).nonzero()[:, 0].tolist()
            if bad:
                raise ValueError(
                    f"{key} of {len(bad)} of {len(values)} pictures is not finite, the first is "
                    f"{self.source.names[indices[bad[0]]]} "
                    f"of {self.source.origin}: are these the right weights, and is the precision enough?"
                )

    def features(self) -> Features:
        digests = np.frombuffer(b"".join(self.digests), np.uint8).copy()
        rows = {
            key: torch.cat([torch.empty(0, self._width(key)), *parts]) for key, parts in self.rows.items()
        }
        return Features(
            torch.tensor(self.indices, dtype=torch.long), torch.from_numpy(digests).view(-1, 32),
            self.moments, rows, self.skipped, self.sizes,
        )  # fmt: skip

    def key(self) -> str:
        """A hash of everything that saved work depends on, except for the extractors."""
        params = [self.params.groups, self.params.on_error, self.params.sizes]
        content = [FORMAT, self.source.origin, self.source.stamp, len(self.share), self.share[:2], params]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def identities(self) -> dict[str, dict[str, object]]:
        """The identity of the extractor of each output."""
        kept = [*(f"moments/{key}" for key in self.moments), *(f"rows/{key}" for key in self.rows)]
        return {key: self.extractors[key.split("/")[1].split(".")[0]].identity.to_json() for key in kept}

    def save(self, path: Path) -> None:
        """Write the work so far."""
        now = self.features()
        tensors = {"indices": now.indices, "digests": now.digests}
        tensors |= {f"rows/{key}": values for key, values in now.rows.items()}
        for key, moments in self.moments.items():
            tensors |= {f"moments/{key}/{name}": value for name, value in moments.state_dict().items()}
        about = {
            "key": self.key(),
            "identities": self.identities(),
            "done": self.done,
            "skipped": self.skipped,
            "sizes": sorted(self.sizes),
        }
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        about["checksum"] = native.checksum(tensors, about)
        native.write_tensors(path, tensors, {"about": json.dumps(about)})

    def load(self, path: Path) -> None:
        """Continue from saved work if it has all outputs; other work is ignored and later overwritten.
        ValueError for a damaged file."""
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, Any] = json.loads(file.metadata()["about"])
                if about["key"] != self.key() or not self.identities().items() <= about["identities"].items():
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            if about.pop("checksum") != native.checksum(tensors, about):
                raise ValueError("its checksum does not match")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"the work saved in {path} is damaged: remove it to start again ({one_line(error)})"
            ) from None
        self.done, self.skipped = about["done"], about["skipped"]
        self.sizes = {(height, width) for height, width in about["sizes"]}
        self.indices = tensors["indices"].tolist()
        self.digests = [bytes(row) for row in tensors["digests"].numpy()]
        self.rows = {key: [tensors[f"rows/{key}"]] for key in self.rows}
        for key in self.moments:
            prefix = f"moments/{key}/"
            self.moments[key] = GroupedMoments.from_state(
                {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            )


def _gather(own: Features, where: World) -> Features | None:
    """The features of all processes in the leading one, in the order of the pictures; None in the others."""
    if where.size == 1:
        return _merge([own])
    states = {key: value.state_dict() for key, value in own.moments.items()}  # without empty groups
    where.barrier()  # a process with a slower disk may arrive an hour after the others
    received: list[Any] | None = [None] * where.size if where.leads else None
    dist.gather_object((replace(own, moments={}), states), received)
    if received is None:
        return None
    others = [
        replace(part, moments={key: GroupedMoments.from_state(value) for key, value in moments.items()})
        for part, moments in received[1:]
    ]
    return _merge([own, *others])


def joined(parts: Sequence[Features]) -> Features:
    """All pictures of a source that was passed over in parts, one after the other; without their features."""
    return Features(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.digests for part in parts]),
        {},
        {},
        [reason for part in parts for reason in part.skipped],
        set().union(*(part.sizes for part in parts)),
    )


def _merge(parts: Sequence[Features]) -> Features:
    whole, moments = joined(parts), parts[0].moments
    order = whole.indices.argsort()
    for part in parts[1:]:
        for key, value in part.moments.items():
            moments[key].merge(value)
    rows = {key: torch.cat([part.rows[key] for part in parts])[order] for key in parts[0].rows}
    return replace(
        whole, indices=whole.indices[order], digests=whole.digests[order], moments=moments, rows=rows
    )
