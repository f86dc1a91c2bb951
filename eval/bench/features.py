"""Features of the FID network, side by side with torch-fidelity in one run. `python -m eval experiment=bench_features`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusion.spec import check_at_least_one, lookup, make_params
from eval.bench.record import DTYPES, write_bench
from eval.features.inception import Inception, InceptionV3, load_inception, published_shapes
from eval.features.inception_weights import random_state
from eval.features.resize import SIZE
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import Moments
from models.device import find_device
from models.files.text import sha256_of_file
from plain_diffusion.extras import extra
from train.data.decoding import pixels


@dataclass(frozen=True)
class BenchParams:
    """What to time: see configs/eval/experiment/bench_features.yaml."""

    out: str
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    n: int = 64
    batch: int = 32
    size: int = 256
    rounds: int = 5
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "batch", "size", "rounds")
        for dtype in self.dtypes:
            lookup("dtype", dtype, DTYPES)
        if self.n < 4:
            raise ValueError(f"n must be at least 4, two for each side of a distance, not {self.n}")


@dataclass(frozen=True)
class Timing:
    """Pictures per second, medians over rounds, and the median of the rounds' ratios. torch-fidelity computes in float32 throughout.

    ours, theirs  of one batch that lies in memory, where the network is
    speedup       ours over theirs: above 1 where ours is faster
    share         our rate of arithmetic over that of a plain product of 2048 x 2048 matrices of the same dtype in the same rounds
    folder, their_folder, folder_speedup  the same from a folder of PNGs to features in memory
    distance      of our Frechet distance between two halves of the pictures from theirs, relative
    """

    dtype: str
    ours: float
    theirs: float
    speedup: float
    share: float
    folder: float
    their_folder: float
    folder_speedup: float
    distance: float


@dataclass(frozen=True)
class Side:
    """One of the two: features of a batch uint8 (B, 3, H, W) on the device, and of files. Both come as (N, 2048) on the CPU."""

    batch: Callable[[Tensor], Tensor]
    files: Callable[[Sequence[Path]], Tensor]


def run(config: Mapping[str, Any]) -> list[Timing]:
    """Time both in turn, round after round, in every dtype, and write out/bench.json and out/bench.md."""
    params = make_params("", BenchParams, {key: value for key, value in config.items() if key != "program"})
    device = find_device(params.device)
    with _folder(params) as (weights, files):
        theirs = _theirs(weights, params.batch, device)
        timings = [
            measure(params, dtype, _ours(weights, dtype, params.batch, device), theirs, files, device)
            for dtype in tqdm(params.dtypes, desc="timing", disable=not params.progress)
        ]
    write_bench(Path(params.out), timings, table(timings), settings=asdict(params), flops=flops())
    return timings


def measure(params: BenchParams, dtype: str, ours: Side, theirs: Side, files: Sequence[Path], device: torch.device) -> Timing:
    """Both sides on the same pictures, ours in one dtype."""
    batch = torch.stack([pixels(path) for path in files[: params.batch]]).to(device)
    matrix = torch.randn(2048, 2048, device=device).to(DTYPES[dtype])
    calls: list[Callable[[], object]] = [
        lambda: ours.batch(batch),
        lambda: theirs.batch(batch),
        lambda: ours.files(files),
        lambda: theirs.files(files),
        lambda: float((matrix @ matrix)[0, 0]),
    ]
    for call in calls:
        call()  # warms up
    rounds = [[_seconds(call) for call in calls] for _ in range(params.rounds)]
    ours_s, theirs_s, folder, their_folder, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
    work = flops() * len(batch) / (2 * 2048**3)
    distance, expected = (_distance(side.files(files)) for side in (ours, theirs))
    return Timing(
        dtype,
        ours=len(batch) / ours_s,
        theirs=len(batch) / theirs_s,
        speedup=statistics.median(b / a for a, b, *_ in rounds),
        share=statistics.median(work * row[4] / row[0] for row in rounds),
        folder=len(files) / folder,
        their_folder=len(files) / their_folder,
        folder_speedup=statistics.median(row[3] / row[2] for row in rounds),
        distance=distance / expected - 1,
    )


def flops() -> int:
    """Floating point operations of one picture's products, without its resize; a multiplication and its addition are two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        InceptionV3()(torch.empty(1, 3, SIZE, SIZE), ["pool"])
    return counter.get_total_flops()


def table(timings: Sequence[Timing]) -> str:
    """A Markdown table, one row per dtype."""
    rows = []
    for t in timings:
        memory = f"{t.ours:.3g} | {t.theirs:.3g} | {t.speedup:.2f} | {t.share:.0%}"
        rows.append(f"| {t.dtype} | {memory} | {t.folder:.3g} | {t.their_folder:.3g} | {t.folder_speedup:.2f} | {t.distance:+.1e} |")
    head = "| dtype | pictures a second | torch-fidelity | times as fast | of the rate of a product "
    head += "| from a folder | torch-fidelity | times as fast | its distance differs by |\n|---|---|---|---|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _ours(weights: Path, dtype: str, size: int, device: torch.device) -> Side:
    network: Inception = load_inception(weights, "torch_fidelity", sha256_of_file(weights), DTYPES[dtype]).to(device)

    def batch(pictures: Tensor) -> Tensor:
        return network(list(pictures), ["pool"])["pool"].cpu()

    def files(paths: Sequence[Path]) -> Tensor:
        with ThreadPoolExecutor(2) as pool:  # reads ahead while the network computes
            pictures = pool.map(pixels, paths)
            sizes = [len(paths[i : i + size]) for i in range(0, len(paths), size)]
            return torch.cat([batch(torch.stack([next(pictures) for _ in range(n)]).to(device)) for n in sizes])

    return Side(batch, files)


def _theirs(weights: Path, size: int, device: torch.device) -> Side:
    """torch-fidelity's extractor, and its own loop over files. ValueError where it is not installed."""
    with extra("bench"):
        from torch_fidelity.datasets import ImagesPathDataset
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.utils import get_featuresdict_from_dataset
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights)).to(device)

    @torch.inference_mode()
    def batch(pictures: Tensor) -> Tensor:
        return network(pictures)[0].cpu()

    def files(paths: Sequence[Path]) -> Tensor:
        pictures = ImagesPathDataset([str(path) for path in paths])
        settings = {"cuda": device.type == "cuda", "save_cpu_ram": False, "verbose": False}
        return get_featuresdict_from_dataset(pictures, network, size, **settings)["2048"]

    return Side(batch, files)


@contextmanager
def _folder(params: BenchParams) -> Iterator[tuple[Path, list[Path]]]:
    """A file of random weights and a folder of PNGs, while they are needed: crops of scikit-learn's photographs, one for each half."""
    with extra("bench"):
        from sklearn.datasets import load_sample_images
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(random_state(published_shapes()), weights)
        files = [Path(folder) / f"{i:05d}.png" for i in range(params.n)]
        photographs = load_sample_images().images
        generator = np.random.RandomState(0)
        for i, path in enumerate(files):
            _crop(photographs[2 * i // params.n], params.size, generator).save(path)
        yield weights, files


def _crop(photograph: np.ndarray[Any, Any], size: int, generator: np.random.RandomState) -> Image.Image:
    """A square from anywhere, scaled to this size where the photograph is smaller."""
    side = min(size, *photograph.shape[:2])
    top, left = (generator.randint(length - side + 1) for length in photograph.shape[:2])
    return Image.fromarray(photograph[top : top + side, left : left + side]).resize((size, size))


def _distance(features: Tensor) -> float:
    """Between the first half and the second."""
    return frechet_distance(*(Moments.of(half) for half in features.tensor_split(2)))


def _seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of a call, whose result lies on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
