"""Reference statistics: read from other programs' files as these read them, kept by ours to the last bit,
refused where they do not fit."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval.features.extractor import Identity
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import Moments
from eval.statistics_file import Statistics, check_identity, check_width, read_statistics, write_statistics
from tests.peers import pytorch_fid

IDENTITY = Identity("inception", "3a" * 32, "299x299, bilinear, [-1, 1]")


def features(seed: int, n: int = 50, width: int = 6) -> torch.Tensor:
    return 3 + torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refusal(open_it: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """What is said, in one line."""
    with pytest.raises(kind) as said:
        open_it()
    assert "\n" not in str(said.value)
    return str(said.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_pytorch_fid_are_read(save: Callable[..., None], tmp_path: Path) -> None:
    """mu and sigma to the last bit, compressed (as it writes them) or not; the distance between two is
    pytorch-fid's own to 1e-6."""
    both = []
    for i in range(2):
        x = features(i).numpy()
        mu, sigma = np.mean(x, axis=0), np.cov(x, rowvar=False)
        save(tmp_path / f"{i}.npz", mu=mu, sigma=sigma)
        both.append(read_statistics(tmp_path / f"{i}.npz"))
        assert np.array_equal(both[-1].moments["pool"].mean.numpy(), mu)
        assert np.array_equal(both[-1].moments["pool"].covariance.numpy(), sigma)
        assert (both[-1].n, both[-1].identity, both[-1].origin) == (None, None, str(tmp_path / f"{i}.npz"))
    mine = frechet_distance(both[0].moments["pool"], both[1].moments["pool"])
    with np.load(tmp_path / "0.npz") as a, np.load(tmp_path / "1.npz") as b:
        assert mine == pytest.approx(
            pytorch_fid.fid_score.calculate_frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"]),
            rel=1e-6,
        )
    assert both[0].sha256 != both[1].sha256


def test_files_of_adm_are_read(tmp_path: Path) -> None:
    """Spatial moments and pictures may lie beside; single precision becomes double as it is."""
    x, s = features(0).numpy().astype(np.float32), features(1, width=4).numpy().astype(np.float32)
    arrays: dict[str, Any] = {
        "mu": x.mean(0),
        "sigma": np.cov(x.T).astype(np.float32),
        "mu_s": s.mean(0),
        "sigma_s": np.cov(s.T),
    }
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), **arrays)
    moments = read_statistics(tmp_path / "a.npz").moments
    assert list(moments) == ["pool", "spatial"]
    for output, suffix in (("pool", ""), ("spatial", "_s")):
        assert moments[output].mean.dtype == torch.float64
        assert np.array_equal(moments[output].mean.numpy(), arrays[f"mu{suffix}"].astype(np.float64))
        assert np.array_equal(moments[output].covariance.numpy(), arrays[f"sigma{suffix}"].astype(np.float64))


def test_ours_keep_every_bit(tmp_path: Path) -> None:
    """Mean, covariance, number, extractor and origin come back as they were, and more pictures can be merged
    in."""
    moments = {"pool": Moments.of(features(0, 37)), "logits": Moments.of(features(1, 37, 3))}
    written = Statistics(moments, 37, IDENTITY, "a folder")
    write_statistics(written, tmp_path / "a.safetensors")
    read = read_statistics(tmp_path / "a.safetensors")
    assert (read.n, read.identity, read.origin) == (37, IDENTITY, "a folder")
    assert read.sha256 is not None
    for output, each in moments.items():
        assert read.moments[output].n == 37
        assert torch.equal(read.moments[output].mean, each.mean)
        assert torch.equal(read.moments[output].covariance, each.covariance)
        for one in (read.moments[output], each):
            one.merge(Moments.of(features(2, 5, len(each.mean))))
        assert torch.equal(read.moments[output].covariance, each.covariance)


def test_only_what_says_what_it_is_is_written(tmp_path: Path) -> None:
    """Unknown extractor or number, parts of different sets, another kind of file: refused, and nothing is
    left behind."""
    whole = Statistics({"pool": Moments.of(features(0, 37))}, 37, IDENTITY, "a folder")
    path = tmp_path / "a.safetensors"
    for lacking in (replace(whole, identity=None), replace(whole, n=None)):
        assert "do not say their extractor and number" in refusal(
            lambda lacking=lacking: write_statistics(lacking, path)  # type: ignore[misc]
        )
    assert "moments of pool are of 37 pictures, and the statistics of 38" in refusal(
        lambda: write_statistics(replace(whole, n=38), path)
    )
    assert "written as .safetensors, not as a.npz" in refusal(
        lambda: write_statistics(whole, tmp_path / "a.npz")
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("network", "clip"), ("weights", "4b" * 32), ("prepared", "224x224"), ("random", True)],
    ids=lambda x: str(x)[:9],
)
def test_another_extractor_is_refused(field: str, value: Any) -> None:
    """The line names the field that differs, and both values; statistics that do not say pass."""
    known = Statistics({"pool": Moments.of(features(0))}, 50, IDENTITY, "a folder")
    check_identity(known, IDENTITY)
    said = refusal(lambda: check_identity(known, replace(IDENTITY, **{field: value})))
    assert (
        f"a folder were made with another extractor: {field} is {getattr(IDENTITY, field)!r}, and here "
        f"{value!r}" in said
    )
    check_identity(replace(known, identity=None), replace(IDENTITY, **{field: value}))


def test_another_width_is_refused() -> None:
    """All that can be checked of an unknown extractor, and it is said that it is unknown; and outputs that
    are not there."""
    foreign = Statistics({"pool": Moments.of(features(0))}, None, None, "a.npz")
    check_width(foreign, "pool", 6)
    assert "a.npz (extractor unknown) are of features of width 6, and 'pool' is 768 wide here" in refusal(
        lambda: check_width(foreign, "pool", 768)
    )
    assert "a.npz has statistics of pool, not of 'logits'" in refusal(
        lambda: check_width(foreign, "logits", 6)
    )


EYE, SKEWED = np.eye(3), np.eye(3) + np.diag([1e-4, 0], k=1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"mu": np.zeros(3), "sigma": np.zeros((3, 4))},
            "must have shapes (D,) and (D, D), not (3,) and (3, 4)",
        ),
        ({"mu": np.zeros(4), "sigma": EYE}, "must have shapes (D,) and (D, D), not (4,) and (3, 3)"),
        ({"mu": np.zeros((3, 1)), "sigma": EYE}, "not (3, 1) and (3, 3)"),
        (
            {"mu": np.zeros(3), "sigma": SKEWED},
            "sigma of {} is not symmetric: it differs by up to 0.0001",
        ),
        ({"mu": np.zeros(3), "sigma": EYE * np.nan}, "mu or sigma of {} holds values that are not finite"),
        ({"mu": np.full(3, np.inf), "sigma": EYE}, "mu or sigma of {} holds values that are not finite"),
        ({"mu": np.zeros(3, complex), "sigma": EYE}, "mu of {} must hold real numbers, not complex128"),
        ({"mu": np.zeros(3)}, "{} holds mu, not the reference statistics mu and sigma"),
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "{} holds arr_0, not the reference statistics"),
        (
            {"mu": np.array([{}, 1, 2], object), "sigma": EYE},
            "{} holds pickled objects, which are never read",
        ),
        (
            {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
            "must have shapes (D,) and (D, D), not (0,) and (0, 0)",
        ),
        (
            {"mu": np.zeros(3), "sigma": np.diag([1.0, 1.0, -1e-3])},
            "sigma of {} is not a covariance: a variance is negative",
        ),
        ({"mu": np.zeros(3), "sigma": -EYE}, "sigma of {} is not a covariance: a variance is negative"),
        (
            {"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])},
            "a variance is negative",
        ),
        ({"mu": np.zeros(3), "sigma": EYE * 1.7e308}, "mu or sigma of {} holds values that are not finite"),
        (
            {"mu": np.zeros(3), "sigma": EYE, "mu_s": np.zeros(2), "sigma_s": EYE},
            "mu_s and sigma_s of {} must have shapes",
        ),
    ],
)
def test_moments_that_are_none_are_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Wrong shapes, no symmetry, NaN, other arrays, pickles: one line that names the file."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays)
    assert message.format(path) in refusal(lambda: read_statistics(path))


def test_a_covariance_that_a_small_file_claims_is_not_read(tmp_path: Path) -> None:
    """Deflated, it would be gigabytes; as integers, it would become so."""
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|i1", "fortran_order": False, "shape": (9000, 9000)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("sigma.npy", header.getvalue())
    assert f"{tmp_path / 'a.npz'} says that sigma is int8 (9000, 9000), more than the" in refusal(
        lambda: read_statistics(tmp_path / "a.npz")
    )


def test_rounding_is_no_asymmetry(tmp_path: Path) -> None:
    """Single precision's rounding passes: 1e-7 of the largest entry."""
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=1e4 * (np.eye(3) + np.diag([1e-7, 0], k=1)))
    assert len(read_statistics(tmp_path / "a.npz").moments["pool"].mean) == 3


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_rounding_is_no_negative_variance(kind: type, tmp_path: Path) -> None:
    """Fewer pictures than features, whose covariance has many variances of 0 or, rounded, just below; and
    pictures that are all alike."""
    x = features(0, 10, 300).numpy() * np.logspace(-3, 1, 300)
    sigma: np.ndarray = np.cov(x.T).astype(kind)
    assert np.linalg.eigvalsh(sigma.astype(np.float64)).min() < 0
    for matrix in (sigma, 0 * sigma):
        np.savez(tmp_path / "a.npz", mu=x.mean(0).astype(kind), sigma=matrix)
        assert read_statistics(tmp_path / "a.npz").moments["pool"].mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"statistics": None}, "its description cannot be read"),
        ({}, {"statistics": "{"}, "its description cannot be read"),
        ({}, {"statistics": "[" * 99999}, "its description cannot be read"),
        ({}, {"statistics": "[1]"}, "the description in {}"),
        ({}, {"n": "many"}, "the description in {}"),
        ({}, {"n": 0}, "says that its statistics are of n=0 pictures: at least 2 are needed"),
        ({}, {"n": -5}, "n=-5"),
        ({}, {"n": 10**40}, "n=1000"),
        (
            {"pool.mean": torch.zeros(0), "pool.scatter": torch.zeros(0, 0)},
            {},
            "must have shapes (D,) and (D, D), not (0,) and (0, 0)",
        ),
        (
            {"pool.scatter": -torch.eye(6)},
            {},
            "pool.scatter of {} is not a covariance: a variance is negative",
        ),
        ({"pool.mean": torch.zeros(6, dtype=torch.long)}, {}, "must hold real numbers, not torch.int64"),
        ({"pool.mean": torch.full((6,), torch.nan)}, {}, "not finite"),
        ({"pool.scatter": torch.eye(6) + torch.diag(torch.ones(5), 1)}, {}, "is not symmetric"),
        (
            {"pool.scatter": torch.zeros(9000, 9000, dtype=torch.int8)},
            {},
            "pool.scatter has shape (9000, 9000), wider than any features",
        ),
    ],
)
def test_crafted_files_of_ours_are_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Damaged descriptions, numbers of pictures that are none, moments that are none: one line that names the
    file."""
    path = tmp_path / "a.safetensors"
    write_statistics(Statistics({"pool": Moments.of(features(0))}, 50, IDENTITY, "a folder"), path)
    with safe_open(path, "pt") as file:
        said = dict(file.metadata())
    if "statistics" in metadata:
        said = {name: value for name, value in {**said, **metadata}.items() if value is not None}
    else:
        said["statistics"] = json.dumps({**json.loads(said["statistics"]), **metadata})
    save_file({**load_file(path), **tensors}, path, said)
    assert message.format(path) in refusal(lambda: read_statistics(path))


def test_statistics_of_one_picture_are_not_written(tmp_path: Path) -> None:
    """They would have no covariance."""
    with pytest.raises(ValueError, match="statistics need at least 2 pictures, and a folder has 1"):
        write_statistics(
            Statistics({"pool": Moments.of(features(0, 1))}, 1, IDENTITY, "a folder"),
            tmp_path / "a.safetensors",
        )


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Missing, of another kind, cut short, and safetensors of something else."""
    assert (
        refusal(lambda: read_statistics(tmp_path / "a.npz"), OSError)
        == f"no such file of reference statistics: {tmp_path / 'a.npz'}"
    )
    (tmp_path / "a.pkl").write_bytes(b"")
    assert "no kind of file with reference statistics named '.pkl'; known: .npz, .safetensors" in refusal(
        lambda: read_statistics(tmp_path / "a.pkl")
    )
    (tmp_path / "a.npz").write_bytes(b"PK")
    assert f"{tmp_path / 'a.npz'} cannot be read as a NumPy file" in refusal(
        lambda: read_statistics(tmp_path / "a.npz")
    )
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    assert f"{path} is not a file of reference statistics: its format is None" in refusal(
        lambda: read_statistics(path)
    )
    write_statistics(Statistics({"pool": Moments.of(features(0))}, 50, IDENTITY, "a folder"), path)
    assert load_file(path)["pool.mean"].dtype == torch.float64
    path.write_bytes(path.read_bytes()[:-8])
    assert f"{path} cannot be read as a safetensors file" in refusal(lambda: read_statistics(path))
