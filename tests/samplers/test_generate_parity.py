"""`generate` and the pipelines of diffusers, end to end on random weights: prompts to conditions, guidance,
sampling, images.

Both start from the same noise. The relative error of latents and images after all steps is below 2e-5
(float32, where the networks add up in another order; the promise is 1e-4). Where diffusers does something
else, it is said beside the test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from diffusion.noise import initial_noise
from tests.peers import diffusers, transformers
from tests.samplers import pipelines as peers
from tests.samplers.pipelines import (
    HEIGHT,
    NEGATIVE,
    NOISE,
    SEEDS,
    STEPS,
    WIDTH,
    Drawn,
    ddim,
    dpmpp_2m,
    error,
    euler,
    opened,
    ours,
    picture,
    theirs,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what the peers make of NumPy
CLOSE = 2e-5
SD, SDXL, SDXL_FROM_IMAGE = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
)
Open = Callable[[str, str], tuple[models.Model, Any]]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No bars."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def peer_of(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """(family, pipeline) -> the miniature, and that pipeline opened from the folder it is saved to; each
    once."""

    @cache
    def found(family: str, pipeline: str) -> tuple[models.Model, Any]:
        model = models.miniature(family)
        return model, opened(model, tmp_path_factory.mktemp("saved"), pipeline)

    return found


@pytest.fixture
def likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws the latents of an image, we take the likeliest: let both see the same."""
    monkeypatch.setattr(
        diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
        "sample",
        lambda self, generator=None: self.mean,
    )


def agree(a: Drawn, b: Drawn, steps: int = STEPS) -> None:
    assert len(a.latents) == len(b.latents) == steps
    assert error(a.latents[-1], b.latents[-1]) <= CLOSE
    assert error(a.images, b.images) <= CLOSE
    assert 0.05 < float(b.images.std()) < 0.5  # there is something to see


PREDICTED = {"eps": "epsilon", "v": "v_prediction"}


@pytest.mark.parametrize(
    ("family", "pipeline", "solver", "negative"),
    [
        ("sd1", SD, ddim, NEGATIVE),
        ("sd2", SD, dpmpp_2m, None),
        ("sd2-v", SD, euler, NEGATIVE),
        ("sdxl", SDXL, euler, None),
        ("sdxl", SDXL, dpmpp_2m, NEGATIVE),
        ("sdxl-v", SDXL, ddim, NEGATIVE),
    ],
)
def test_text_to_image(
    family: str,
    pipeline: str,
    solver: Callable[[str], tuple[Any, dict[str, Any]]],
    negative: list[str] | None,
    peer_of: Open,
) -> None:
    """Every family, without a negative prompt (SDXL: zeros) and with one, guided."""
    model, pipe = peer_of(family, pipeline)
    assert pipe.scheduler.config.prediction_type == PREDICTED[model.prediction.name]
    pipe.scheduler, settings = solver(PREDICTED[model.prediction.name])
    peer = theirs(
        pipe,
        negative_prompt=negative,
        latents=NOISE,
        num_inference_steps=STEPS,
        guidance_scale=6.5,
        height=HEIGHT,
        width=WIDTH,
    )
    agree(ours(model, negative=negative, guidance=6.5, **settings), peer)


@pytest.mark.parametrize(("family", "pipeline"), [("sd1", SD), ("sd2", SD), ("sdxl", SDXL)])
def test_sides_that_are_multiples_of_eight(family: str, pipeline: str, peer_of: Open) -> None:
    """40x72 pixels are 5x9 latents, which the network halves upwards."""
    model, pipe = peer_of(family, pipeline)
    size: dict[str, Any] = {"height": 40, "width": 72}
    pipe.scheduler, settings = ddim(PREDICTED[model.prediction.name])
    noise = initial_noise(SEEDS, (4, 5, 9))
    peer = theirs(pipe, latents=noise, num_inference_steps=STEPS, guidance_scale=6.5, **size)
    agree(ours(model, guidance=6.5, **settings, **size), peer)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_schedule_that_ends_in_pure_noise(rescale: float, tmp_path: Path) -> None:
    """Opened from the folder of such a model: zero terminal SNR, trailing times, v, and guidance rescaled
    (Lin et al. 2024)."""
    pipe = opened(models.miniature("sdxl-v"), tmp_path, SDXL)
    config = {
        **peers.SD,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    pipe.scheduler = diffusers.DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=True)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    model = models.load(tmp_path)
    assert model.schedule.snr(torch.tensor(model.schedule.t_max)) == 0
    peer = theirs(
        pipe, latents=NOISE, num_inference_steps=STEPS, guidance_scale=5.0, guidance_rescale=rescale,
        height=HEIGHT, width=WIDTH
    )  # fmt: skip
    guide = {"rule": {"name": "rescaled", "phi": rescale}} if rescale else None
    agree(ours(model, sampler="ddim", steps=STEPS, guidance=5.0, guide=guide), peer)


def test_sizes_that_sdxl_is_told(peer_of: Open) -> None:
    """Another original size, a crop and another target: the vector, in its order."""
    model, pipe = peer_of("sdxl", SDXL)
    pipe.scheduler, settings = euler("epsilon")
    sizes: dict[str, Any] = {
        "original_size": (500, 700),
        "crops_coords_top_left": (30, 20),
        "target_size": (640, 320),
    }
    numbers = {"height": 500, "width": 700, "top": 30, "left": 20, "target_height": 640, "target_width": 320}
    peer = theirs(
        pipe,
        latents=NOISE,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        height=HEIGHT,
        width=WIDTH,
        **sizes,
    )
    agree(ours(model, guidance=5.0, numbers=numbers, **settings), peer)


def test_a_refiner_takes_over(peer_of: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base until four fifths of the time have passed, then the refiner, which is told a score of looks,
    and "" for SDXL's zeros."""
    (base, first), (refiner, second) = peer_of("sdxl", SDXL), peer_of("sdxl-refiner", SDXL_FROM_IMAGE)
    scheduler, settings = euler("epsilon")
    first.scheduler = second.scheduler = scheduler
    monkeypatch.setattr(second, "vae", first.vae)  # which the published two share
    same: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
    begun = theirs(first, latents=NOISE, height=HEIGHT, width=WIDTH, denoising_end=0.8, **same)
    ended = theirs(
        second,
        image=begun.latents[-1],
        denoising_start=0.8,
        original_size=(HEIGHT, WIDTH),
        target_size=(HEIGHT, WIDTH),
        **same,
    )
    assert (len(begun.latents), len(ended.latents)) == (0.8 * STEPS, 0.2 * STEPS)
    agree(
        ours(base, guidance=5.0, refiner=refiner, **settings),
        Drawn(begun.latents + ended.latents, ended.images),
    )


@pytest.mark.usefixtures("likeliest")
@pytest.mark.parametrize(
    ("family", "pipeline"), [("sd1", "StableDiffusionImg2ImgPipeline"), ("sdxl-refiner", SDXL_FROM_IMAGE)]
)
def test_image_to_image(family: str, pipeline: str, peer_of: Open) -> None:
    """The last half of the steps, from the image's latents with the noise of the seeds. (diffusers rounds the
    share to whole steps.)"""
    (model, pipe), image = peer_of(family, pipeline), picture(3, 0)
    pipe.scheduler, settings = ddim("epsilon")
    sizes: dict[str, Any] = (
        {"original_size": (HEIGHT, WIDTH), "target_size": (HEIGHT, WIDTH)} if family == "sdxl-refiner" else {}
    )
    peer = theirs(
        pipe,
        image=image,
        strength=0.5,
        generator=peers.generators(),
        num_inference_steps=STEPS,
        guidance_scale=6.5,
        **sizes,
    )
    agree(ours(model, image=image, strength=0.5, guidance=6.5, **settings), peer, steps=STEPS // 2)


@pytest.mark.usefixtures("likeliest")
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting(strength: float, tmp_path: Path) -> None:
    """Nine channels: noise or the noised image, the mask, and the latents of what is kept; a soft mask is cut
    at a half."""
    model, image, mask = models.miniature("sd1", in_channels=9), picture(3, 0), picture(1, 1)
    scheduler, settings = ddim("epsilon")
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pipe(
        opened(model, tmp_path, "StableDiffusionPipeline", scheduler)
    )
    pipe.set_progress_bar_config(disable=True)
    peer = theirs(
        pipe, image=image, mask_image=mask, strength=strength, generator=peers.generators(),
        num_inference_steps=STEPS, guidance_scale=6.5,
        height=HEIGHT, width=WIDTH,
    )  # fmt: skip
    assert 0.1 < float((mask < 0.5).float().mean()) < 0.9
    agree(
        ours(model, image=image, mask=mask, strength=strength, guidance=6.5, **settings),
        peer,
        steps=int(STEPS * strength),
    )


def test_diffusers_opens_a_network_for_inpainting(tmp_path: Path) -> None:
    """By the pipeline that the folder names."""
    opened(models.miniature("sd1", in_channels=9), tmp_path, "StableDiffusionInpaintPipeline")


def test_editing(tmp_path: Path) -> None:
    """Eight channels, and two scales: towards the image and from there towards the prompt."""
    model, image = models.miniature("sd1", in_channels=8), picture(3, 0)
    scheduler, settings = euler("epsilon")
    pipe = opened(model, tmp_path, "StableDiffusionInstructPix2PixPipeline", scheduler)
    peer = theirs(
        pipe, image=torch.cat([image, image]), latents=NOISE, num_inference_steps=STEPS, guidance_scale=6.5,
        image_guidance_scale=1.3,
        negative_prompt=NEGATIVE,
    )  # fmt: skip
    agree(ours(model, image=image, guidance=6.5, image_guidance=1.3, negative=NEGATIVE, **settings), peer)


def test_latent_consistency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps at the times it was distilled for, the scale of guidance embedded, all noise renewed at each
    step."""
    model = models.miniature("lcm")
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", peers.InTurn())
    pipe = opened(model, tmp_path, "LatentConsistencyModelPipeline")
    peer = theirs(pipe, latents=NOISE, num_inference_steps=4, guidance_scale=8.0, height=HEIGHT, width=WIDTH)
    agree(ours(model), peer, steps=4)


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ancestral steps at the noisiest levels, without guidance."""
    model = models.miniature("sdxl-turbo")
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", peers.InTurn()
    )
    pipe = opened(model, tmp_path, SDXL, peers.turbo())
    peer = theirs(
        pipe, latents=NOISE, num_inference_steps=steps, guidance_scale=0.0, height=HEIGHT, width=WIDTH
    )
    agree(ours(model, steps=steps), peer, steps)


@pytest.mark.usefixtures("likeliest")
def test_turbo_from_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the share of the schedule that strength says, all steps there is room for: the peer's last five of
    ten trailing ones."""
    model, image = models.miniature("sdxl-turbo"), picture(3, 0)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", peers.InTurn()
    )
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**peers.SD, timestep_spacing="trailing")
    pipe = peers.turned(opened(model, tmp_path, SDXL, scheduler), SDXL_FROM_IMAGE)
    sizes: dict[str, Any] = {"original_size": (HEIGHT, WIDTH), "target_size": (HEIGHT, WIDTH)}
    peer = theirs(
        pipe,
        image=image,
        strength=0.5,
        generator=peers.generators(),
        num_inference_steps=10,
        guidance_scale=0.0,
        **sizes,
    )
    agree(ours(model, image=image, strength=0.5, steps=5, guidance=0.0), peer, steps=5)


@pytest.mark.usefixtures("likeliest")
@pytest.mark.parametrize("strength", [0.5, 0.33])
def test_latent_consistency_from_an_image(
    strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps, from the last of the taught times that strength allows."""
    model, image = models.miniature("lcm"), picture(3, 0)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", peers.InTurn())
    pipe = peers.turned(
        opened(model, tmp_path, "LatentConsistencyModelPipeline"), "LatentConsistencyModelImg2ImgPipeline"
    )
    peer = theirs(
        pipe,
        image=image,
        strength=strength,
        generator=peers.generators(),
        num_inference_steps=4,
        guidance_scale=8.0,
    )
    agree(ours(model, image=image, strength=strength), peer, steps=4)


def test_playground(tmp_path: Path) -> None:
    """EDM's preconditioning and noise levels, latents with a mean and a spread of their own, as saved."""
    model = models.miniature("playground-v2.5")
    pipe = opened(model, tmp_path, SDXL)
    peer = theirs(
        pipe, latents=NOISE, num_inference_steps=STEPS, guidance_scale=3.0, height=HEIGHT, width=WIDTH
    )
    agree(ours(model, steps=STEPS), peer)
