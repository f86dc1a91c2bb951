"""From pictures to what metrics are computed of, in one pass: shared among the processes of a torchrun, and resumable.

Picture i belongs to group i % groups, and a group to one process. Groups are summed up in the order of their pictures and merged in
their own order, so that the result does not depend on the number of processes, to the last bit. They also give the error bars
(eval.metrics.jackknife).
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

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffusion.messages import one_line
from diffusion.spec import check_at_least_one
from eval.features.extractor import Extractor
from eval.images.source import Source, Unreadable, reading
from eval.metrics.moments import GroupedMoments
from models.checkpoints import native
from train.world import World

LONG = 30.0  # seconds of work that are worth a file of half a gigabyte
FORMAT = "work 2"  # of what is saved
AT_ONCE = 2**24  # pixels, of all pictures together, that are prepared at once; a larger picture is prepared alone


@dataclass(frozen=True)
class CollectParams:
    """How a source is gone through.

    batch_size  pictures that the networks see at once
    groups      parts that processes share and error bars come from; no fewer than there are processes, and better a prime: of 10 classes
                drawn in turn, each of 16 groups would hold 5, and leaving one out would not be the accident that it should be
    on_error    what is done about pictures that cannot be used: they end the run, or are left out and counted
    sizes       "equal": a picture of another size than the rest ends the run; "any": each is resized from its own
    save_every  seconds after which what is done so far is saved, where it has a place
    """

    batch_size: int = 64
    groups: int = 17
    on_error: Literal["refuse", "skip"] = "refuse"
    sizes: Literal["equal", "any"] = "equal"
    save_every: float = 300.0

    def __post_init__(self) -> None:
        check_at_least_one(self, "batch_size", "groups")


@dataclass
class Collected:
    """What one pass leaves. Outputs are named "extractor.output", as in "inception.pool".

    indices  (n,) which pictures of the source these are, ascending
    digests  (n, 32) SHA-256 of each picture's size and pixels
    moments  of outputs that are only summed up
    rows     (n, width) of outputs that are kept one by one
    skipped  why pictures were left out
    sizes    heights and widths that there were
    """

    indices: Tensor
    digests: Tensor
    moments: dict[str, GroupedMoments]
    rows: dict[str, Tensor]
    skipped: list[str] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)

    @property
    def n(self) -> int:
        """Pictures that were used."""
        return len(self.indices)

    @property
    def sha256(self) -> str:
        """Of all pictures in their order."""
        return hashlib.sha256(self.digests.numpy().tobytes()).hexdigest()


def size_names(sizes: Iterable[tuple[int, int]]) -> list[str]:
    """Heights and widths as "640x480", width first as is usual, in their order."""
    return [f"{width}x{height}" for height, width in sorted(sizes)]


Seen = Callable[[int, Tensor], None]


def unseen(index: int, pixels: Tensor) -> None:
    """Nobody looks."""


def collect(
    source: Source,
    extractors: Mapping[str, Extractor],
    moments: Iterable[str],
    rows: Iterable[str],
    params: CollectParams,
    where: World,
    state: Path | None = None,
    keep: bool = False,
    ahead: bool = True,
    seen: Seen = unseen,
    progress: bool = True,
) -> Collected | None:
    """Go through the source once. The leading process gets what all have found, the others None.

    moments, rows  outputs "extractor.output" to sum up, and to keep
    state          where the work is saved now and then and whenever it breaks off, to go on from when called again with the same arguments;
                   what took long stays there when it is done, too, and a later call takes it from there
    keep           whether it stays there however short it took, for others
    seen           called with the number and the pixels of every picture that is used, in this process and this time
    ahead          read a batch while the networks compute on the one before: not for a source that computes on the same device

    ValueError for pictures that cannot be used (`params` says which), too few processes' groups, features that are not finite.
    """
    if where.size > params.groups:
        raise ValueError(f"{where.size} processes share {params.groups} groups: give groups={where.size} or more")
    work = _Work(source, extractors, list(moments), list(rows), params, where)
    if state is not None and where.size > 1:
        state = state.with_name(f"{state.name}.{where.rank}-of-{where.size}")
    if state is not None and state.exists():
        work.load(state)
    left = work.share[work.done :]
    batches = [left[i : i + params.batch_size] for i in range(0, len(left), params.batch_size)]
    groups = _groups(source, batches)
    began = saved = time.monotonic()
    shown = progress and where.leads
    with (
        tqdm(total=len(work.share), initial=work.done, desc=source.origin[-40:], unit="picture", disable=not shown) as bar,
        closing(_read_ahead(groups) if ahead else groups) as coming,
    ):
        try:
            for group in coming:
                work.take(group, seen)
                bar.update(len(group.indices))
                if group.ends_batch and state is not None and time.monotonic() - saved > params.save_every:
                    _save(work, state)
                    saved = time.monotonic()
        except BaseException:  # Ctrl-C included: what is done is kept
            if state is not None and work.done:
                _save(work, state)
            raise
    if state is not None and batches and (keep or time.monotonic() - began > LONG):
        _save(work, state)
    return _together(work.collected(), where)


def _save(work: _Work, state: Path) -> None:
    """Save the work so far; where it cannot be, say so and go on: the numbers do not depend on it."""
    try:
        work.save(state)
    except OSError as error:
        warnings.warn(f"the work so far is not saved: {error}", stacklevel=3)


def forget(state: Path) -> None:
    """Remove what `collect` has saved there, with however many processes."""
    for path in (state, *state.parent.glob(f"{escape(state.name)}.*-of-*")):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Picture:
    pixels: Tensor  # uint8 (3, H, W)
    digest: bytes


@dataclass(frozen=True)
class _Group:
    """Pictures of a batch that are held in memory together, each by its number."""

    indices: list[int]
    pictures: list[_Picture | Unreadable]
    ends_batch: bool


def _groups(source: Source, batches: Sequence[Sequence[int]]) -> Generator[_Group]:
    """All pictures: those of a batch together or, where they are large, as few at a time as have AT_ONCE pixels."""
    for batch in batches:
        first, held = 0, list[_Picture | Unreadable]()
        with reading(source, batch) as pictures:
            for last, picture in enumerate(pictures, 1):
                held.append(picture if isinstance(picture, Unreadable) else _digested(picture))
                del picture
                if last == len(batch) or sum(each.pixels[0].numel() for each in held if isinstance(each, _Picture)) >= AT_ONCE:
                    yield _Group(list(batch[first:last]), held, last == len(batch))
                    first, held = last, []


def _digested(picture: Tensor) -> _Picture:
    pixels = picture.contiguous()
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.numpy().data)
    return _Picture(pixels, digest.digest())


def _read_ahead(groups: Generator[_Group]) -> Generator[_Group]:
    """The same groups; while one is in use, the next is read."""
    with closing(groups), ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, groups, None)
        while (group := coming.result()) is not None:
            coming = pool.submit(next, groups, None)
            yield group


@dataclass
class _Batch:
    """What is ready of a batch: numbers and digests of its pictures, why others are left out, and by extractor what its network takes."""

    indices: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    prepared: dict[str, list[Tensor]] = field(default_factory=dict)
    size: int = 0

    def add(self, indices: list[int], digests: list[bytes], broken: list[str], size: int) -> None:
        """A group of so many pictures."""
        self.indices += indices
        self.digests += digests
        self.broken += broken
        self.size += size


class _Work:
    """This process's part of a pass: what is done, and what is left."""

    def __init__(
        self, source: Source, extractors: Mapping[str, Extractor], moments: list[str], rows: list[str], params: CollectParams, where: World
    ) -> None:
        self.source, self.extractors, self.params = source, extractors, params
        self.share = [i for i in range(len(source)) if i % params.groups % where.size == where.rank]
        self.outputs: dict[str, set[str]] = {}
        for key in (*moments, *rows):
            name, output = key.split(".")
            self.outputs.setdefault(name, set()).add(output)
        widths = {key: extractors[key.split(".")[0]].widths[key.split(".")[1]] for key in moments}
        self.moments = {key: GroupedMoments(width, params.groups) for key, width in widths.items()}
        self.rows: dict[str, list[Tensor]] = {key: [] for key in rows}
        self.indices: list[int] = []
        self.digests: list[bytes] = []
        self.skipped: list[str] = []
        self.sizes: set[tuple[int, int]] = set()
        self.done = 0  # of the share
        self.batch = _Batch()  # that is being read

    def take(self, group: _Group, seen: Seen) -> None:
        """Prepare pictures for the networks, and let go of them; take in a batch that is complete, or nothing of it where that raises."""
        broken = [picture.reason for picture in group.pictures if isinstance(picture, Unreadable)]
        if broken and self.params.on_error == "refuse":
            self._refuse(group.indices, broken)
        used = [(i, picture) for i, picture in zip(group.indices, group.pictures, strict=True) if isinstance(picture, _Picture)]
        group.pictures.clear()
        self._check_sizes(used)
        for i, picture in used:
            seen(i, picture.pixels)
        self.batch.add([i for i, _ in used], [picture.digest for _, picture in used], broken, len(group.indices))
        if used:
            self._prepare([picture.pixels for _, picture in used])
        if group.ends_batch:
            del used
            self._take_in(self.batch)
            self.batch = _Batch()

    def _take_in(self, batch: _Batch) -> None:
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
            given = (
                list(torch.stack(pictures).to(extractor.device, non_blocking=True)) if alike else [p.to(extractor.device) for p in pictures]
            )
            self.batch.prepared.setdefault(name, []).append(extractor.prepare(given))

    @torch.inference_mode()
    def _features(self, batch: _Batch) -> dict[str, Tensor]:
        """Of a batch. Networks always see a full one, in every process, so that the last one rounds as all others do."""
        missing = min(self.params.batch_size, len(self.source)) - len(batch.indices)
        found = {}
        for name, outputs in self.outputs.items():
            parts = batch.prepared[name]
            x = torch.cat([*parts, *[parts[-1][-1:]] * missing]) if missing or len(parts) > 1 else parts[0]
            extractor = self.extractors[name]
            extractor.check_outputs(outputs)
            for output, values in extractor.features(x, outputs).items():
                found[f"{name}.{output}"] = values[: len(batch.indices)]
        return found

    def _refuse(self, indices: Sequence[int], broken: list[str]) -> None:
        """Count all that are broken, and raise."""
        rest = self.share[self.share.index(indices[-1]) + 1 :]
        for i in range(0, len(rest), self.params.batch_size):
            with reading(self.source, rest[i : i + self.params.batch_size]) as pictures:
                broken += [picture.reason for picture in pictures if isinstance(picture, Unreadable)]
        more = f"; {len(broken) - 1} more of {len(self.source)} cannot be used" if len(broken) > 1 else ""
        raise ValueError(f"{broken[0]}{more} (on_error=skip leaves such pictures out)")

    def _check_sizes(self, used: Sequence[tuple[int, _Picture]]) -> None:
        for i, picture in used:
            size = (picture.pixels.shape[1], picture.pixels.shape[2])
            if self.params.sizes == "equal" and self.sizes and size not in self.sizes:
                height, width = next(iter(self.sizes))
                raise ValueError(
                    f"{self.source.names[i]} of {self.source.origin} is {size[1]}x{size[0]}, others are {width}x{height}: "
                    "sizes=any resizes each from its own size"
                )
            self.sizes.add(size)

    def _check_finite(self, features: Mapping[str, Tensor], indices: Sequence[int]) -> None:
        for key, values in features.items():
            bad = (~values.isfinite()).any(1).nonzero()[:, 0].tolist()
            if bad:
                raise ValueError(
                    f"{key} of {len(bad)} of {len(values)} pictures is not finite, the first is {self.source.names[indices[bad[0]]]} "
                    f"of {self.source.origin}: are these the right weights, and is the precision enough?"
                )

    def collected(self) -> Collected:
        digests = (
            torch.frombuffer(bytearray(b"".join(self.digests)), dtype=torch.uint8) if self.digests else torch.empty(0, dtype=torch.uint8)
        )
        rows = {
            key: torch.cat(parts) if parts else torch.empty(0, self.extractors[key.split(".")[0]].widths[key.split(".")[1]])
            for key, parts in self.rows.items()
        }
        return Collected(torch.tensor(self.indices, dtype=torch.long), digests.view(-1, 32), self.moments, rows, self.skipped, self.sizes)

    def key(self) -> str:
        """Of all that the work so far depends on, but for what is computed of the pictures."""
        params = [self.params.groups, self.params.on_error, self.params.sizes]
        content = [FORMAT, self.source.origin, self.source.stamp, len(self.share), self.share[:2], params]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def identities(self) -> dict[str, dict[str, object]]:
        """Of what computes each output that is summed up or kept."""
        kept = [*(f"moments/{key}" for key in self.moments), *(f"rows/{key}" for key in self.rows)]
        return {key: self.extractors[key.split("/")[1].split(".")[0]].identity.to_json() for key in kept}

    def save(self, path: Path) -> None:
        """Write what is done."""
        now = self.collected()
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
        """Go on from there, where it has all that is asked for. Other work is left aside: this pass begins anew, and overwrites it.

        ValueError for a damaged file.
        """
        try:
            with safe_open(path, "pt") as file:
                about: dict[str, Any] = json.loads(file.metadata()["about"])
                if about["key"] != self.key() or not self.identities().items() <= about["identities"].items():
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            if about.pop("checksum") != native.checksum(tensors, about):
                raise ValueError("its checksum is another one")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the work that was saved in {path} is damaged: remove it to begin anew ({one_line(error)})") from None
        self.done, self.skipped, self.sizes = about["done"], about["skipped"], {(h, w) for h, w in about["sizes"]}
        self.indices = tensors["indices"].tolist()
        self.digests = [bytes(row) for row in tensors["digests"].numpy()]
        self.rows = {key: [tensors[f"rows/{key}"]] for key in self.rows}
        for key in self.moments:
            prefix = f"moments/{key}/"
            self.moments[key] = GroupedMoments.from_state({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})


def _together(own: Collected, where: World) -> Collected | None:
    """What all processes have found, in the order of the pictures."""
    if where.size == 1:
        return _in_order([own])
    sent = replace(own, moments={}), {key: value.state_dict() for key, value in own.moments.items()}  # groups without pictures are not sent
    where.meet()  # a process whose pictures are on a slower disk may come an hour after the others
    got: list[Any] | None = [None] * where.size if where.leads else None
    dist.gather_object(sent, got)
    if got is None:
        return None
    return _in_order(
        [own, *(replace(part, moments={k: GroupedMoments.from_state(v) for k, v in state.items()}) for part, state in got[1:])]
    )


def _in_order(parts: Sequence[Collected]) -> Collected:
    indices = torch.cat([part.indices for part in parts])
    order = indices.argsort()
    moments = parts[0].moments
    for part in parts[1:]:
        for key, value in part.moments.items():
            moments[key].merge(value)
    return Collected(
        indices[order],
        torch.cat([part.digests for part in parts])[order],
        moments,
        {key: torch.cat([part.rows[key] for part in parts])[order] for key in parts[0].rows},
        [reason for part in parts for reason in part.skipped],
        set().union(*(part.sizes for part in parts)),
    )
