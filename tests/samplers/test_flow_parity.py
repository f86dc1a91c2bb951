"""FLUX.1, Chroma and Stable Diffusion 3 / 3.5: `generate` and the pipelines of diffusers, end to end on
random weights.

As in test_generate_parity: the same noise, and the relative error of latents and images after all steps below
2e-5 in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from diffusion import initial_noise
from samplers.usage import usage
from tests.models.joint_peers import call_with_tokens
from tests.peers import diffusers, transformers
from tests.samplers.pipelines import (
    HEIGHT,
    NEGATIVE,
    PROMPTS,
    SEEDS,
    WIDTH,
    Drawn,
    error,
    generators,
    opened,
    ours,
    packed,
    picture,
    stable_diffusion_3,
    theirs,
    theirs_packed,
    turned,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # what the peers make of others
CLOSE = 2e-5
STEPS = (
    4  # where nothing depends on their number: test_times compares those of all, and test_flux_dev takes 20
)
PIPELINES = {"flux-fill": "FluxFillPipeline", "flux-canny": "FluxControlPipeline", "chroma": "ChromaPipeline"}
Open = Callable[..., tuple[models.Model, Any]]
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}


# Configurations of the schedulers as published, and whether the pipeline gives sigmas: FLUX.1's do, from 1 to
# 1 / N.
DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SCHEDULERS: dict[str, tuple[dict[str, Any], bool]] = {
    **dict.fromkeys(("flux-dev", "flux-fill", "flux-canny", "flux-depth", "flux-dedistilled"), (DEV, True)),
    "flux-schnell": ({"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15}, True),
    "chroma": ({"shift": 3.0}, True),
    **dict.fromkeys(("sd3", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"), ({"shift": 3.0}, False)),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No bars."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def peer_of(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """family -> the miniature, and its pipeline opened from the folder it is saved to, with the scheduler as
    published; each once."""

    @cache
    def found(family: str, t5: bool = True) -> tuple[models.Model, Any]:
        sd3 = family.startswith("sd3")
        model = stable_diffusion_3(family, t5) if sd3 else models.miniature(family)
        name = "StableDiffusion3Pipeline" if sd3 else PIPELINES.get(family, "FluxPipeline")
        without: dict[str, Any] = (
            {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        )  # which has to be said
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[family][0])
        return model, opened(model, tmp_path_factory.mktemp("saved"), name, scheduler, **without)

    return found


@pytest.fixture
def likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers draws the latents of an image, we take the likeliest: let both see the same."""
    monkeypatch.setattr(
        diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
        "sample",
        lambda self, generator=None: self.mean,
    )


def noise(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return initial_noise(SEEDS, (16, height // 8, width // 8))


def agree(a: Drawn, b: Drawn, steps: int = STEPS) -> None:
    assert len(a.latents) == len(b.latents) == steps
    assert error(a.latents[-1], b.latents[-1]) <= CLOSE
    assert error(a.images, b.images) <= CLOSE
    assert 0.05 < float(b.images.std()) < 0.5  # there is something to see


def both() -> Tensor:
    """One image, once for each seed: their pipelines want it so."""
    return picture(3, 0).repeat(2, 1, 1, 1)


def hard() -> Tensor:
    return (picture(1, 1) >= 0.5).float()


def test_noise_of_a_seed() -> None:
    """As whoever draws one image with torch.Generator().manual_seed(seed) has it."""
    assert torch.equal(
        noise()[1:], torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(SEEDS[1]))
    )


# Times ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SCHEDULERS)
def test_times(family: str) -> None:
    """Sigmas and the times the network is told, of any number of steps at any size, within float32's
    rounding: 1e-6."""
    model = models.published(family)
    config, given = SCHEDULERS[family]
    for height, width in ((1024, 1024), (768, 1344), (256, 256)):
        shift = diffusers.pipelines.flux.pipeline_flux.calculate_shift
        mu = shift(height // 16 * (width // 16)) if config.get("use_dynamic_shifting") else None
        for steps in (1, 2, 4, 20, 28, 50):
            peer = diffusers.FlowMatchEulerDiscreteScheduler(**config)
            peer.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps) if given else None, mu=mu)
            levels = usage(model, steps=steps).levels(model, (height, width))
            assert [level.sigma for level in levels] == pytest.approx(peer.sigmas.tolist(), abs=1e-6)
            assert [level.t for level in levels][:-1] == pytest.approx(
                [t / 1000 for t in peer.timesteps.tolist()], abs=1e-6
            )


# FLUX.1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (96, 80)])
def test_flux_dev(height: int, width: int, peer_of: Open) -> None:
    """Guidance embedded, times shifted by the number of tokens."""
    model, pipe = peer_of("flux-dev")
    size: dict[str, Any] = {"height": height, "width": width}
    peer = theirs_packed(
        pipe, latents=packed(noise(**size)), num_inference_steps=20, guidance_scale=3.5, **size
    )
    agree(ours(model, steps=20, **size), peer, steps=20)


@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_flux_with_true_guidance(negative: list[str] | None, peer_of: Open) -> None:
    """Away from a negative prompt as well; away from "" where there is none, which has to be said to
    diffusers."""
    model, pipe = peer_of("flux-dev")
    given: dict[str, Any] = {
        "true_cfg_scale": 2.5,
        "negative_prompt": negative or ["", ""],
        "guidance_scale": 2.0,
    }
    agree(
        ours(model, steps=STEPS, guidance=2.0, true_cfg=2.5, negative=negative),
        theirs_packed(pipe, latents=packed(noise()), num_inference_steps=STEPS, **given),
    )


def test_flux_schnell(peer_of: Open) -> None:
    """Four steps at even times, 256 tokens of T5's, no guidance at all."""
    model, pipe = peer_of("flux-schnell")
    peer = theirs_packed(
        pipe, latents=packed(noise()), num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256
    )
    agree(ours(model), peer, steps=4)


@pytest.mark.usefixtures("likeliest")
@pytest.mark.parametrize("strength", [0.5, 0.85])
def test_flux_from_an_image(strength: float, peer_of: Open) -> None:
    """The last steps, from the image's latents with the noise of the seeds. (diffusers rounds their number
    up.)"""
    model, pipe = peer_of("flux-dev")
    peer = theirs_packed(
        turned(pipe, "FluxImg2ImgPipeline"), image=both(), strength=strength, generator=generators(),
        num_inference_steps=20,
        guidance_scale=3.5,
    )  # fmt: skip
    agree(ours(model, image=picture(3, 0), strength=strength, steps=20), peer, steps=round(20 * strength))


@pytest.mark.usefixtures("likeliest")
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_flux_with_a_mask_it_does_not_see(strength: float, peer_of: Open) -> None:
    """Ours replaces x0, theirs what each step ends at: the same on a flow, where what is known moves straight
    from its noise."""
    (model, pipe), mask = peer_of("flux-dev"), hard()
    peer = theirs_packed(
        turned(pipe, "FluxInpaintPipeline"), image=both(), mask_image=mask, strength=strength,
        generator=generators(),
        num_inference_steps=STEPS, guidance_scale=3.5,
    )  # fmt: skip
    drawn = ours(model, image=picture(3, 0), mask=mask, strength=strength, steps=STEPS)
    agree(drawn, peer, steps=int(STEPS * strength))
    assert all(error(a, b) <= CLOSE for a, b in zip(drawn.latents, peer.latents, strict=True))


@pytest.mark.usefixtures("likeliest")
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_flux_fill(strength: float, peer_of: Open) -> None:
    """Latents of what is kept and all the mask's pixels beside x; a soft mask is cut at a half."""
    (model, pipe), image, mask = peer_of("flux-fill"), picture(3, 0), picture(1, 1)
    peer = theirs_packed(
        pipe, image=both(), mask_image=mask, strength=strength, generator=generators(),
        num_inference_steps=STEPS, guidance_scale=30.0,
    )  # fmt: skip
    agree(
        ours(model, image=image, mask=mask, strength=strength, steps=STEPS), peer, steps=int(STEPS * strength)
    )


@pytest.mark.usefixtures("likeliest")
def test_flux_canny(peer_of: Open) -> None:
    """Latents of the edges beside x."""
    (model, pipe), image = peer_of("flux-canny"), picture(3, 0)
    peer = theirs_packed(
        pipe,
        control_image=2 * both() - 1,
        latents=packed(noise()),
        num_inference_steps=STEPS,
        guidance_scale=30.0,
    )
    agree(ours(model, image=image, steps=STEPS), peer)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_flux_dedistilled(negative: list[str] | None, peer_of: Open) -> None:
    """[dev] without embedded guidance: classifier-free, at times shifted by the number of tokens, with 512
    tokens of T5's."""
    model, pipe = peer_of("flux-dedistilled")
    assert (model.embeds_guidance, model.require("text").params.readers["t5"].length) == (False, 512)
    away = ["", ""] if negative is None else negative
    peer = theirs_packed(
        pipe, latents=packed(noise()), num_inference_steps=STEPS, true_cfg_scale=3.5, negative_prompt=away
    )
    agree(ours(model, negative=negative, steps=STEPS), peer)


# Chroma -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("negative", "size"), [(NEGATIVE, (HEIGHT, WIDTH)), (None, (96, 80))])
def test_chroma(
    negative: list[str] | None, size: tuple[int, int], peer_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classifier-free guidance, masks of the prompts' own lengths, and times shifted by 3; with diffusers'
    mask as a mask, see below."""
    masks = diffusers.ChromaPipeline._prepare_attention_mask
    monkeypatch.setattr(
        diffusers.ChromaPipeline,
        "_prepare_attention_mask",
        lambda *args, **kwargs: masks(*args, **kwargs).bool(),
    )
    (model, pipe), (height, width) = peer_of("chroma"), size
    peer = theirs_packed(
        pipe,
        height,
        width,
        negative_prompt=negative,
        latents=packed(noise(*size)),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
    )
    agree(ours(model, negative=negative, steps=STEPS, height=height, width=width), peer)


def test_chroma_of_diffusers_does_not_mask(peer_of: Open) -> None:
    """What is masked has no influence: with ours none at all, with what their pipeline hands over, ones and
    zeros that are added, a lot."""
    model, pipe = peer_of("chroma")
    x, t, prompt = noise()[:1], torch.tensor([0.5]), model.require("text").encode(PROMPTS[:1]).condition
    assert prompt.context is not None
    assert prompt.mask is not None
    other = replace(prompt, context=torch.where(prompt.mask[..., None], prompt.context, 3.0))
    _, _, mask, *_ = pipe.encode_prompt(PROMPTS[:1], do_classifier_free_guidance=False)
    whole = pipe._prepare_attention_mask(1, x.shape[2] * x.shape[3] // 4, x.dtype, mask)
    with torch.no_grad():
        mine = [model.network(x, t, each) for each in (prompt, other)]
        added, masked = (
            [
                call_with_tokens(pipe.transformer, x, t, each.context, attention_mask=given)
                for each in (prompt, other)
            ]
            for given in (whole, whole.bool())
        )
    assert torch.equal(*mine)
    assert error(masked[0], mine[0]) <= CLOSE
    assert error(masked[1], masked[0]) <= CLOSE
    assert error(added[0], mine[0]) > 0.01
    assert error(added[1], added[0]) > 0.01


# Stable Diffusion 3 and 3.5 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "negative", "guidance", "t5", "size"),
    [
        ("sd3", NEGATIVE, 7.0, True, (HEIGHT, WIDTH)),
        ("sd3", None, 7.0, False, (80, 48)),
        ("sd3.5-medium", None, 7.0, True, (HEIGHT, WIDTH)),
        ("sd3.5-medium", NEGATIVE, 4.5, False, (HEIGHT, WIDTH)),
        ("sd3.5-large", NEGATIVE, 7.0, True, (80, 48)),
        ("sd3.5-large", None, 1.0, True, (HEIGHT, WIDTH)),
    ],
)
def test_stable_diffusion_3(
    family: str, negative: list[str] | None, guidance: float, t5: bool, size: tuple[int, int], peer_of: Open
) -> None:
    """With and without a negative prompt, guidance and T5."""
    (model, pipe), (height, width) = peer_of(family, t5), size
    peer = theirs(
        pipe,
        negative_prompt=negative,
        latents=noise(*size),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=height,
        width=width,
    )
    agree(ours(model, negative=negative, guidance=guidance, steps=STEPS, height=height, width=width), peer)


def test_stable_diffusion_3_turbo(peer_of: Open) -> None:
    """Four steps, no guidance, the family's own."""
    model, pipe = peer_of("sd3.5-large-turbo")
    agree(
        ours(model), theirs(pipe, latents=noise(), num_inference_steps=4, guidance_scale=0.0, **SIZE), steps=4
    )


@pytest.mark.usefixtures("likeliest")
def test_stable_diffusion_3_from_an_image(peer_of: Open) -> None:
    model, pipe = peer_of("sd3")
    peer = theirs(
        turned(pipe, "StableDiffusion3Img2ImgPipeline"), image=both(), strength=0.5, generator=generators(),
        num_inference_steps=STEPS,
        guidance_scale=7.0, negative_prompt=NEGATIVE, **SIZE,
    )  # fmt: skip
    agree(
        ours(model, image=picture(3, 0), strength=0.5, steps=STEPS, negative=NEGATIVE), peer, steps=STEPS // 2
    )


@pytest.mark.usefixtures("likeliest")
def test_stable_diffusion_3_with_a_mask_it_does_not_see(peer_of: Open) -> None:
    """Every step's latents agree. The peer for inpainting, unlike the one for text alone, decodes them
    without their shift of 0.0609."""
    (model, pipe), mask = peer_of("sd3"), hard()
    peer = theirs(
        turned(pipe, "StableDiffusion3InpaintPipeline"), image=both(), mask_image=mask, strength=0.5,
        generator=generators(),
        num_inference_steps=STEPS, guidance_scale=7.0, **SIZE,
    )  # fmt: skip
    drawn = ours(model, image=picture(3, 0), mask=mask, strength=0.5, steps=STEPS)
    assert len(drawn.latents) == STEPS // 2
    assert all(error(a, b) <= CLOSE for a, b in zip(drawn.latents, peer.latents, strict=True))
    params = model.require("vae").params
    with torch.no_grad():
        unshifted, right = (
            model.require("vae").decode(peer.latents[-1] - off) for off in (params.shift * params.scale, 0)
        )
    assert error(peer.images, (unshifted / 2 + 0.5).clamp(0, 1)) <= CLOSE
    assert error(drawn.images, (right / 2 + 0.5).clamp(0, 1)) <= CLOSE
    assert error(drawn.images, peer.images) > 0.01
