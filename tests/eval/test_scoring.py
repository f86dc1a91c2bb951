"""Scoring as a whole, in one process: the numbers are those of the mathematics, whatever holds the pictures,
and no work is lost."""

from __future__ import annotations

import errno
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import models
from eval import feature_pass, reference, scoring
from eval.feature_pass import Features
from eval.features import registry
from eval.features.custom import Custom
from eval.features.protocols import PROTOCOLS, Splits
from eval.features.registry import EXTRACTORS, ExtractorParams, Tower, build
from eval.images.generated import GeneratedPictures
from eval.images.subset import first_pictures
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score, shuffled_splits
from eval.metrics.kernel import kernel_distance
from eval.metrics.manifold import density_coverage, precision_recall
from eval.metrics.moments import Moments
from eval.metrics.registry import METRICS, Evidence
from eval.report import make_report
from eval.results import Result, check_comparable, read_result
from eval.sheet import Sheet
from eval.tables import markdown_table
from samplers.run import run as draw
from tests.eval import small_inception
from tests.eval.photographs import photographs
from tests.eval.test_clip_features import CONFIG
from tests.peers import open_clip
from tests.samplers.test_run import saved
from train.data.folder import FolderPictures
from train.data.source import Source, Unreadable
from train.data.tensors import TensorPictures

N = 20


@pytest.fixture(autouse=True)
def inception(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small one in its place."""
    monkeypatch.setitem(EXTRACTORS, "inception", small_inception.KNOWN)
    registry._built.cache_clear()
    yield
    registry._built.cache_clear()


def crops(n: int, seed: int = 0, side: int = 24) -> list[Tensor]:
    """uint8 (3, side, side) of photographs."""
    generator, found = torch.Generator().manual_seed(seed), []
    for i in range(n):
        picture = list(photographs().values())[i % 3]
        top, left = (
            int(torch.randint(0, length - side, (), generator=generator)) for length in picture.shape[1:]
        )
        found.append(picture[:, top : top + side, left : left + side])
    return found


def write(pictures: Sequence[Tensor], folder: Path) -> Path:
    """As 000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """samples/ and real/, crops of photographs; empty/."""
    place = tmp_path_factory.mktemp("pictures")
    write(crops(N), place / "samples")
    write(crops(N + 5, seed=1), place / "real")
    (place / "empty").mkdir()
    return place


@pytest.fixture
def score(folders: Path, tmp_path: Path) -> Callable[..., Result]:
    """Scores samples/ against real/, or as settings say, into a file of its own."""

    def run(**settings: Any) -> Result:
        usual = {
            "samples": str(folders / "samples"),
            "reference": str(folders / "real"),
            "out": str(tmp_path / "result.json"),
        }
        written = scoring.run({"device": "cpu", "progress": False, **usual, **settings})
        assert written is not None
        return written.result

    return run


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is saved however short it took."""
    monkeypatch.setattr(feature_pass, "WORTH_SAVING", -1.0)


def notes(result: Result) -> tuple[str, ...]:
    """But for the one that says how many samples are usual."""
    return tuple(note for note in result.notes if "is usually of" not in note)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that folders were asked for."""
    asked: list[str] = []
    own = FolderPictures.read

    def reading(self: FolderPictures, indices: Sequence[int]) -> Iterable[Tensor | Unreadable]:
        asked.extend(self.names[i] for i in indices)
        return own(self, indices)

    monkeypatch.setattr(FolderPictures, "read", reading)
    return asked


def features(folder: Path, output: str, protocol: str = "clean", weights: str = "weights") -> Tensor:
    """Of the pictures of a folder, all at once."""
    source = FolderPictures(folder)
    pictures = [picture for picture in source.read(range(len(source))) if isinstance(picture, Tensor)]
    return small_inception.Small(weights, protocol)(pictures, [output])[output]


def values(result: Result) -> dict[str, tuple[float, float, float]]:
    return {name: (figure.value, figure.low, figure.high) for name, figure in result.figures.items()}


def assert_same(a: Result, b: Result) -> None:
    """Numbers to the last bit, NaN included, and pictures."""
    assert json.dumps(values(a)) == json.dumps(values(b))
    assert a.samples["sha256"] == b.samples["sha256"]


def refusal(ask: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """What is said, in one line."""
    with pytest.raises(kind) as said:
        ask()
    assert "\n" not in str(said.value)
    return str(said.value)


# Numbers ----------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_mathematics(score: Callable[..., Result], folders: Path) -> None:
    """Every figure of Inception's features is what its function gives for the features of all pictures at
    once."""
    metrics = [
        "fid",
        "sfid",
        "kid",
        "inception_score",
        "precision",
        "recall",
        "density",
        "coverage",
        "frechet",
        "kernel",
    ]
    found = score(metric=metrics, groups=7).figures
    assert list(found) == metrics
    ours, theirs = (features(folders / side, "pool") for side in ("samples", "real"))
    distance = frechet_distance(Moments.of(ours), Moments.of(theirs))
    assert found["fid"].value == pytest.approx(distance, rel=1e-9)
    assert found["frechet"].value == found["fid"].value
    ours_s, theirs_s = (features(folders / side, "spatial") for side in ("samples", "real"))
    assert found["sfid"].value == pytest.approx(
        frechet_distance(Moments.of(ours_s), Moments.of(theirs_s)), rel=1e-9
    )
    value, error = kernel_distance(ours, theirs)
    assert (found["kid"].value, found["kid"].extra["error"]) == (value, error)
    assert (found["kid"].low, found["kid"].high) == pytest.approx(
        (value - 1.96 * error, value + 1.96 * error), rel=1e-4
    )
    assert found["kernel"].value == value
    by_hand = inception_score(features(folders / "samples", "logits_unbiased"), shuffled_splits(N))
    assert found["inception_score"].value == by_hand.value
    assert (found["precision"].value, found["recall"].value) == tuple(precision_recall(ours, theirs))
    assert (found["density"].value, found["coverage"].value) == density_coverage(ours, theirs)[:2]
    for name in ("fid", "sfid", "kid", "inception_score", "precision", "recall", "coverage"):
        assert found[name].low <= found[name].value <= found[name].high, name


def test_a_result_says_what_it_rests_on(score: Callable[..., Result], folders: Path, tmp_path: Path) -> None:
    """N, the SHA-256 of samples, reference, training pictures and weights, protocol, settings, versions;
    strict JSON, which reads back."""
    found = score(metric=["fid", "kid", "memorised"], training=str(folders / "real"))
    content = json.loads(
        (tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert read_result(tmp_path / "result.json").to_json() == content == found.to_json()
    real = score(samples=str(folders / "real"), metric="inception_score", out=str(tmp_path / "real.json"))
    for name, figure in content["figures"].items():
        basis = figure["basis"]
        assert (figure["n"], basis.get("n")) == (N, None if name == "memorised" else N), (
            name
        )  # a share is one of any number
        assert basis["extractor"] == {
            "network": "small",
            "weights": "weights".ljust(64, "0"),
            "prepared": "clean",
            "random": False,
        }
        assert basis["reference"] == real.samples["sha256"]
        assert basis["output"] == "pool"
    assert content["figures"]["fid"]["basis"]["protocol"] == "clean"
    assert content["figures"]["memorised"]["basis"]["training"] == real.samples["sha256"]
    assert content["samples"]["sizes"] == ["24x24"]
    assert content["samples"]["origin"] == str(folders / "samples")
    assert content["settings"]["groups"] == 17
    assert {"torch", "numpy", "python", "git", "command", "plain-diffusion"} <= content["facts"].keys()
    assert content["notes"] == ["under clean, fid is usually of 50,000 samples; these are 20"]


def test_random_weights_are_noted(score: Callable[..., Result]) -> None:
    """In the notes, and in what every number rests on."""
    found = score(metric=["fid"], extractors={"inception": "random"})
    assert notes(found) == ("small has random weights: its numbers mean nothing outside a trial",)
    assert found.figures["fid"].random


def shards(folder: Path, place: Path) -> str:
    """The pictures of a folder in three tar files, in their order."""
    files = sorted(folder.iterdir())
    for k in range(3):
        with tarfile.open(place / f"{folder.name}-{k}.tar", "w") as archive:
            for file in files[k * 9 : (k + 1) * 9]:
                archive.add(file, file.name)
    return f"{place}/{folder.name}-{{0..2}}.tar"


def test_what_holds_the_pictures_changes_nothing(
    score: Callable[..., Result], folders: Path, tmp_path: Path
) -> None:
    """A folder, tar shards and arrays of the same pictures: the same figures to the last bit, the same
    SHA-256."""
    pixels = np.stack([np.array(Image.open(file)) for file in sorted((folders / "samples").iterdir())])
    np.savez(tmp_path / "samples.npz", pixels)
    np.save(tmp_path / "samples.npy", pixels)
    metric = ["fid", "kid", "inception_score", "precision", "recall"]
    first = score(metric=metric)
    for i, other in enumerate(
        (shards(folders / "samples", tmp_path), str(tmp_path / "samples.npz"), str(tmp_path / "samples.npy"))
    ):
        assert_same(score(samples=other, metric=metric, out=str(tmp_path / f"{i}.json")), first)
    moved = score(
        reference=shards(folders / "real", tmp_path), metric=metric, out=str(tmp_path / "moved.json")
    )
    assert_same(moved, first)
    check_comparable([first, moved], "fid")


def test_only_the_first_pictures(score: Callable[..., Result], folders: Path, tmp_path: Path) -> None:
    """n takes that many, as a folder of no more would; more than there are is refused."""
    write(crops(N)[:12], tmp_path / "few")
    assert_same(
        score(n=12, metric="fid"),
        score(samples=str(tmp_path / "few"), metric="fid", out=str(tmp_path / "few.json")),
    )
    assert (
        refusal(lambda: score(n=21, metric="fid"))
        == f"{folders / 'samples'} has 20 pictures, fewer than n=21"
    )


@pytest.mark.parametrize("protocol", ["clean", "legacy_pytorch", "torch_fidelity", "adm"])
def test_numbers_of_other_protocols_are_not_compared(
    protocol: str, score: Callable[..., Result], tmp_path: Path
) -> None:
    """check_comparable names the protocol, and the report has them in tables of their own."""
    (tmp_path / "results").mkdir()
    one = score(metric="fid", name="one", out=str(tmp_path / "results" / "one.json"))
    other = score(metric="fid", name="other", protocol=protocol, out=str(tmp_path / "results" / "other.json"))
    make_report(tmp_path)
    tables = (tmp_path / "results.md").read_text().count("| FID")
    if protocol == "clean":
        check_comparable([one, other], "fid")
    else:
        assert f"protocol is clean there and {protocol} here" in refusal(
            lambda: check_comparable([one, other], "fid")
        )
    assert tables == (1 if protocol == "clean" else 2), (tmp_path / "results.md").read_text()


# Prompts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Settings with a small network that OpenCLIP knows by name."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "configs")
    return {"clip": {"name": "tiny", "weights": "random"}}


LONG = "a photograph of " + " ".join(f"cat {i}" for i in range(60))


def test_clip_scores_are_those_of_pictures_and_their_prompts(
    clip: dict[str, Any], score: Callable[..., Result], folders: Path, tmp_path: Path
) -> None:
    """The mean of 100 cos and of 2.5 max(cos, 0) over the pairs, by hand; captions that were cut are counted
    in the notes."""
    prompts = [f"photograph number {i}" for i in range(N - 1)] + [LONG]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    found = score(
        metric=["clip_score", "clip_score_hessel"], extractors=clip, prompts=str(tmp_path / "prompts.txt")
    )
    network: Any = build("clip", ExtractorParams(clip=Tower("tiny", "random")), "clean", torch.float32)
    source = FolderPictures(folders / "samples")
    pictures = [picture for picture in source.read(range(N)) if isinstance(picture, Tensor)]
    image = network(pictures, ["image"])["image"].double()
    cosine = (image * network.text(prompts).rows.double()).sum(1)
    assert found.figures["clip_score"].value == pytest.approx(100 * float(cosine.mean()), abs=1e-4)
    half = 1.96 * 100 * float(cosine.std()) / N**0.5
    assert found.figures["clip_score"].high - found.figures["clip_score"].value == pytest.approx(
        half, rel=1e-4
    )
    depicts = (image * network.text([f"A photo depicts {prompt}" for prompt in prompts]).rows.double()).sum(1)
    assert found.figures["clip_score_hessel"].value == pytest.approx(
        2.5 * float(depicts.clamp(min=0).mean()), abs=1e-5
    )
    assert "clip_score: 1 of 20 prompts are longer than the network reads, and were cut" in found.notes
    assert len(found.figures["clip_score"].basis["prompts"]) == 64
    assert "reference" not in found.figures["clip_score"].basis


def test_a_picture_that_is_left_out_takes_its_prompt_along(
    clip: dict[str, Any], score: Callable[..., Result], tmp_path: Path
) -> None:
    """All others keep theirs."""
    settings: dict[str, Any] = {
        "metric": "clip_score",
        "extractors": clip,
        "prompts": str(tmp_path / "prompts.txt"),
    }
    prompts = [f"photograph number {i}" for i in range(N)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    folder = write(crops(N), tmp_path / "s")
    (folder / "004.png").write_text("no picture")
    found = score(samples=str(folder), on_error="skip", **settings)
    (folder / "004.png").unlink()
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:4] + prompts[5:]))
    whole = score(samples=str(folder), **settings)
    assert found.figures["clip_score"].value == pytest.approx(whole.figures["clip_score"].value, abs=1e-6)
    check_comparable([found, whole], "clip_score")


def test_other_prompts_are_another_result(
    clip: dict[str, Any], score: Callable[..., Result], tmp_path: Path
) -> None:
    """Of the same pictures: they are scored again, and the numbers are not compared."""
    file = tmp_path / "prompts.txt"
    settings: dict[str, Any] = {"metric": "clip_score", "extractors": clip, "prompts": str(file)}
    file.write_text("a cat\n" * N)
    first = score(**settings)
    file.write_text("a dog\n" * N)
    second = score(**settings)
    assert first.figures["clip_score"].value != second.figures["clip_score"].value
    assert "prompts is" in refusal(lambda: check_comparable([first, second], "clip_score"))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat\n" * (N + 1), "has 21 prompts for 20 pictures: give one each"),
        ("a cat\n" * (N - 1), "has 19 prompts for 20 pictures: give one each"),
        ("a cat\n" * 3 + "\n" + "a cat\n" * (N - 4), "prompt 4 of the 20 in"),
        (None, "clip_score needs the prompts of"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    prompts: str | None,
    message: str,
    clip: dict[str, Any],
    score: Callable[..., Result],
    read: list[str],
    tmp_path: Path,
) -> None:
    """Before a picture is read."""
    (tmp_path / "prompts.txt").write_text(prompts or "")
    given = {} if prompts is None else {"prompts": str(tmp_path / "prompts.txt")}
    assert message in refusal(lambda: score(metric="clip_score", extractors=clip, **given))
    assert read == []


# Statistics -------------------------------------------------------------------------------------------------


def statistics(folders: Path, out: Path, **settings: Any) -> str:
    reference.run(
        {"samples": str(folders / "real"), "out": str(out), "device": "cpu", "progress": False, **settings}
    )
    return str(out)


def test_statistics_stand_for_their_pictures(
    score: Callable[..., Result], folders: Path, tmp_path: Path
) -> None:
    """Computed once, they give the same distances to the last bit, and say what was computed of what; no work
    is left beside them."""
    file = statistics(folders, tmp_path / "real.safetensors", outputs=["pool", "spatial"])
    assert [path.name for path in tmp_path.iterdir()] == ["real.safetensors"]
    metric = ["fid", "sfid"]
    one, other = score(metric=metric), score(metric=metric, reference=file, out=str(tmp_path / "other.json"))
    assert json.dumps(values(one)) == json.dumps(values(other))
    assert notes(other) == ()
    for name in metric:
        check_comparable([one, other], name)  # by the pictures that they are of


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "adm"}, "were made with another extractor: "),
        ({"extractors": {"inception": "other"}}, "were made with another extractor: weights is "),
        ({"metric": "sfid"}, "has statistics of pool, not of 'spatial'"),
        ({"metric": ["fid", "kid"]}, "kid compares picture by picture: "),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    settings: dict[str, Any],
    message: str,
    score: Callable[..., Result],
    folders: Path,
    tmp_path: Path,
    read: list[str],
) -> None:
    """Of another protocol or of other weights, without the output; and those of no pictures, where these are
    needed."""
    file = statistics(folders, tmp_path / "real.safetensors")
    read.clear()
    assert message in refusal(lambda: score(**{"metric": "fid", "reference": file, **settings}))
    assert read == []


def foreign(folder: Path, path: Path, pictures: bool = False, width: int | None = None) -> str:
    """Statistics of a folder as pytorch-fid or, with pictures, as ADM writes them."""
    arrays: dict[str, Any] = {}
    for output, (mean, covariance) in {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
        if output == "pool" or pictures:
            rows = features(folder, output, "adm" if pictures else "clean").double()[:, :width].numpy()
            arrays |= {mean: rows.mean(0), covariance: np.cov(rows, rowvar=False)}
    if pictures:
        arrays["arr_0"] = np.stack([np.array(Image.open(file)) for file in sorted(folder.iterdir())[:12]])
    np.savez(path, **arrays)
    return str(path)


def test_statistics_of_pytorch_fid_serve(score: Callable[..., Result], folders: Path, tmp_path: Path) -> None:
    """The distance is that of the pictures, and a note says that nobody knows the network; another width is
    refused."""
    file = foreign(folders / "real", tmp_path / "real.npz")
    found = score(metric="fid", reference=file)
    assert found.figures["fid"].value == pytest.approx(
        score(metric="fid", out=str(tmp_path / "b.json")).figures["fid"].value, rel=1e-9
    )
    assert notes(found) == (
        f"{file} does not say which network its statistics are of, nor how pictures were prepared",
    )
    narrow = foreign(folders / "real", tmp_path / "narrow.npz", width=4)
    assert "are of features of width 4, and 'pool' is 6 wide here" in refusal(
        lambda: score(metric="fid", reference=narrow)
    )
    assert refusal(lambda: score(metric="kid", reference=file)) == (
        f"kid compares picture by picture: {file} holds reference statistics, and no pictures: these are an "
        "array called arr_0"
    )


def test_a_reference_batch_of_adm(score: Callable[..., Result], folders: Path, tmp_path: Path) -> None:
    """FID and sFID are to its statistics, of all pictures; precision and recall to the pictures that are in
    it."""
    file = foreign(folders / "real", tmp_path / "batch.npz", pictures=True)
    found = score(metric=["fid", "sfid", "precision", "recall"], reference=file, protocol="adm").figures
    for metric, output in (("fid", "pool"), ("sfid", "spatial")):
        ours, theirs = (Moments.of(features(folders / side, output, "adm")) for side in ("samples", "real"))
        assert found[metric].value == pytest.approx(frechet_distance(ours, theirs), rel=1e-9)
    real = features(folders / "real", "pool", "adm")[:12]
    by_hand = precision_recall(features(folders / "samples", "pool", "adm"), real)
    assert (found["precision"].value, found["recall"].value) == tuple(by_hand)
    assert (
        found["fid"].basis["reference"]
        == found["sfid"].basis["reference"]
        != found["precision"].basis["reference"]
    )


# Work that is not lost, and not done twice ------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    """The files that are there, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_run_is_not_repeated(
    score: Callable[..., Result], folders: Path, tmp_path: Path, read: list[str]
) -> None:
    """Nothing is read again, and nothing but the result is left, until pictures, settings or weights
    change."""
    write(crops(N), tmp_path / "samples")
    settings: dict[str, Any] = {
        "samples": str(tmp_path / "samples"),
        "metric": ["fid", "kid"],
        "out": str(tmp_path / "out" / "a.json"),
    }
    first = score(**settings)
    assert left(tmp_path / "out") == ["a.json"]
    assert len(read) == N + N + 5
    read.clear()
    before = (tmp_path / "out" / "a.json").stat().st_mtime_ns
    assert score(**settings, batch_size=3).to_json() == first.to_json()
    assert read == []
    assert (tmp_path / "out" / "a.json").stat().st_mtime_ns == before
    Image.fromarray(crops(1, seed=9)[0].permute(1, 2, 0).numpy()).save(tmp_path / "samples" / "003.png")
    assert score(**settings).samples["sha256"] != first.samples["sha256"]
    for change in ({"protocol": "adm"}, {"extractors": {"inception": "other"}}, {"groups": 7}):
        read.clear()
        score(**settings | change)
        assert len(read) == N + N + 5, change
    assert left(tmp_path / "out") == ["a.json"]


def test_other_metrics_join_those_that_are_there(
    score: Callable[..., Result], tmp_path: Path, read: list[str]
) -> None:
    """One after the other, or at once: the same figures. What is there is not computed again, and what is
    asked of less is still there."""
    whole = score(metric=["fid", "kid", "inception_score"], out=str(tmp_path / "whole.json"))
    score(metric="fid")
    assert set(score(metric=["kid", "fid"]).figures) == {"fid", "kid"}
    read.clear()
    found = score(metric=["inception_score"])
    assert len(read) == N, "the reference is not needed for it"
    assert values(found) == values(whole)
    read.clear()
    assert values(score(metric=["kid"])) == values(whole)
    assert read == []


def test_other_settings_get_a_place_of_their_own(folders: Path, tmp_path: Path) -> None:
    """Beside the samples nothing is replaced by another protocol; pictures that have changed are what
    replaces."""
    samples = write(crops(N), tmp_path / "s")
    config = {
        "samples": str(samples),
        "reference": str(folders / "real"),
        "metric": "fid",
        "device": "cpu",
        "progress": False,
    }
    paths = [
        written.path.name
        for protocol in ("clean", "adm", "clean")
        if (written := scoring.run({**config, "protocol": protocol}))
    ]
    assert paths[0] == paths[2] == "s.scores.json"
    assert re.fullmatch(r"s\.scores-[0-9a-f]{8}\.json", paths[1])
    write(crops(N + 1), samples)
    written = scoring.run(config)
    assert written is not None
    assert (written.path.name, written.new, written.result.samples["n"]) == ("s.scores.json", True, N + 1)


def test_a_part_takes_classes_in_turn(score: Callable[..., Result], tmp_path: Path) -> None:
    """n=6 of two classes are three of each, whatever their order in the folder; what is drawn says itself how
    many."""
    for label in ("a", "b"):
        write(crops(10, seed=ord(label)), tmp_path / "s" / label)
    part = first_pictures(FolderPictures(tmp_path / "s"), 6)
    assert part.names == [f"{label}/{i:03d}.png" for label in "ab" for i in range(3)]
    assert score(samples=str(tmp_path / "s"), metric="fid", n=6).samples["n"] == 6


def test_splits_in_order_take_classes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """ADM's of a folder sorted by class: as they come from a sampler that draws classes in turn, where runs
    of one class would score 1."""
    logits = 50 * torch.eye(4).repeat_interleave(6, 0)
    indices = torch.arange(24)
    collected = Features(indices, torch.empty(24, 32), {}, {"inception.logits_unbiased": logits})
    protocol = replace(PROTOCOLS["adm"], splits=Splits(size=8))
    numbers = torch.arange(6).repeat(4)
    evidence = Evidence(
        "inception.logits_unbiased", collected, protocol, torch.device("cpu"), numbers=numbers
    )
    assert METRICS["inception_score"].compute(evidence).value == pytest.approx(4.0, rel=1e-6)
    assert METRICS["inception_score"].compute(replace(evidence, numbers=None)).value < 2.1


def test_pictures_and_networks_of_ones_own(tmp_path: Path) -> None:
    """A module and pictures in memory are scored as files are; the basis names its weights."""
    network = torch.nn.Linear(3 * 24 * 24, 5)
    mine = Custom(
        network,
        name="mine",
        prepared="as they are",
        width=5,
        prepare=lambda pictures: torch.stack(list(pictures)).flatten(1).float() / 255,
    )
    pictures = [torch.stack(crops(N)), torch.stack(crops(N + 3, 1))]
    sources: dict[Any, Source] = {
        "samples": TensorPictures(pictures[0]),
        "reference": TensorPictures(pictures[1]),
    }
    config = {
        "metric": ["frechet", "kernel"],
        "features": "mine",
        "out": str(tmp_path / "a.json"),
        "device": "cpu",
        "progress": False,
    }
    written = scoring.run(config, sources=sources, extractors={"mine": mine})
    assert written is not None
    x, y = (network(each.flatten(1).float() / 255).detach() for each in pictures)
    assert written.result.figures["frechet"].value == pytest.approx(
        frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-6
    )
    assert written.result.figures["kernel"].basis["extractor"]["network"] == "mine"
    with pytest.raises(ValueError, match="no extractor named 'mien'; did you mean 'mine'"):
        scoring.run({**config, "features": "mien"}, sources=sources, extractors={"mine": mine})


def test_pictures_that_change_their_class_are_scored_again(
    score: Callable[..., Result], tmp_path: Path, read: list[str]
) -> None:
    """Though not a byte of them is another."""
    for label in ("a", "b"):
        write(crops(10), tmp_path / "s" / label)
    score(samples=str(tmp_path / "s"), metric="kernel")
    (tmp_path / "s" / "b").rename(tmp_path / "s" / "c")
    read.clear()
    score(samples=str(tmp_path / "s"), metric="kernel")
    assert len([name for name in read if name.startswith("c/")]) == 10


def test_beside_the_samples(score: Callable[..., Result], tmp_path: Path) -> None:
    """Is where the result goes by itself; given a folder for a report, it gathers there with a sheet."""
    write(crops(N), tmp_path / "samples" / "images")
    settings: dict[str, Any] = {"samples": str(tmp_path / "samples" / "images"), "metric": "fid", "out": None}
    score(**settings)
    assert left(tmp_path / "samples") == ["images", "images.scores.json"]
    score(**settings, report=str(tmp_path / "report"), name="First try, 20%")
    assert [file.rsplit("-", 1)[0] for file in left(tmp_path / "report" / "results")] == [
        "first-try-20",
        "first-try-20",
    ]
    assert {Path(file).suffix for file in left(tmp_path / "report" / "results")} == {".json", ".png"}


def test_results_that_gather_do_not_replace_each_other(score: Callable[..., Result], tmp_path: Path) -> None:
    """Of the same samples with other settings, each keeps its file; with more metrics the one that there is
    grows."""
    settings: dict[str, Any] = {"metric": ["fid"], "out": None, "report": str(tmp_path)}
    for change in ({}, {"n": 12}, {"protocol": "adm"}, {"metric": ["fid", "kid"]}):
        score(**settings | change)
    found = [read_result(path) for path in (tmp_path / "results").glob("*.json")]
    assert sorted((one.samples["n"], one.settings["protocol"], list(one.figures)) for one in found) == [
        (12, "clean", ["fid"]), (20, "adm", ["fid"]), (20, "clean", ["fid", "kid"]),
    ]  # fmt: skip


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), OSError(errno.EIO, "a disk has died")])
def test_what_breaks_off_goes_on(
    stopped: BaseException,
    score: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: list[str],
) -> None:
    """By Ctrl-C or an error, in the middle of the reference: what is done is not read again, and no bit of
    the numbers changes."""
    whole = score(metric=["fid", "kid"], out=str(tmp_path / "whole.json"))
    own = FolderPictures.read

    def breaking(self: FolderPictures, indices: Sequence[int]) -> Iterable[Tensor | Unreadable]:
        if self.origin.endswith("real") and 16 in indices:
            raise stopped
        return own(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(FolderPictures, "read", breaking)
        with pytest.raises(type(stopped)):
            score(metric=["fid", "kid"], batch_size=4)
    assert not (tmp_path / "result.json").exists()
    assert len([name for name in left(tmp_path) if name.startswith(".result.")]) == 2
    read.clear()
    assert_same(score(metric=["fid", "kid"], batch_size=4), whole)
    assert read == [f"{i:03d}.png" for i in range(min(map(int, (name[:3] for name in read))), N + 5)]
    assert len(read) < 16
    assert left(tmp_path) == ["result.json", "whole.json"]


def test_a_metric_that_fails_loses_nothing(
    score: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    """The figures before it were said, and the next try reads no picture."""
    said: list[str] = []

    def failing(evidence: Any) -> Any:
        raise ValueError("no memory for this")

    settings = {
        "samples": str(write(crops(N), tmp_path / "s")),
        "reference": str(write(crops(N, 1), tmp_path / "r")),
    }
    config = {
        **settings,
        "metric": ["fid", "kid"],
        "device": "cpu",
        "progress": False,
        "out": str(tmp_path / "a.json"),
    }
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "kid", replace(METRICS["kid"], compute=failing))
        with pytest.raises(ValueError, match="no memory for this"):
            scoring.run(config, lambda name, figure: said.append(name))
    assert said == ["fid"]
    assert list(read_result(tmp_path / "a.json").figures) == ["fid"]
    read.clear()
    scoring.run(config, lambda name, figure: said.append(name))
    assert said == ["fid", "fid", "kid"]
    assert read == []
    assert left(tmp_path) == ["a.json", "r", "s"]


def test_a_full_disk_loses_nothing(
    score: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: list[str],
    folders: Path,
) -> None:
    """At the result: the figures were said, the error names the file, and the next try reads no picture."""
    said: list[str] = []
    usual = {
        "samples": str(folders / "samples"),
        "reference": str(folders / "real"),
        "metric": ["fid"],
        "device": "cpu",
    }
    config = {**usual, "progress": False, "out": str(tmp_path / "a.json")}
    with monkeypatch.context() as patch:

        def full(*args: Any, **kwargs: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"cannot write .*a\.json: No space left on device"):
            scoring.run(config, lambda name, figure: said.append(name))
    assert said == ["fid"]
    read.clear()
    assert scoring.run(config) is not None
    assert read == []
    assert left(tmp_path) == ["a.json"]


def test_a_sheet_that_cannot_be_written_is_made_the_next_time(
    score: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: Path
) -> None:
    """A result is only done when its sheet is."""
    with monkeypatch.context() as patch:

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Sheet, "save", full)
        with pytest.raises(OSError, match="No space left"):
            score(metric="fid", out=None, report=str(tmp_path))
    score(metric="fid", out=None, report=str(tmp_path))
    assert sorted(Path(file).suffix for file in left(tmp_path / "results")) == [".json", ".png"]


def test_a_cache_serves_all_that_share_a_reference(
    score: Callable[..., Result], folders: Path, tmp_path: Path, read: list[str]
) -> None:
    """The reference is read once for many samples, and again when it has changed or other features are asked
    for."""
    write(crops(N, seed=5), tmp_path / "others")
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache"), "metric": ["fid", "kid"]}
    alone = score(metric=["fid", "kid"], samples=str(tmp_path / "others"), out=str(tmp_path / "alone.json"))
    score(**settings)
    read.clear()
    shared = score(**settings, samples=str(tmp_path / "others"), out=str(tmp_path / "b.json"))
    assert len(read) == N
    assert_same(shared, alone)
    assert len(left(tmp_path / "cache")) == 1
    read.clear()
    score(**settings | {"metric": ["sfid"]}, out=str(tmp_path / "c.json"))
    assert len(read) == N + N + 5


# Samples that a model draws ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of ten classes, of 8x8."""
    torch.manual_seed(0)
    return str(saved(tmp_path_factory.mktemp("model") / "model.safetensors"))


def test_drawn_samples_are_those_that_would_be_written(
    model: str, score: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By python -m samplers with the same seeds: the same pixels and figures. Nothing is written but the
    result, which says how it was drawn and what that cost; called again, nothing is drawn.
    """
    how: dict[str, Any] = {
        "n": 30,
        "sampler": "ddpm",
        "steps": 4,
        "guidance": 2.0,
        "seed": 3,
        "batch_size": 30,
        "device": "cpu",
    }
    real = str(write(crops(N, side=8), tmp_path / "real"))
    out = tmp_path / "out" / "drawn.json"
    found = score(samples={"run": model, **how}, reference=real, metric=["fid", "kid"], out=str(out))
    assert left(out.parent) == ["drawn.json"]
    written = draw({"run": model, "out": str(tmp_path / "written"), "progress": False, **how}) / "images"
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in written.glob("*/*.png"):
        file.rename(flat / file.name)
    assert_same(score(samples=str(flat), reference=real, metric=["fid", "kid"]), found)
    drawn = found.samples
    assert (drawn["settings"]["sampler"], drawn["settings"]["steps"], drawn["settings"]["guidance"]) == (
        "ddpm",
        4,
        2.0,
    )
    assert drawn["settings"]["fingerprint"] == models.load(model).fingerprint
    assert (drawn["calls"], drawn["n"], drawn["origin"]) == (8, 30, model)
    assert drawn["seconds"] > 0
    assert found.name == "model.safetensors, ddpm, 4 steps, guidance 2"
    monkeypatch.setattr(GeneratedPictures, "read", lambda self, indices: pytest.fail("drawn again"))
    assert (
        score(samples={"run": model, **how}, reference=real, metric=["fid", "kid"], out=str(out)).to_json()
        == found.to_json()
    )


def test_drawing_that_breaks_off_goes_on(
    model: str, score: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn is not drawn again, and a report of what took no time is made all the same."""
    how: dict[str, Any] = {
        "run": model,
        "n": 30,
        "sampler": "ddim",
        "steps": 2,
        "batch_size": 10,
        "device": "cpu",
    }
    settings: dict[str, Any] = {
        "samples": how,
        "metric": "inception_score",
        "batch_size": 10,
        "out": None,
        "report": str(tmp_path),
    }
    asked: list[int] = []
    own, stops = GeneratedPictures.read, [20]

    def stopping(self: GeneratedPictures, indices: Sequence[int]) -> Iterable[Tensor | Unreadable]:
        if stops and stops[0] in indices:
            raise KeyboardInterrupt
        asked.extend(indices)
        return own(self, indices)

    def failing(evidence: Any) -> Any:
        raise ValueError("no memory for this")

    monkeypatch.setattr(GeneratedPictures, "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        score(**settings)
    assert asked == list(range(20))
    stops.clear()
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "inception_score", replace(METRICS["inception_score"], compute=failing))
        with pytest.raises(ValueError, match="no memory for this"):
            score(**settings)
    assert asked == list(range(30))
    found = score(**settings)
    assert sorted(asked[30:]) == list(range(30))  # for the sheet, three of each class
    assert read_result(next((tmp_path / "results").glob("*.json"))).samples["seconds"] is None
    assert found.samples["calls"] == 2
    make_report(tmp_path)


# Mistakes ---------------------------------------------------------------------------------------------------


def spoilt(folder: Path, kind: str) -> Path:
    """Twenty pictures, one or two of which are not as they should be."""
    write(crops(N), folder)
    if kind == "broken":
        for name in ("004.png", "007.png"):
            (folder / name).write_bytes((folder / name).read_bytes()[:300])
    elif kind == "mixed":
        Image.new("RGB", (30, 20)).save(folder / "004.png")
    elif kind == "16 bits":
        Image.fromarray(np.full((24, 24), 1000, np.uint16)).save(folder / "004.png")
    else:
        Image.new("RGBA", (24, 24), (255, 0, 0, 40)).save(folder / "004.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("broken", "004.png cannot be read as a picture: "),
        ("mixed", "004.png of "),
        ("16 bits", "004.png has pixels of more than 8 bits"),
        ("transparent", "004.png is transparent in places: give it a background first"),
    ],
)
def test_pictures_that_cannot_be_used(
    kind: str, message: str, score: Callable[..., Result], tmp_path: Path
) -> None:
    """Are named and counted; on_error=skip leaves them out, sizes=any takes them, and the result says so."""
    folder = spoilt(tmp_path / "samples", kind)
    said = refusal(lambda: score(samples=str(folder), metric="fid", batch_size=3))
    assert message in said
    if kind == "mixed":
        assert said.endswith("is 30x20, others are 24x24: sizes=any resizes each from its own size")
        found = score(samples=str(folder), metric="fid", sizes="any")
        assert notes(found) == ("the sample pictures have 2 sizes",)
        assert (found.samples["n"], found.samples["sizes"]) == (20, ["30x20", "24x24"])
        return
    count = 2 if kind == "broken" else 1
    assert said.endswith("; 1 more of 20 cannot be used (on_error=skip leaves such pictures out)") == (
        count == 2
    )
    found = score(samples=str(folder), metric="fid", on_error="skip", batch_size=3)
    assert notes(found) == (f"{count} of 20 sample pictures could not be used and were left out",)
    assert (found.samples["n"], found.figures["fid"].n, len(found.samples["skipped"])) == (
        20 - count,
        20 - count,
        count,
    )


def test_nothing_that_can_be_used(score: Callable[..., Result], tmp_path: Path) -> None:
    """All pictures left out: one line, whatever the metric."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(N):
        (folder / f"{i:03d}.png").write_text("no picture")
    for metric in (
        "fid",
        "kid",
        "inception_score",
        "precision",
        "density",
        "memorised",
        "fid_infinity",
        "kid_subsets",
    ):
        said = refusal(
            partial(score, samples=str(folder), metric=metric, on_error="skip", training=str(folder))
        )
        least = METRICS[metric].least
        assert (
            said == f"{metric} needs at least {least} sample pictures, and {folder} has "
            f"{'20' if least > N else '0 of 20 that can be used'}"
        )


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "typo": (
        {"samples": "{folders}/sample"},
        "no such folder of pictures: {folders}/sample; did you mean {folders}/samples?",
    ),
    "empty": (
        {"samples": "{folders}/empty"},
        "no pictures in {folders}/empty: expected files ending in .bmp, ",
    ),
    "no reference": (
        {"reference": None},
        "fid needs reference pictures: reference=FOLDER, or a file of statistics",
    ),
    "reference": (
        {"reference": "{folders}/reel"},
        "no such folder of pictures: {folders}/reel; did you mean {folders}/real?",
    ),
    "statistics": (
        {"reference": "{folders}/a.safetensors"},
        "no such file of reference statistics: {folders}/a.safetensors",
    ),
    "arrays": ({"reference": "{folders}/a.npz"}, "no such file of pictures: {folders}/a.npz"),
    "no training": ({"metric": "memorised"}, "memorised needs training pictures: training=FOLDER"),
    "no labels": (
        {"metric": "accuracy"},
        "accuracy needs the classes of the pictures of {folders}/samples: keep them in a",
    ),
    "subsets": (
        {"metric": "kid_subsets"},
        "kid_subsets needs at least 1000 sample pictures, and {folders}/samples has 20",
    ),
    "few": ({"metric": "kid", "n": 2}, "kid needs at least 3 sample pictures, and {folders}/samples has 2"),
    "metric": ({"metric": "fdi"}, "no metric named 'fdi'; did you mean 'fid'?"),
    "twice": ({"metric": ["fid", "fid"]}, "metric must name metrics, each once, not fid, fid"),
    "none": ({"metric": []}, "metric must name metrics, each once, not none"),
    "protocol": ({"protocol": "cleen"}, "no protocol named 'cleen'; did you mean 'clean'?"),
    "features": ({"features": "dinov"}, "no extractor named 'dinov'; did you mean 'dinov2'?"),
    "weights": (
        {"metric": "fd_dinov2"},
        "vit_large_patch14_dinov2 needs weights: extractors.dinov2.weights=FILE",
    ),
    "clip": (
        {"metric": "cmmd", "extractors": {"cmmd": {"name": "ViT-L-14-336", "weights": "none.pt"}}},
        "none.pt",
    ),
    "groups": ({"groups": 0}, "groups must be at least 1, not 0"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    "setting": ({"sampels": "x"}, "no parameter named 'sampels'; did you mean 'samples'?"),
    "on_error": ({"on_error": "ignore"}, "on_error must be one of refuse, skip, not 'ignore'"),
    "n": ({"n": 0}, "n must be at least 1, not 0"),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes_are_said_before_any_work(
    settings: dict[str, Any],
    message: str,
    score: Callable[..., Result],
    folders: Path,
    tmp_path: Path,
    read: list[str],
) -> None:
    """In one line, and nothing is written."""
    filled = {
        key: value.format(folders=folders) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    said = refusal(lambda: score(**{"metric": "fid", **filled}), (ValueError, OSError))  # type: ignore[arg-type]
    assert message.format(folders=folders) in said
    assert read == []
    assert left(tmp_path) == []


def test_classes_that_the_classifier_does_not_know(
    score: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    """Are said before any work, with the nearest that it knows."""
    monkeypatch.setitem(EXTRACTORS, "digits", replace(small_inception.KNOWN, make=_classifying))
    write(crops(10), tmp_path / "s" / "3")
    write(crops(10), tmp_path / "s" / "cat")
    said = refusal(lambda: score(samples=str(tmp_path / "s"), metric="accuracy"))
    assert said == f"no class named 'cat'; known: {', '.join('0123456789')}"
    assert read == []


def test_the_kernel_distance_says_whether_classes_were_fixed(
    score: Callable[..., Result], folders: Path, tmp_path: Path
) -> None:
    """Where both sides have the same ones, of which each needs three pictures; otherwise they count as drawn,
    which is no other's like."""
    for side, seed in (("s", 3), ("r", 4)):
        for i, label in enumerate(("a", "b")):
            write(crops(10, seed + 10 * i), tmp_path / side / label)
    ours, theirs = (features(tmp_path / side, "pool") for side in ("s", "r"))
    labels = torch.tensor([0] * 10 + [1] * 10)
    settings: dict[str, Any] = {"samples": str(tmp_path / "s"), "metric": "kernel"}
    fixed = score(reference=str(tmp_path / "r"), **settings)
    assert fixed.figures["kernel"].value == kernel_distance(ours, theirs, labels, labels).value
    assert "classes is fixed there and drawn here" in refusal(
        lambda: check_comparable([fixed, score(**settings)], "kernel")
    )
    for file in sorted((tmp_path / "r" / "b").iterdir())[2:]:
        file.unlink()
    said = refusal(lambda: score(reference=str(tmp_path / "r"), **settings))
    assert said == f"kernel needs at least 3 pictures of each class, and {tmp_path / 'r'} has 2 of b"


def _classifying(params: ExtractorParams, protocol: str, dtype: torch.dtype) -> small_inception.Small:
    network = small_inception.small(params, protocol, dtype)
    network.widths = {"logits": 10}
    network.classes = tuple("0123456789")  # type: ignore[assignment]
    return network


def test_features_that_are_not_finite(
    score: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Name the picture; what came before it is kept."""
    own = small_inception.Small.features

    def spoiling(self: small_inception.Small, x: Tensor, outputs: Any) -> dict[str, Tensor]:
        found = own(self, x, outputs)
        if self.seen > 8:
            found["pool"] = found["pool"].clone()
            found["pool"][1] = torch.nan
        return found

    monkeypatch.setattr(small_inception.Small, "features", spoiling)
    said = refusal(lambda: score(metric="fid", batch_size=4))
    assert said.startswith("inception.pool of 1 of 4 pictures is not finite, the first is 009.png of ")
    assert left(tmp_path) == [".result.samples.safetensors"]


def test_what_is_in_the_way_is_not_replaced(
    score: Callable[..., Result], folders: Path, tmp_path: Path, read: list[str]
) -> None:
    """A file that is no result, a damaged one, a folder, a place that cannot be written."""
    (tmp_path / "list.json").write_text('{"a": 1}')
    (tmp_path / "damaged.json").write_text('{"name": "x", "fig')
    (tmp_path / "text.txt").write_text("my notes")
    (tmp_path / "folder").mkdir()
    for name in ("list.json", "damaged.json", "text.txt"):
        before = (tmp_path / name).read_bytes()
        said = refusal(partial(score, metric="fid", out=str(tmp_path / name)))
        assert str(tmp_path / name) in said
        assert "out=" in said
        assert (tmp_path / name).read_bytes() == before
    said = refusal(lambda: score(metric="fid", out=str(tmp_path / "folder")), OSError)
    assert (
        said == f"{tmp_path}/folder is a folder, not the file of a result: out={tmp_path}/folder/result.json"
    )
    assert "cannot write" in refusal(
        lambda: score(metric="fid", out=str(tmp_path / "text.txt" / "a.json")), OSError
    )
    assert read == []
    assert left(tmp_path) == ["damaged.json", "folder", "list.json", "text.txt"]


def test_work_that_is_damaged_is_named(score: Callable[..., Result], tmp_path: Path) -> None:
    """It is the user's to give up: another file, one cut short, a bit changed in features or in the
    description, no description."""
    cache = tmp_path / "cache"
    score(metric="kid", cache=str(cache), out=str(tmp_path / "first.json"))
    (state,) = cache.iterdir()
    whole = state.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    flipped = [
        bytes(b ^ (i == at) for i, b in enumerate(whole))
        for at in (start + 1, len(whole) - 1, whole.index(b"done") + 8)
    ]
    for content in (b"nothing of use", whole[:-9], *flipped):
        state.write_bytes(content)
        said = refusal(lambda: score(metric="kid", cache=str(cache)))
        assert said.startswith(f"the work saved in {state} is damaged: ")
        assert state.read_bytes() == content
    save_file({"indices": torch.zeros(1)}, state)
    assert f"{state} is damaged" in refusal(lambda: score(metric="kid", cache=str(cache)))
    state.unlink()
    score(metric="kid", cache=str(cache))


def test_samples_of_another_size_are_not_ranked_together(
    score: Callable[..., Result], folders: Path, tmp_path: Path
) -> None:
    """12 pixels against 24: a note says so, also where the reference is a file of statistics; and no rank is
    across sizes."""
    small = str(write(crops(N, side=12), tmp_path / "small"))
    file = statistics(folders, tmp_path / "real.safetensors")
    said = (
        "the samples are 12x12, the reference is 24x24: resizing them to one size is a part of every distance"
    )
    one, other = score(metric="fid", samples=small, out=str(tmp_path / "a.json")), score(metric="fid")
    assert (
        notes(one)
        == notes(score(metric="fid", samples=small, reference=file, out=str(tmp_path / "b.json")))
        == (said,)
    )
    assert notes(other) == ()
    with pytest.raises(
        ValueError, match="cannot be compared: size of the samples is 12x12 there and 24x24 here"
    ):
        check_comparable([one, other], "fid")
    table = markdown_table([replace(one, name="small"), replace(other, name="large")])
    assert table.count("not to be compared with the others") == 2
    assert "size of the samples 12x12" in table


def test_results_go_to_weights_and_biases_at_last(
    score: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, when the result is written; a failure there costs nothing of it."""
    logged: list[tuple[Any, ...]] = []

    def log(result: Result, project: str, path: Path) -> None:
        assert path.exists()
        logged.append((result.name, project))
        raise OSError("no network")

    monkeypatch.setattr(scoring, "log_result", log)
    with pytest.raises(OSError, match="no network"):
        score(metric="fid", wandb="project", name="a name")
    assert logged == [("a name", "project")]
    assert read_result(tmp_path / "result.json").name == "a name"
    assert left(tmp_path) == ["result.json"]
