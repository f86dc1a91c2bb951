"""One pass over pictures: what batches, processes and interruptions must not change, and what ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not marked so

from eval.bench.harness import RESET
from eval.feature_pass import Features, PassParams, extract_features
from eval.features.extractor import Extractor, Identity
from eval.sheet import Sheet
from train.data import decoding
from train.data.folder import FolderPictures
from train.data.source import Unreadable
from train.data.tensors import TensorPictures
from train.world import PeerError, World

ALONE = World(0, 1, torch.device("cpu"))


class Projected(Extractor):
    """Fixed random projections of the pixels, in float64, where a row does not depend on its batch at all."""

    def __init__(self, side: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.widths = {"rows": 3, "wide": 8}
        self.identity = Identity("projected", f"seed {seed}", "as it is")
        weights = torch.randn(
            3 * side * side, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        self.weights = torch.nn.Parameter(weights, requires_grad=False)

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(pictures)).flatten(1).double()

    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        wide = (x[:, :, None] * self.weights).sum(1)
        return {name: {"wide": wide, "rows": wide[:, :3]}[name].float() for name in outputs}


class Numbered(TensorPictures):
    """Random pictures, of which some cannot be used; it stops, as by Ctrl-C, before a picture."""

    def __init__(
        self, n: int, broken: Collection[int] = (), stop: int | None = None, origin: str = "numbered"
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            torch.randint(0, 256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8), origin=origin
        )
        self.broken, self.stop = set(broken), stop
        self.seen: list[int] = []

    def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
        if self.stop is not None and self.stop in indices:
            raise KeyboardInterrupt
        self.seen += indices
        found = super().read(indices)
        return [
            Unreadable(f"picture {i} is broken") if i in self.broken else each
            for i, each in zip(indices, found, strict=True)
        ]


def go(
    source: Any,
    where: World = ALONE,
    state: Path | None = None,
    extractor: Extractor | None = None,
    **params: Any,
) -> Features:
    found = extract_features(
        source,
        {"projected": extractor or Projected()},
        ["projected.wide"],
        ["projected.rows"],
        PassParams(**params, progress=False),
        where,
        state,
        keep=True,
    )
    assert found is not None
    return found


def assert_same(a: Features, b: Features) -> None:
    """To the last bit."""
    assert torch.equal(a.indices, b.indices)
    assert a.sha256 == b.sha256
    assert torch.equal(a.rows["projected.rows"], b.rows["projected.rows"])
    for name, value in a.moments["projected.wide"].state_dict().items():
        assert torch.equal(value, b.moments["projected.wide"].state_dict()[name]), name


def test_everything_is_there_once_and_in_order() -> None:
    """Rows and moments are those of all pictures at once, and the hash is of the pixels."""
    source = Numbered(101)
    found = go(source, batch_size=16)
    whole = Projected()(source.read(range(101)), ["wide", "rows"])
    assert found.indices.tolist() == list(range(101))
    assert torch.equal(found.rows["projected.rows"], whole["rows"])
    moments = found.moments["projected.wide"].whole()
    torch.testing.assert_close(moments.mean, whole["wide"].double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.covariance, whole["wide"].double().T.cov(), rtol=1e-12, atol=1e-12)
    source._images = source._images.clone()
    source._images[77, 0, 0, 0] ^= 1
    assert go(source).sha256 != found.sha256


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    """Not a bit of it."""
    assert_same(go(Numbered(101), batch_size=batch_size), go(Numbered(101), batch_size=32))


def test_reading_ahead_changes_nothing() -> None:
    """And reads the same pictures."""
    found = []
    for ahead in (False, True):
        source: Any = Numbered(50)
        source.computes = not ahead
        found.append(go(source, batch_size=7))
    assert found[0] is not None
    assert found[1] is not None
    assert_same(found[0], found[1])


@pytest.mark.parametrize("stop", [30, 64, 99])
def test_what_breaks_off_goes_on(stop: int, tmp_path: Path) -> None:
    """Interrupted before any picture, it reads the rest only, and ends with the same bits; finished, it reads
    nothing."""
    state = tmp_path / "state.safetensors"
    first = Numbered(101, broken=[3], stop=stop)
    with pytest.raises(KeyboardInterrupt):
        go(first, state=state, on_error="skip", batch_size=10)
    rest = Numbered(101, broken=[3])
    found = go(rest, state=state, on_error="skip", batch_size=9)
    assert min(rest.seen) >= stop - 20
    assert found.skipped == ["picture 3 is broken"]
    assert_same(found, go(Numbered(101, broken=[3]), on_error="skip"))
    again = Numbered(101, broken=[3])
    assert_same(go(again, state=state, on_error="skip"), found)
    assert again.seen == []


def test_work_on_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    """Another extractor, other pictures or another number of groups begin anew."""
    state = tmp_path / "state.safetensors"
    go(Numbered(40), state=state)
    for source, groups in (
        (Numbered(40), 16),
        (Numbered(41), 16),
        (Numbered(41), 3),
        (Numbered(41, origin="elsewhere"), 3),
    ):
        found = go(source, state=state, extractor=Projected(seed=1), groups=groups)
        assert len(source.seen) == found.n == len(source)


def test_work_serves_those_who_ask_for_less(tmp_path: Path) -> None:
    """What is saved of rows and moments serves moments alone; the other way round everything is read
    again."""
    state, source = tmp_path / "state.safetensors", Numbered(40)
    whole = go(source, state=state)

    def moments_only() -> Features | None:
        return extract_features(
            source,
            {"projected": Projected()},
            ["projected.wide"],
            [],
            PassParams(progress=False),
            ALONE,
            state,
            keep=True,
        )

    source.seen.clear()
    less = moments_only()
    assert source.seen == []
    assert less is not None
    assert torch.equal(
        less.moments["projected.wide"].whole().mean, whole.moments["projected.wide"].whole().mean
    )
    state.unlink()
    moments_only()
    source.seen.clear()
    go(source, state=state)
    assert len(source.seen) == 40


def test_broken_pictures_are_counted_and_refused_or_left_out() -> None:
    """Refused with the first one's reason and the number of the others, which later ones count in; or left
    out, and listed."""
    with pytest.raises(
        ValueError,
        match=r"^picture 5 is broken; 2 more of 101 cannot be used \(on_error=skip leaves such pictures "
        r"out\)$",
    ):
        go(Numbered(101, broken=[5, 6, 90]), batch_size=10)
    found = go(Numbered(101, broken=[5, 6, 90]), on_error="skip", batch_size=10)
    assert found.n == 98
    assert len(found.skipped) == 3
    assert not {5, 6, 90} & set(found.indices.tolist())


def test_sizes_that_differ_are_refused_unless_any_will_do() -> None:
    """With both sizes and the picture's name."""

    class Mixed(Numbered):
        def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
            return [
                torch.zeros(3, 4, 5, dtype=torch.uint8) if i == 7 else torch.zeros(3, 4, 4, dtype=torch.uint8)
                for i in indices
            ]

    with pytest.raises(
        ValueError,
        match=r"000007 of numbered is 5x4, others are 4x4: sizes=any resizes each from its own size",
    ):
        go(Mixed(20), batch_size=5)

    class Cut(Projected):
        def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
            return super().prepare([picture[:, :, :4] for picture in pictures])

    assert go(Mixed(20), extractor=Cut(), sizes="any").sizes == {(4, 4), (4, 5)}


def test_features_that_are_not_finite_name_the_picture() -> None:
    """How many, and which first."""

    class Overflowing(Projected):
        def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
            found = super().features(x, outputs)
            found["wide"][2] = torch.nan
            return found

    with pytest.raises(
        ValueError, match=r"projected.wide of 1 of 10 pictures is not finite, the first is 000002 of numbered"
    ):
        go(Numbered(20), extractor=Overflowing(), batch_size=10)


def test_more_processes_than_groups_are_refused() -> None:
    """Some would have nothing to do."""
    with pytest.raises(ValueError, match="4 processes share 3 groups: give groups=4 or more"):
        go(Numbered(20), where=World(0, 4, torch.device("cpu")), groups=3)


RANK = """
import sys, torch
from tests.eval.test_feature_pass import Numbered, Projected
from eval.feature_pass import PassParams, extract_features
from train.world import world

with world("cpu") as where:
    found = extract_features(Numbered(101, broken=[8]), {"projected": Projected()}, ["projected.wide"],
                    ["projected.rows"], PassParams(batch_size=10, on_error="skip", progress=False), where)
    assert (found is None) == (where.rank > 0)
    if found is not None:
        torch.save(found, sys.argv[1])
"""


@pytest.mark.loopback
@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_share_the_work_and_find_the_same_bits(processes: int, tmp_path: Path) -> None:
    """torchrun with two and with three gives what one process finds."""
    (tmp_path / "rank.py").write_text(RANK)
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            str(tmp_path / "rank.py"), str(tmp_path / "found.pt"),
        ],
        check=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert_same(found, go(Numbered(101, broken=[8]), on_error="skip"))


@pytest.mark.parametrize("ahead", [False, True])
def test_large_pictures_are_not_held_together(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 48 pictures: few are in memory at once, what is computed is that of all together, and so is
    what a sheet shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 10, 10, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
    held, most, read = [0], [0], decoding.decode_picture

    def counting(*arguments: Any) -> Tensor:
        found = read(*arguments)
        held[0] += 1
        most[0] = max(most[0], held[0])
        weakref.finalize(found, lambda: held.__setitem__(0, held[0] - 1))
        return found

    monkeypatch.setattr("train.data.files.decode_picture", counting)
    monkeypatch.setattr(decoding, "MAX_DECODED", 300)
    monkeypatch.setattr("eval.feature_pass.MAX_TOGETHER", 200)
    source: Any = FolderPictures(tmp_path)
    source.computes = not ahead
    found = go(source, extractor=Projected(10), batch_size=64)
    assert_same(found, go(TensorPictures(torch.from_numpy(pixels).movedim(-1, 1)), extractor=Projected(10)))
    Sheet(source).save(tmp_path / "sheet.png")
    assert held == [0]
    assert most[0] <= 3 + 2 + 2  # decoded, and two groups: one that is used, and one that is read meanwhile


def test_reading_ends_with_the_error_of_one_who_uses_it(tmp_path: Path) -> None:
    """However large the pictures that wait: no thread is left behind."""
    for i in range(20):
        Image.new("RGB", (9, 10)).save(tmp_path / f"{i:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "MAX_DECODED", 1)
        patch.setattr("eval.feature_pass.MAX_TOGETHER", 1)
        before = threading.active_count()
        with pytest.raises(RuntimeError, match="The size of tensor a"):
            go(FolderPictures(tmp_path))
        assert threading.active_count() == before


def test_an_error_of_one_process_ends_the_others() -> None:
    """They wait for its part of the work in no collective operation, of which there could be none here."""
    store = HashStore()
    World(1, 2, torch.device("cpu"), store).explain(ValueError("picture 5 is broken"))
    with pytest.raises(PeerError, match=r"^process 1 has failed: picture 5 is broken$"):
        go(Numbered(20), World(0, 2, torch.device("cpu"), store))


def test_memory_does_not_grow_with_the_number_of_pictures() -> None:
    """Ten times as many pictures, whose features would take 147 MB more, take less than a tenth of that more
    at the peak.

    In a process of its own, whose C library hands freed memory back at once: what it keeps otherwise is some
    40 MB, now and then.
    """
    if not RESET.exists():
        pytest.skip("this system does not tell how much memory a process takes")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "tests.eval.memory", "2000", "20000"]
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    few, many = json.loads(run.stdout)
    assert many - few < 147e6 / 10
