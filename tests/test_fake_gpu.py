"""On a GPU that is not there (`tests.fake_gpu`): all tensors lie where they should, and the host waits for
them only where WAITS says.

What runs here runs over the registries, so what joins them is held to this too. Results are compared with
those of the CPU. Kernels, their rounding and memory are for `tests/test_gpu.py`, which needs a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from diffusion import (
    APG,
    EDM,
    FLOW,
    NONE,
    AutoGuidance,
    ClassifierFreeGuidance,
    Clipped,
    ComposedGuidance,
    Condition,
    Denoiser,
    DenoiserLike,
    DiscreteVP,
    Inpainting,
    RectifiedFlow,
    Schedule,
    Thresholded,
    V,
    VarianceExploding,
    ZeroInit,
    interval,
    time_grid,
)
from diffusion.consistency import cm
from diffusion.guidance_rules import RULES, rescaled
from eval.feature_pass import Features, PassParams, extract_features
from eval.features.clip import CMMD, random_clip
from eval.features.digits import DigitClassifier, DigitFeatures
from eval.features.dinov2 import random_dinov2
from eval.features.extractor import Extractor, TextFeatures
from eval.features.inception import random_inception
from eval.features.protocols import PROTOCOLS
from eval.features.registry import EXTRACTORS
from eval.metrics import registry
from eval.metrics.moments import GroupedMoments
from eval.metrics.registry import METRICS, Evidence
from models import NETWORKS, Model
from models.layers import streaming
from models.layers.finite import is_finite
from models.layers.packed import BLOCKS, PackedLinear, pack
from samplers import generate, preview, sample
from tests.eval.test_clip_features import CONFIG
from tests.fake_gpu import CUDA, FakeGPU, OnFakeGPU, WaitedError
from tests.models.small import KINDS, Kind, randomised
from tests.models.test_packed import random_packed
from tests.peers import open_clip
from tests.samplers.cases import CASES
from train import TrainParams, train
from train.consistency import ConsistencyDistillation
from train.data import Batch, Dataset, TensorData
from train.data.tensors import TensorPictures
from train.density import DENSITIES
from train.objective import DenoisingObjective, Objective
from train.weighting import WEIGHTINGS
from train.world import World

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch is built without CUDA, and knows no such device at all"
)

VALUE = "a metric is computed, and its value read"
WAITS = {
    "samplers/sample.py require_finite": "whether all samples are finite is read once, after the last step",
    "samplers/generate.py on_device": "weights come to the device before a part works there",
    "samplers/generate.py decoded": "images come to the CPU as they are finished, one by one",
    "samplers/reference.py read_reference": "image and mask come to the device, before anything is "
    "computed there",
    "models/model.py to": "weights come to the device",
    "models/layers/packed.py _apply": "packed weights come to the device",
    "models/layers/streaming.py fill": "page-locked memory is filled again when its last copy has ended, "
    "by a thread of its own",
    "models/networks/vae.py run_finite": "what overflowed is computed again in float32: one look at each "
    "output",
    "diffusion/inpainting.py __init__": "a mask beyond 0 ... 1 is refused, before sampling begins",
    "train/loop.py _start": "weights come to the device before the first step",
    "train/state.py values": "loss and norm are read where they are logged, checked or saved, every so "
    "many steps",
    "train/state.py save": "a checkpoint goes to its file",
    "models/layers/finite.py is_finite": "nothing that is not finite is saved",
    "eval/feature_pass.py _prepare": "pictures come to the device, batch by batch",
    "eval/feature_pass.py _finish_batch": "features that are kept come to the CPU, batch by batch",
    "eval/feature_pass.py _check_finite": "a picture whose features are not finite is named: one look "
    "at each batch",
    "eval/features/pillow.py resize": "the weights of a resize come to the device, batch by batch",
    "eval/metrics/moments.py checked": "features that are not finite are refused before they are summed",
    "eval/metrics/registry.py rows": "features of the samples come to the device, once",
    "eval/metrics/registry.py real": "features of the reference come to the device, once",
    "eval/metrics/registry.py seen": "features of the training set come to the device, once",
    "eval/metrics/registry.py _mean": VALUE,
    "eval/metrics/registry.py _accuracy": "labels come to the device",
    "eval/metrics/registry.py compute": "embedded prompts come to the device",
    "eval/metrics/alignment.py __call__": "embeddings of another length than 1 are refused",
    "eval/metrics/accuracy.py label_accuracy": "labels out of range are refused; the value",
    "eval/metrics/kernel.py kernel_distance": VALUE,
    "eval/metrics/kernel.py _mean_within": "how many classes there are",
    "eval/metrics/kernel.py _variance": VALUE,
    "eval/metrics/kernel.py subset_kernel_distance": VALUE,
    "eval/metrics/kernel.py gaussian_distance": VALUE,
    "eval/metrics/kernel.py _jackknife_variance": VALUE,
    "eval/metrics/inception_score.py inception_score": VALUE,
    "eval/metrics/manifold.py _distances": "how many distances are too near to a border for a product's "
    "rounding, and computed exactly",
    "eval/metrics/manifold.py _share_within": VALUE,
    "eval/metrics/manifold.py density_coverage": VALUE,
    "eval/metrics/neighbours.py memorised": VALUE,
}
SEEN = set[str]()
ONCE = {"samplers/sample.py require_finite": 1}


@cache
def _mini(family: str) -> Model:
    return models.miniature(family)


def mini(family: str) -> Model:
    """One for a test to put on the GPU."""
    return deepcopy(_mini(family))


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    """For the duration of a test."""
    with FakeGPU(WAITS) as gpu:
        yield gpu
    SEEN.update(gpu.waits)


@pytest.fixture(scope="module", autouse=True)
def _no_wait_is_listed_in_vain(request: pytest.FixtureRequest) -> Iterator[None]:
    """After all tests; not where some of them were chosen."""
    yield
    if not (request.config.option.keyword or any("::" in argument for argument in request.config.args)):
        assert not WAITS.keys() - SEEN, "nothing waits there any more: take it out of WAITS"


def there(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(CUDA) for name, value in values.items()}


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    """On the GPU, and as on the CPU but for rounding."""
    assert value.device == CUDA
    torch.testing.assert_close(value.cpu(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# Networks ---------------------------------------------------------------------------------------------------


def test_every_network_is_among_the_small_ones() -> None:
    """Of the registry."""
    assert {kind.network for kind in KINDS.values()} == {network for network, _ in NETWORKS.values()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_networks(kind: Kind, gpu: FakeGPU) -> None:
    """With all their conditions, in float32 and bfloat16, and nothing waits."""
    network = randomised(kind.fresh()).requires_grad_(False)
    x, t, condition = kind.inputs()
    expected, condition = network(x, t, condition), condition.to(CUDA)
    assert_near(network.to(CUDA)(x.to(CUDA), t.to(CUDA), condition), expected, 1e-5)
    own = condition.tensors
    narrow = {name: own[name].bfloat16() for name in ("context", "vector") if name in own}
    condition = replace(condition, **narrow)
    found = network.bfloat16()(x.to(CUDA, torch.bfloat16), t.to(CUDA), condition)
    assert (found.device, found.dtype) == (CUDA, torch.bfloat16)
    assert not gpu.waits


# Solvers and guidance ---------------------------------------------------------------------------------------

LATENT = (2, 64, 128)  # 64 kB: a batch of noise, if it were not page-locked, would wait
NULL = Condition(label=torch.tensor([10]))
PLAIN = Denoiser(lambda x, t, condition: x * 1.0, RectifiedFlow(), V)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "schedule", [DiscreteVP.scaled_linear(), RectifiedFlow(), VarianceExploding()], ids=["vp", "flow", "ve"]
)
def test_solvers(case: str, schedule: Schedule, gpu: FakeGPU) -> None:
    """Levels, times, null labels and noise come from the host, and the loop waits for none of them: guided,
    limited and with a mask."""
    sampler, options, _ = CASES[case]
    network = lambda x, t, condition: x * 1.0  # noqa: E731
    plain = Denoiser(network, schedule, EDM if isinstance(schedule, VarianceExploding) else V)

    def drawn(device: torch.device) -> Tensor:
        known, mask = torch.zeros(2, *LATENT, device=device), torch.ones(2, 1, *LATENT[1:], device=device)
        denoiser = Inpainting(Clipped(ClassifierFreeGuidance(plain, 2.0, NULL)), known, mask)
        condition = Condition(label=torch.tensor([1, 2]).to(device))
        return sample(
            sampler,
            denoiser,
            time_grid(schedule, 5),
            shape=LATENT,
            seeds=[0, 1],
            condition=condition,
            device=device,
            **options,
        )

    expected = drawn(torch.device("cpu"))
    assert_near(drawn(CUDA), expected, 1e-5)
    assert gpu.waits == {**ONCE, "diffusion/inpainting.py __init__": 1}


def guided(scale: Any, **how: Any) -> DenoiserLike:
    return ClassifierFreeGuidance(PLAIN, scale, Condition(label=torch.tensor([10])), **how)


def composed() -> DenoiserLike:
    """Which has its conditions, and takes none of the same name."""
    both = ComposedGuidance(
        PLAIN,
        [
            (Condition(label=torch.tensor([1])), 3.0),
            (Condition(label=numbers(2, 3)), interval(2.0, 0.2, 0.5)),
        ],
        Condition(label=torch.tensor([10])),
    )
    return lambda x_t, level, condition=NONE: both(x_t, level)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values).to(CUDA)


GUIDANCES: dict[str, Callable[[], DenoiserLike]] = {
    **{
        name: partial(lambda make: guided(interval(3.0, 0.2, 0.9), rule=make()), make)
        for name, make in RULES.items()
    },
    "rule within a rule": lambda: guided(3.0, rule=rescaled(0.5, APG(0.1, 2.0, -0.5), FLOW)),
    "null of each sample": lambda: ClassifierFreeGuidance(PLAIN, 3.0, Condition(label=numbers(4, 5))),
    "autoguidance": lambda: AutoGuidance(PLAIN, PLAIN, 2.0, rule=RULES["zero_star"]()),
    "composed": composed,
    "thresholded": lambda: ZeroInit(Thresholded(guided(2.0))),
}


@pytest.mark.parametrize("make", GUIDANCES.values(), ids=GUIDANCES)
def test_guidance(make: Callable[[], DenoiserLike], gpu: FakeGPU) -> None:
    """Scales, rules and null conditions wait for nothing either."""
    found = sample(
        "heun",
        make(),
        time_grid(RectifiedFlow(), 6),
        shape=(2, 4, 4),
        seeds=[0, 1],
        condition=Condition(label=numbers(1, 2)),
        device=CUDA,
    )
    assert found.device == CUDA
    assert gpu.waits == ONCE


# Pictures ---------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"prompts": "a corgi", "height": 32, "width": 64, "steps": 2}


def picture(channels: int) -> Tensor:
    return torch.rand(1, channels, 32, 64, generator=torch.Generator().manual_seed(0))


IMAGE, MASK = {"image": picture(3)}, {"mask": picture(1).round()}


def assert_drawn_alike(model: Model, **settings: Any) -> None:
    """As on the CPU, where the images are then."""
    expected = generate(model, **{**SMALL, **settings, "offload": False})
    found = generate(model, **{**SMALL, **settings}, device=str(CUDA))
    assert not isinstance(found, OnFakeGPU)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family: str, gpu: FakeGPU) -> None:
    """With what each is meant to see, and as many steps as a history takes."""
    model = models.miniature(family)
    sees: dict[str, Any] = {None: {}, "inpaint": {**IMAGE, **MASK}}.get(model.role, IMAGE)
    assert generate(model, **SMALL, device=str(CUDA), **sees).shape == (1, 3, 32, 64)
    assert gpu.waits["samplers/sample.py require_finite"] == 1
    assert gpu.waits["models/networks/vae.py run_finite"] == 1 + len(sees)


WORDS: dict[str, Any] = {"prompts": "a (red:1.3) cat", "weighted": True}
MODES: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "image to image": (lambda: mini("sd1"), {**IMAGE, "strength": 0.6}),
    "inpainting by any network": (lambda: mini("sd3"), {**IMAGE, **MASK}),
    "inpainting from the image": (
        lambda: models.miniature("sd1", in_channels=9),
        {**IMAGE, **MASK, "strength": 0.7},
    ),
    "edit": (lambda: models.miniature("sd1", in_channels=8), {**IMAGE, "image_guidance": 2.0}),
    "edit, distilled": (lambda: models.miniature("lcm", in_channels=8), IMAGE),
    "true guidance": (lambda: mini("flux-dev"), {"true_cfg": 2.0, "negative": "ugly"}),
    "tiles": (lambda: mini("sd1"), {**IMAGE, "tile": 4}),
    "offloaded": (lambda: mini("sd1"), {"offload": True}),
    "prompts": (lambda: mini("sd1"), {**WORDS, "prompts": "a (red:1.3) " + "cat " * 80, "clip_skip": 1}),
    "prompts that T5 reads": (lambda: mini("flux-dev"), WORDS),
    "rules": (
        lambda: mini("sd1"),
        {"guide": {"rule": {"name": "apg"}, "interval": (0.2, 0.8), "percentile": 0.9}},
    ),
    "refined": (lambda: mini("sdxl"), {"grid": {"spacing": "trailing"}, "handover": 0.5}),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, gpu: FakeGPU) -> None:
    """All that a model can be asked for."""
    make, settings = MODES[mode]
    assert_drawn_alike(make(), **settings, **({"refiner": mini("sdxl-refiner")} if mode == "refined" else {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, gpu: FakeGPU) -> None:
    """All parts."""
    assert generate(mini("sdxl").to(dtype=dtype), **SMALL, device=str(CUDA)).dtype == torch.float32


def test_previews(gpu: FakeGPU) -> None:
    """Of every step, by TAESD, which is looked at once for each, as the autoencoder is."""
    model, shown = mini("sd1"), list[Tensor]()
    model.to(CUDA)
    generate(model, **SMALL, watch=lambda step: shown.append(preview(model, step)))
    assert [image.device for image in shown] == [CUDA] * 2
    assert gpu.waits["models/networks/vae.py run_finite"] == 3


# Weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8", "fp8 of rows", *BLOCKS])
def test_packed_layers(kind: str, gpu: FakeGPU) -> None:
    """Unpacked there to the last bit as on a CPU, and nothing waits but the weight that comes."""
    layer, x = PackedLinear(random_packed(kind, 96, 512)), torch.randn(5, 512)
    dense, expected = layer.dense(), layer(x)
    layer.to(CUDA)
    before = gpu.waits.copy()
    assert torch.equal(layer.dense().cpu(), dense)
    assert_near(layer(x.to(CUDA)), expected, 1e-5)
    assert layer(x.to(CUDA, torch.bfloat16)).dtype == torch.bfloat16
    assert gpu.waits == before


@pytest.mark.parametrize("kind", ["fp8", "Q8_0"])
def test_packed_networks(kind: str, gpu: FakeGPU) -> None:
    """As files hold them, in the blocks."""
    model = mini("sd3.5-medium")
    for name, layer in list(model.network.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("blocks.") and layer.in_features % 32 == 0:
            pack(model.network, name, random_packed(kind, layer.out_features, layer.in_features))
    assert_drawn_alike(model)


def test_streamed_networks(gpu: FakeGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that come and go through page-locked memory, copied as late as may be: images to the last bit
    those of blocks that stay."""
    monkeypatch.setattr(streaming, "resident_bytes", lambda: 0)
    models.save(mini("flux-dev"), tmp_path, "separate", dtype=torch.bfloat16)
    paths = [path for path in sorted(tmp_path.iterdir()) if "preview" not in path.name]
    with pytest.raises(ValueError, match="at least") as refused:
        models.load(*paths, memory=1)
    streamed, whole = models.load(*paths, memory=str(refused.value).split()[-1]), models.load(*paths)
    assert streaming.is_streamed(streamed.network)
    drawn = [generate(model, **SMALL, device=str(CUDA)) for model in (streamed, whole)]
    assert torch.equal(*drawn)


# Training ---------------------------------------------------------------------------------------------------

SIDE = 64  # pixels: a part of a batch is more than is copied at once from memory that is not page-locked


def small_dit(**network: Any) -> Model:
    dit = {
        "name": "dit",
        "in_channels": 3,
        "image_size": SIDE,
        "patch_size": 16,
        "hidden": 32,
        "depth": 2,
        "heads": 4,
    }
    return models.build(
        {"network": {**dit, **network}, "schedule": {"name": "cosine", "steps": 100}, "prediction": "v"}
    )


class Latents:
    """Distributions, with conditions, and what a sample without them is told."""

    num_classes: int | None = None
    shape = (3, SIDE, SIDE)

    def __len__(self) -> int:
        return 8

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        n = len(indices)
        told = {"context": torch.ones(n, 5, 12), "vector": torch.ones(n, 6)}
        nothing = {f"null.{name}": torch.zeros_like(value) for name, value in told.items()}
        return {"x0": torch.zeros(n, *self.shape), "x0_std": torch.ones(n, *self.shape), **told, **nothing}


IMAGES = TensorData(torch.zeros(8, 3, SIDE, SIDE), torch.arange(8), 10)


def denoising(weighting: str, model: Model) -> Objective:
    density = DENSITIES["usual"](model.schedule)
    return DenoisingObjective(
        model.schedule, model.prediction, density, WEIGHTINGS[weighting](), model.null, drop=0.5
    )


def distilling(model: Model) -> Objective:
    return ConsistencyDistillation(
        small_dit(num_classes=10).to(CUDA).denoiser(), cm(), time_grid(model.schedule, 5)
    )


OBJECTIVES: dict[str, tuple[dict[str, Any], Callable[[Model], Objective], Dataset]] = {
    "learned variance": (
        {"num_classes": 10, "learned_variance": True},
        partial(denoising, "uniform"),
        IMAGES,
    ),
    "latents": (
        {"num_classes": None, "context_dim": 12, "vector_dim": 6},
        partial(denoising, "uniform"),
        Latents(),
    ),
    "consistency": ({"num_classes": 10}, distilling, IMAGES),
    **{name: ({"num_classes": 10}, partial(denoising, name), IMAGES) for name in WEIGHTINGS},
}


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        *((name, {}) for name in OBJECTIVES),
        *(("uniform", {"precision": each, "checkpointing": True}) for each in ("bf16", "fp16")),
    ],
)
def test_training(objective: str, settings: dict[str, Any], gpu: FakeGPU, tmp_path: Path) -> None:
    """Loss, optimiser, average and metrics of four steps; the gradient is one of ones. No step waits, but
    where it is logged or saved."""
    network, make, data = OBJECTIVES[objective]
    model = small_dit(**network)
    params = TrainParams(steps=4, batch_size=4, accumulate=2, warmup=0, log_every=2, save_every=4, **settings)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    assert train(model, make(model), data, params, tmp_path, world=World(0, 1, CUDA), progress=False)
    assert gpu.waits["train/state.py values"] == 2 * 2 + 1  # checked and logged twice, saved once
    assert all(
        p.device == CUDA and not torch.equal(p.cpu(), before[name])
        for name, p in model.network.named_parameters()
    )


# Evaluation -------------------------------------------------------------------------------------------------

N, WIDTH = 60, 6


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a network that OpenCLIP knows while these tests run."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        open_clip.add_model_config(folder)
        yield "tiny"


SMALLEST: dict[str, Callable[[str], Extractor]] = {
    "inception": lambda _: random_inception(),
    "clip": random_clip,
    "cmmd": lambda name: random_clip(name, preparation=replace(CMMD, size=32)),
    "dinov2": lambda _: random_dinov2("vit_small_patch14_dinov2"),
    "digits": lambda _: DigitFeatures(DigitClassifier()),
}


def test_every_extractor_is_among_the_small_ones() -> None:
    """Of the registry."""
    assert SMALLEST.keys() == EXTRACTORS.keys()


@pytest.mark.parametrize("name", SMALLEST)
def test_features(name: str, tiny_clip: str, gpu: FakeGPU) -> None:
    """A pass over pictures: each batch waits as the pictures come and the features go, however many there
    are."""
    extractor, side = SMALLEST[name](tiny_clip).to(CUDA), 8 if name == "digits" else 160
    source = TensorPictures(torch.arange(4 * 3 * side * side).view(4, 3, side, side).to(torch.uint8))
    output = f"{name}.{EXTRACTORS[name].main}"
    found = extract_features(
        source,
        {name: extractor},
        [output],
        [output],
        PassParams(batch_size=2, groups=2, progress=False),
        World(0, 1, CUDA),
    )
    assert found is not None
    assert found.moments[output].whole().mean.device == CUDA
    assert found.rows[output].device.type == "cpu"
    assert found.rows[output].isfinite().all()


def test_pictures_of_many_sizes(tiny_clip: str, gpu: FakeGPU) -> None:
    """And the text that goes with them."""
    extractor: Any = random_clip(tiny_clip).to(CUDA)
    pictures = [
        torch.zeros(3, *size, dtype=torch.uint8, device=CUDA) for size in ((40, 64), (50, 50), (40, 64))
    ]
    assert extractor(pictures, ["image"])["image"].shape == (3, CONFIG["embed_dim"])
    assert extractor.text(["a cat"]).rows.device == CUDA


def collected(seed: int) -> Features:
    rows = F.normalize(torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(seed)))
    moments = GroupedMoments(WIDTH, 17)
    moments.update(torch.arange(N), rows)
    return Features(
        torch.arange(N), torch.zeros(N, 32, dtype=torch.uint8), {"any.rows": moments}, {"any.rows": rows}
    )


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str, gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU."""
    monkeypatch.setitem(registry.SUBSETS, "size", 20)
    sides, classes = [collected(seed) for seed in range(3)], torch.arange(N) % 3

    def value(device: torch.device) -> float:
        evidence = Evidence(
            "any.rows",
            sides[0],
            PROTOCOLS["clean"],
            device,
            reference=sides[1],
            training=sides[2],
            embedded=lambda _: TextFeatures(sides[1].rows["any.rows"], (False,) * N),
            wanted=torch.arange(N) % WIDTH,
            classes=(classes, classes),
            numbers=torch.arange(N) // 3,
        )
        return METRICS[name].compute(evidence).value

    assert value(CUDA) == pytest.approx(value(torch.device("cpu")), rel=1e-9, abs=1e-12)


# The fake itself --------------------------------------------------------------------------------------------


def test_what_it_refuses() -> None:
    """Tensors of both devices; and to wait, for which the function that does is named."""
    with FakeGPU({}) as gpu:
        x = torch.ones(3, 4).to(CUDA)
        assert (x * torch.tensor(2.0)).tolist() == [[2.0] * 4] * 3  # a number of the CPU goes along
        for other, mix in (
            ((3, 4), torch.add),
            ((4, 3), torch.matmul),
            ((3, 4), lambda a, b: torch.cat([a, b])),
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                mix(x, torch.ones(other))
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.ones(4).add_(x.sum())
        assert not gpu.waits  # what a test reads is its own affair
        with pytest.raises(
            WaitedError,
            match=r"^models/layers/finite\.py is_finite, line \d+, waits for the device: "
            r"aten\._local_scalar_dense",
        ):
            is_finite(x)


def test_streams() -> None:
    """Copies on a side stream come late, and not at all before the main stream is done with what they
    overwrite."""
    with FakeGPU({}):
        there, here, side = torch.zeros(4).to(CUDA), torch.ones(4).pin_memory(), torch.cuda.Stream(CUDA)
        with (
            torch.cuda.stream(side),
            pytest.raises(RuntimeError, match="overwrites what the main stream may still use"),
        ):
            there.copy_(here, non_blocking=True)
        side.wait_stream(torch.cuda.current_stream(CUDA))
        with torch.cuda.stream(side):
            there.copy_(here, non_blocking=True)
        assert there.tolist() == [0.0] * 4
        with torch.cuda.stream(side), pytest.raises(RuntimeError, match="an earlier copy may still read"):
            there.copy_(here, non_blocking=True)
        torch.cuda.current_stream(CUDA).wait_stream(side)
        assert there.tolist() == [1.0] * 4
