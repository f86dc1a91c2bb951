"""Features of the FID network, against torch-fidelity (experiment=bench_features)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusion.settings import setting
from diffusion.spec import check_at_least_one, lookup
from eval.bench.harness import DTYPES, MATRIX, BenchParams, alternate, column, product, timed
from eval.features.inception import Inception, InceptionV3, load_inception, published_shapes
from eval.features.inception_weights import random_state
from eval.features.resize import SIZE
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import Moments
from models.device import find_device
from models.files.text import sha256_of_file
from plain_diffusion.extras import extra
from train.data.decoding import decode_picture


@dataclass(frozen=True, kw_only=True)
class Params(BenchParams):
    """What to time."""

    dtypes: tuple[str, ...] = setting(
        ("fp32", "bf16"), "of our convolutions: fp32, bf16, fp16; torch-fidelity's are float32"
    )
    n: int = setting(64, "pictures, in a temporary folder of PNGs")
    batch: int = setting(32, "pictures at once")
    size: int = setting(256, "height and width of the pictures; both sides resize them to 299")
    device: str | None = setting(None, "null: a GPU where there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "n", "batch", "size")
        for dtype in self.dtypes:
            lookup("dtype", dtype, DTYPES)
        if self.n < 4:
            raise ValueError(f"n must be at least 4, two for each side of a distance, not {self.n}")


@dataclass(frozen=True)
class Timing:
    """Pictures per second, medians over rounds. torch-fidelity computes in float32 throughout.

    ours, theirs  of a batch in memory, on the network's device
    speedup       median of the rounds' ratios ours / theirs: above 1 where ours is faster
    share         our rate of arithmetic over that of a product of matrices of the same dtype
    folder, their_folder, folder_speedup  the same from a folder of PNGs to features in memory
    distance      relative difference of the Frechet distances between two halves of the pictures
    """

    dtype: str = column("dtype")
    ours: float = column("pictures a second", ".3g")
    theirs: float = column("torch-fidelity", ".3g")
    speedup: float = column("times as fast", ".2f")
    share: float = column("of the rate of a product", ".0%")
    folder: float = column("from a folder", ".3g")
    their_folder: float = column("torch-fidelity", ".3g")
    folder_speedup: float = column("times as fast", ".2f")
    distance: float = column("its distance differs by", "+.1e")


@dataclass(frozen=True)
class Side:
    """Features (N, 2048) on the CPU of a batch, uint8 (B, 3, H, W) on the device, and of files."""

    batch: Callable[[Tensor], Tensor]
    files: Callable[[Sequence[Path]], Tensor]


def measure(params: Params) -> tuple[list[Timing], dict[str, Any]]:
    """Time both, ours in every dtype."""
    device = find_device(params.device)
    with _folder(params) as (weights, files):
        theirs = _theirs(weights, params.batch, device)
        rows = [
            _timing(params, dtype, _ours(weights, dtype, params.batch, device), theirs, files, device)
            for dtype in tqdm(params.dtypes, desc="timing", disable=not params.progress)
        ]
    return rows, {"flops": flops()}


def _timing(
    params: Params, dtype: str, ours: Side, theirs: Side, files: Sequence[Path], device: torch.device
) -> Timing:
    """Time both sides on the same pictures, ours in one dtype."""
    batch = torch.stack([decode_picture(path) for path in files[: params.batch]]).to(device)
    calls: list[Callable[[], object]] = [partial(ours.batch, batch), partial(theirs.batch, batch)]
    calls += [partial(ours.files, files), partial(theirs.files, files), product(DTYPES[dtype], device)]
    rounds = alternate([timed(call, device) for call in calls], params.rounds)
    distance, expected = (_distance(side.files(files)) for side in (ours, theirs))
    return Timing(
        dtype,
        ours=len(batch) / rounds.median(0),
        theirs=len(batch) / rounds.median(1),
        speedup=rounds.ratio(1, 0),
        share=flops() * len(batch) / (2 * MATRIX**3) * rounds.ratio(4, 0),
        folder=len(files) / rounds.median(2),
        their_folder=len(files) / rounds.median(3),
        folder_speedup=rounds.ratio(3, 2),
        distance=distance / expected - 1,
    )


def flops() -> int:
    """Floating point operations (two per multiply-add) of one picture, without its resize."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        InceptionV3()(torch.empty(1, 3, SIZE, SIZE), ["pool"])
    return counter.get_total_flops()


def _ours(weights: Path, dtype: str, size: int, device: torch.device) -> Side:
    loaded: Inception = load_inception(weights, "torch_fidelity", sha256_of_file(weights), DTYPES[dtype])
    network = loaded.to(device)

    def batch(pictures: Tensor) -> Tensor:
        return network(list(pictures), ["pool"])["pool"].cpu()

    def files(paths: Sequence[Path]) -> Tensor:
        with ThreadPoolExecutor(2) as pool:  # reads ahead while the network computes
            pictures = pool.map(decode_picture, paths)
            batches = iter(lambda: list(islice(pictures, size)), [])
            return torch.cat([batch(torch.stack(each).to(device)) for each in batches])

    return Side(batch, files)


def _theirs(weights: Path, size: int, device: torch.device) -> Side:
    """torch-fidelity's extractor and its own loop over files. ValueError where it is not installed."""
    with extra("bench"):
        from torch_fidelity.datasets import ImagesPathDataset
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.utils import get_featuresdict_from_dataset
    network = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(weights)
    ).to(device)

    @torch.inference_mode()
    def batch(pictures: Tensor) -> Tensor:
        return network(pictures)[0].cpu()

    def files(paths: Sequence[Path]) -> Tensor:
        pictures = ImagesPathDataset([str(path) for path in paths])
        settings = {"cuda": device.type == "cuda", "save_cpu_ram": False, "verbose": False}
        return get_featuresdict_from_dataset(pictures, network, size, **settings)["2048"]

    return Side(batch, files)


@contextmanager
def _folder(params: Params) -> Iterator[tuple[Path, list[Path]]]:
    """Temporary random weights and PNGs: crops of scikit-learn's two photographs, one for each half."""
    with extra("bench"):
        from sklearn.datasets import load_sample_images
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(random_state(published_shapes()), weights)
        files = [Path(folder) / f"{i:05d}.png" for i in range(params.n)]
        photographs, generator = load_sample_images().images, np.random.RandomState(0)
        for i, path in enumerate(files):
            _crop(photographs[2 * i // params.n], params.size, generator).save(path)
        yield weights, files


def _crop(photograph: np.ndarray[Any, Any], size: int, generator: np.random.RandomState) -> Image.Image:
    """A square at a random place, enlarged where the photograph is smaller."""
    side = min(size, *photograph.shape[:2])
    top, left = (generator.randint(length - side + 1) for length in photograph.shape[:2])
    return Image.fromarray(photograph[top : top + side, left : left + side]).resize((size, size))


def _distance(features: Tensor) -> float:
    """The Frechet distance between the first half and the second."""
    return frechet_distance(*(Moments.of(half) for half in features.tensor_split(2)))
