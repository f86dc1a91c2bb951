"""`generate`: what it makes is what its parts make put together by hand, whatever else is in the batch;
mistakes are found first."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import samplers
from diffusion import (
    APG,
    ClassifierFreeGuidance,
    Condition,
    DenoiserLike,
    Grid,
    Inpainting,
    Thresholded,
    ZeroInit,
    extrapolate,
    initial_noise,
    interval,
    rescaled,
    time_grid,
    zero_star,
)
from models.layers.packed import Packed, pack
from models.networks.tiling import decode_tiled
from samplers import SAMPLERS, Step, generate, preview, sample
from samplers.generate import on_device
from samplers.image_to_image import image_to_image
from samplers.usage import usage
from tests.peers import diffusers

SMALL: dict[str, Any] = {"height": 32, "width": 64, "steps": 3}
SHAPE = (4, 4, 8)
FLOWS = [
    name
    for name, family in models.FAMILIES.items()
    if family.prediction == "flow" and family.architecture.name == name
]
LONG = "a very long story of many words " * 15  # 105 tokens


@cache
def mini(family: str = "sd1", **network: int) -> models.Model:
    return models.miniature(family, **network)


def exact(family: str) -> models.Model:
    """In float64: networks of random weights blow rounding up, and by how much depends on the processor."""
    model = deepcopy(mini(family))
    for part in model.parts.values():
        part.double()
    return model


def drawn(model: models.Model, prompts: Any = "a corgi", **settings: Any) -> tuple[Tensor, Tensor]:
    """The last latents and the images."""
    steps: list[Step] = []
    images = generate(model, prompts, watch=steps.append, **{**SMALL, **settings})
    return steps[-1].x, images


def told(model: models.Model, prompt: str = "a corgi") -> tuple[Condition, Condition]:
    """A prompt, and nothing, as the model reads them."""
    with torch.no_grad():
        condition = model.require("text").encode([prompt]).condition
        return condition, model.require("text").null(1, like=condition)


def test_a_distilled_network_that_edits_is_told_its_scale() -> None:
    """It sees the latents to edit in the autoencoder's own units, as pix2pix does, and is asked once a step;
    it follows no edges."""
    model = mini("lcm", in_channels=8)
    assert model.role == "edit"
    with torch.no_grad():
        beside = model.require("vae").unscaled(model.require("vae").encode(2 * RGB - 1).mode)
    condition = replace(told(model)[0], image=beside, guidance=torch.tensor([6.0]))
    latents = sample("lcm", model.denoiser(), model.grid(3), shape=SHAPE, seeds=[5], condition=condition)
    assert torch.equal(drawn(model, image=RGB, guidance=6.0, seeds=[5])[0], latents)


def decoded(model: models.Model, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return ((torch.cat([model.require("vae").decode(z[None]) for z in latents]) + 1) / 2).clamp(0, 1)


def picture(channels: int, seed: int = 0, n: int = 1) -> Tensor:
    return torch.rand(n, channels, 32, 64, generator=torch.Generator().manual_seed(seed))


# What is made -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_solver(sampler: str) -> None:
    """Prompt, guidance, solver and autoencoder by hand give the same latents and image, to the last bit."""
    model = mini()
    condition, null = told(model)
    denoiser = ClassifierFreeGuidance(model.denoiser(), 4.0, null)
    by_hand = sample(sampler, denoiser, model.grid(3), shape=SHAPE, seeds=[7], condition=condition)
    latents, images = drawn(model, seeds=[7], sampler=sampler, guidance=4.0)
    assert torch.equal(latents, by_hand)
    assert torch.equal(images, decoded(model, by_hand))
    assert images.shape == (1, 3, 32, 64)


def cfg(model: models.Model, null: Condition, scale: Any = 4.0, **how: Any) -> DenoiserLike:
    return ClassifierFreeGuidance(model.denoiser(), scale, null, **how)


GUIDES: dict[str, tuple[dict[str, Any], Callable[[models.Model, Condition], DenoiserLike]]] = {
    "interval": ({"interval": (0.2, 0.8)}, lambda m, null: cfg(m, null, interval(4.0, 0.2, 0.8))),
    "rescaled": (
        {"rule": {"name": "rescaled", "phi": 0.6}},
        lambda m, null: cfg(m, null, rule=rescaled(0.6, space=m.prediction)),
    ),
    "apg": ({"rule": {"name": "apg", "eta": 0.2}}, lambda m, null: cfg(m, null, rule=APG(eta=0.2))),
    "zero": (
        {"rule": {"name": "zero_star"}, "zero_from": 0.9},
        lambda m, null: ZeroInit(cfg(m, null, rule=zero_star), 0.9),
    ),
    "percentile": ({"percentile": 0.9}, lambda m, null: Thresholded(cfg(m, null, rule=extrapolate), 0.9)),
}


@pytest.mark.parametrize(("guide", "by_hand"), GUIDES.values(), ids=list(GUIDES))
def test_any_guidance(guide: dict[str, Any], by_hand: Callable[..., DenoiserLike]) -> None:
    """Rules, intervals, thresholds: as the denoiser made by hand, and not as plain guidance."""
    model = mini()
    condition, null = told(model)
    expected, plain = (
        sample("dpmpp_2m", denoiser, model.grid(3), shape=SHAPE, seeds=[0], condition=condition)
        for denoiser in (by_hand(model, null), cfg(model, null))
    )
    latents, _ = drawn(model, guidance=4.0, guide=guide)
    assert torch.equal(latents, expected)
    assert not torch.allclose(latents, plain, atol=1e-3)


def test_nothing_said_is_as_the_model_is_meant() -> None:
    """Sampler, steps, grid, guidance, size and seed of the family."""
    model = mini("lcm")
    images = generate(model, ["a corgi", "an owl"])
    said = generate(
        model,
        ["a corgi", "an owl"],
        seeds=[0, 1],
        sampler="lcm",
        steps=4,
        grid={"spacing": "lcm", "initial": "unit"},
        guidance=8.0,
    )
    assert images.shape == (2, 3, 128, 128)
    assert torch.equal(images, said)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < 0.2 < 0.8 < float(images.max()) <= 1


def test_a_list_of_times_is_a_grid() -> None:
    """It brings its own number of steps."""
    steps: list[Step] = []
    generate(
        mini(), "a corgi", height=32, width=64, grid={"spacing": [900.0, 500.0, 100.0]}, watch=steps.append
    )
    assert [step.level.t for step in steps] == [500, 100, -1]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-refiner", "lcm", "sdxl-turbo", "playground-v2.5"])
def test_an_image_does_not_depend_on_its_batch(family: str) -> None:
    """One of three prompts of 1, 3 and 2 chunks of text, with a negative prompt of its own, equals the same
    alone, but for rounding."""
    model = exact(family)
    negative = None if family in ("lcm", "sdxl-turbo") else ["", "ugly", LONG * 2]
    prompts, seeds = ["an owl", LONG * 2, LONG], [5, 9, 5]
    together, images = drawn(model, prompts, negative=negative, seeds=seeds)
    for i, seed in enumerate(seeds):
        alone, image = drawn(
            model, prompts[i], negative=None if negative is None else negative[i], seeds=[seed]
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(images[i : i + 1], image, rtol=0, atol=1e-6)
    assert float((together[0] - together[2]).abs().max()) > 0.1  # the seed is not all there is


@pytest.mark.parametrize("family", FLOWS)
def test_an_image_of_a_flow_does_not_depend_on_its_batch(family: str) -> None:
    """Of three prompts of any length, each with a negative one and, where the network sees one, a picture of
    its own."""
    model, prompts, seeds = exact(family), ["an owl", "", "a corgi, " * 10], [5, 9, 5]
    away: dict[str, Any] = {} if family == "flux-schnell" else {"negative": ["", "ugly", "no owl"]}
    away |= {"true_cfg": 2.0} if model.embeds_guidance else {}
    seen: dict[str, Tensor] = {"image": picture(3, n=3)} if model.image_channels else {}
    seen |= {"mask": (picture(1, n=3) > 0.5).float()} if family == "flux-fill" else {}
    each = ("negative", *seen)
    together, images = drawn(model, prompts, seeds=seeds, steps=2, **away, **seen)
    for i, seed in enumerate(seeds):
        own = {name: value[i : i + 1] if name in each else value for name, value in {**away, **seen}.items()}
        alone, image = drawn(model, prompts[i], seeds=[seed], steps=2, **own)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(images[i : i + 1], image, rtol=0, atol=1e-6)
    assert float((together[0] - together[2]).abs().max()) > 0.01  # the seed is not all there is


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde"])
def test_noise_within_a_solver_is_the_seed_s_own(sampler: str) -> None:
    """Two samples of one batch with one seed are the same, of two seeds are not, and the batch's order does
    not matter."""
    latents, _ = drawn(mini(), seeds=[3, 4, 3], sampler=sampler)
    torch.testing.assert_close(latents[0], latents[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        latents, drawn(mini(), seeds=[4, 3, 3], sampler=sampler)[0][[1, 0, 1]], rtol=1e-4, atol=1e-4
    )
    assert float((latents[0] - latents[1]).abs().max()) > 0.1


# Prompts ----------------------------------------------------------------------------------------------------


def test_weights_are_read_where_asked_for() -> None:
    """Neutral at 1 to the last bit; without `weighted`, brackets are text."""
    plain, _ = drawn(mini(), "a red cat")
    assert torch.equal(drawn(mini(), "a (red:1.0) cat", weighted=True)[0], plain)
    assert torch.equal(drawn(mini(), "a red cat", weighted=True)[0], plain)
    heavy = drawn(mini(), "a (red:1.5) cat", weighted=True)[0]
    assert not torch.allclose(heavy, plain, atol=1e-3)
    assert not torch.allclose(heavy, drawn(mini(), "a (red:1.5) cat")[0], atol=1e-3)


def test_a_negative_prompt_is_what_guidance_leads_away_from() -> None:
    """The formula by hand, in which it stands for nothing."""
    model = mini()
    (condition, _), (away, _) = told(model), told(model, "ugly")
    by_hand = sample("dpmpp_2m", cfg(model, away), model.grid(3), shape=SHAPE, seeds=[0], condition=condition)
    assert torch.equal(drawn(model, negative="ugly", guidance=4.0)[0], by_hand)


def test_long_prompts_are_read_whole() -> None:
    """Words beyond the 75th token matter, and nothing is said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = (drawn(mini(), LONG + end)[0] for end in ("a corgi", "an owl"))
    assert float((a - b).abs().max()) > 1e-3


def test_long_prompts_are_cut_with_a_warning_if_asked_to() -> None:
    """The image is that of the 75 tokens that are kept, and the warning, which points here, holds the others,
    once."""
    prompt = "word " * 75
    with pytest.warns(UserWarning, match="dropped: 'a corgi'") as said:
        cut, _ = drawn(mini(), [prompt + "a corgi"] * 2, seeds=[0, 1], long="cut")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(cut, drawn(mini(), prompt, seeds=[0, 1], long="cut")[0], rtol=0, atol=0)
    with pytest.warns(UserWarning, match="dropped: 'a corgi'") as said:
        generate(mini(), prompt + "a corgi", long="cut", **SMALL)
    assert said[0].filename == __file__


def test_numbers_of_the_vector() -> None:
    """By default the size of the image, not cropped; others where given, and those of the refiner go to the
    refiner only."""
    base = mini("sdxl")
    usual = {"height": 32, "width": 64, "top": 0, "left": 0, "target_height": 32, "target_width": 64}
    short: dict[str, Any] = {"steps": 1, "guidance": 1.0}
    plain, _ = drawn(base, **short)
    assert torch.equal(plain, drawn(base, numbers=usual, **short)[0])
    for name in usual:
        assert not torch.allclose(plain, drawn(base, numbers={name: 500}, **short)[0], atol=1e-3), name
    both: dict[str, Any] = {
        "refiner": mini("sdxl-refiner"),
        "steps": 6,
        "grid": {"spacing": "trailing"},
        "guidance": 1.0,
    }
    assert not torch.allclose(
        drawn(base, **both)[0], drawn(base, numbers={"score": 1.0}, **both)[0], atol=1e-3
    )


# Images -----------------------------------------------------------------------------------------------------


def test_an_image_to_begin_from() -> None:
    """The last share of the steps from its latents, each seed with noise of its own; one image serves all."""
    model, image = mini(), picture(3)
    condition, null = told(model)
    with torch.no_grad():
        latents = model.require("vae").encode(2 * image - 1).mode
    by_hand = image_to_image(
        cfg(model, null), latents, model.grid(6), 0.5, seeds=[3, 4], condition=condition.expand(2)
    )
    seen, images = drawn(model, image=image, strength=0.5, seeds=[3, 4], guidance=4.0, steps=6)
    assert torch.equal(seen, by_hand)
    each = generate(
        model, "a corgi", image=image.repeat(2, 1, 1, 1), strength=0.5, seeds=[3, 4], guidance=4.0, steps=6
    )
    torch.testing.assert_close(each, images, rtol=0, atol=1e-5)
    one = generate(model, "a corgi", image=image, strength=0.01, seeds=[3], steps=2, guidance=1.0)
    torch.testing.assert_close(one, decoded(model, latents), rtol=0, atol=0.05)  # next to nothing is changed


def test_what_a_mask_keeps_is_kept() -> None:
    """By a network that knows nothing of masks: the latents of the image where it is 0, others where it is
    1."""
    model, image = mini(), picture(3)
    mask = torch.zeros(1, 1, 32, 64)
    mask[..., 32:] = 1
    condition, null = told(model)
    with torch.no_grad():
        known = model.require("vae").encode(2 * image - 1).mode
    denoiser = Inpainting(cfg(model, null), known, mask[..., ::8, ::8])
    by_hand = sample("dpmpp_2m", denoiser, model.grid(3), shape=SHAPE, seeds=[0], condition=condition)
    latents, _ = drawn(model, image=image, mask=mask, guidance=4.0)
    assert torch.equal(latents, by_hand)
    torch.testing.assert_close(latents[..., :4], known[..., :4], rtol=1e-5, atol=1e-5)
    assert float((latents[..., 4:] - known[..., 4:]).abs().mean()) > 0.3


@pytest.mark.parametrize(("family", "channels"), [("lcm", 4), ("flux-dev", 16)])
def test_what_a_mask_keeps_is_kept_by_networks_that_are_told_guidance(family: str, channels: int) -> None:
    """By those that see no mask: it stays out of what they are told. The scale they are told makes another
    image of the rest."""
    model, image, mask = mini(family), picture(3), torch.zeros(1, 1, 32, 64)
    mask[..., 32:] = 1
    with torch.no_grad():
        known = model.require("vae").encode(2 * image - 1).mode
    latents, _ = drawn(model, image=image, mask=mask)
    assert latents.shape[1] == channels
    torch.testing.assert_close(latents[..., :4], known[..., :4], rtol=1e-5, atol=1e-5)
    assert float((latents[..., 4:] - known[..., 4:]).abs().mean()) > 0.3
    assert (
        float((latents - drawn(model, image=image, mask=mask, guidance=1.5)[0])[..., 4:].abs().max()) > 1e-3
    )


def test_true_guidance_stands_beside_the_embedded_one() -> None:
    """FLUX.1 [dev]: the formula by hand, with the same scale told on both sides."""
    model, text = mini("flux-dev"), mini("flux-dev").require("text")
    with torch.no_grad():
        condition, null = (text.encode([prompt]).condition for prompt in ("a corgi", "ugly"))
    condition = replace(condition, guidance=torch.tensor([3.0]))
    grid = model.grid(3, spacing="mu_shift", tokens=8)
    by_hand = sample("euler", cfg(model, null, 2.5), grid, shape=(16, 4, 8), seeds=[0], condition=condition)
    assert torch.equal(drawn(model, negative="ugly", guidance=3.0, true_cfg=2.5)[0], by_hand)
    plain = sample("euler", model.denoiser(), grid, shape=(16, 4, 8), seeds=[0], condition=condition)
    assert torch.equal(drawn(model, guidance=3.0)[0], plain)
    assert torch.equal(drawn(model, guidance=3.0, true_cfg=1.0)[0], plain)


@pytest.mark.parametrize("family", ["flux-dev", "flux-schnell", "sd3"])
def test_what_t5_does_not_read_is_said(family: str) -> None:
    """It reads its length less the end of the text, 511 or 255 pieces; these letters are one each, and so is
    every blank."""
    model = mini(family)
    kept = (
        "a " * (model.require("text").params.readers["t5"].length // 2 - 2) + "bb"
    )  # far more than CLIP reads
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, _ = drawn(model, kept, steps=1)
    with pytest.warns(UserWarning, match="its end was dropped: 'owl'$"):
        longer, _ = drawn(model, kept + "owl", steps=1)
    assert torch.equal(longer, whole)


def test_masks_and_images_of_ones_own() -> None:
    """One image with a mask per seed, and the other way round: each as alone."""
    image, masks = picture(3), (picture(1, 1, n=2) > 0.5).float()
    for model, images, wanted in (
        (mini(), image, masks),
        (mini(), picture(3, n=2), masks[:1]),
        (mini(in_channels=9), image, masks),
    ):
        together, _ = drawn(model, image=images, mask=wanted, seeds=[1, 2], strength=0.7, steps=2)
        for i in range(2):
            one = {"image": images[i % len(images)][None], "mask": wanted[i % len(wanted)][None]}
            alone, _ = drawn(model, **one, seeds=[1 + i], strength=0.7, steps=2)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_refiner_keeps_what_the_mask_keeps() -> None:
    """It goes on from the base with the mask, though it does not see it."""
    base, refiner = mini("sdxl"), mini("sdxl-refiner")
    image, mask = picture(3), torch.zeros(1, 1, 32, 64)
    mask[..., 32:] = 1
    with torch.no_grad():
        known = base.require("vae").encode(2 * image - 1).mode
    latents, _ = drawn(
        base, image=image, mask=mask, refiner=refiner, steps=8, grid={"spacing": "linspace"}, handover=0.5
    )
    torch.testing.assert_close(latents[..., :4], known[..., :4], rtol=1e-5, atol=1e-5)


def test_strength_and_refiner_share_the_steps() -> None:
    """Half of ten steps are taken, of which the refiner takes those of the last fifth of the time."""
    calls: dict[str, list[float]] = {"base": [], "refiner": []}
    base, refiner = mini("sdxl"), mini("sdxl-refiner")
    with pytest.MonkeyPatch.context() as patch:
        for name, model in (("base", base), ("refiner", refiner)):
            forward = model.network.forward

            def asked(
                x: Tensor, t: Tensor, condition: Condition, name: str = name, forward: Any = forward
            ) -> Tensor:
                calls[name].append(float(t[0]))
                return forward(x, t, condition)

            patch.setattr(model.network, "forward", asked)
        drawn(
            base,
            image=picture(3),
            strength=0.5,
            refiner=refiner,
            steps=10,
            grid={"spacing": "trailing"},
            sampler="euler",
        )
    assert calls == {"base": [499, 399, 299], "refiner": [199, 99]}  # 199 is where the last 0.2 begin


# Where, and how ---------------------------------------------------------------------------------------------


def test_offloading_gives_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts come and go one at a time, also where one of them fails."""
    base, refiner = models.miniature("sdxl"), models.miniature("sdxl-refiner")
    settings: dict[str, Any] = {"refiner": refiner, "steps": 8, "image": picture(3), "strength": 0.9}
    plain = generate(base, "a corgi", **settings)
    names = {
        id(part): f"{who} {name}"
        for who, model in (("base", base), ("refiner", refiner))
        for name, part in model.parts.items()
    }
    weights = {
        id(p): (p, p.data_ptr())
        for model in (base, refiner)
        for part in model.parts.values()
        for p in part.parameters()
    }
    moves: list[str] = []
    move = nn.Module.to

    def to(self: nn.Module, *where: Any, **kind: Any) -> nn.Module:
        """The device is the CPU, where a test can be sure to be; what comes to it is copied, as to
        another."""
        if id(self) in names:
            away = [p for p, home in weights.values() if p.data_ptr() != home]
            assert not away, "only one part at a time is there"
            moves.append(names[id(self)])
            for p in self.parameters():
                p.data = p.data.clone()
        return move(self, *where, **kind)

    def at_home() -> bool:
        return all(p.data_ptr() == home for p, home in weights.values())

    monkeypatch.setattr(nn.Module, "to", to)
    assert torch.equal(generate(base, "a corgi", device="cpu", offload=True, **settings), plain)
    assert moves == ["base text", "base vae", "base backbone", "refiner text", "refiner backbone", "base vae"]
    assert at_home()
    moves.clear()
    with monkeypatch.context() as patch:
        patch.setattr(base.network, "forward", lambda *args, **kwargs: torch.full((2, 4, 4, 8), torch.nan))
        with pytest.raises(FloatingPointError, match="1 of 1 samples are not finite, the first of seed 0"):
            generate(base, "a corgi", device="cpu", offload=True, **settings)
    assert moves == ["base text", "base vae", "base backbone"]
    assert at_home()


def test_tiles() -> None:
    """The autoencoder works in tiles, both ways; a tile that covers all changes nothing."""
    model, image = mini(), picture(3)
    latents, plain = drawn(model)
    with torch.no_grad():
        by_hand = decode_tiled(model.require("vae"), latents, 4, 1)
    assert torch.equal(drawn(model, tile=4)[1], ((by_hand + 1) / 2).clamp(0, 1))
    assert torch.equal(drawn(model, tile=8)[1], plain)
    assert not torch.equal(
        drawn(model, tile=4, image=image, strength=0.5)[0], drawn(model, image=image, strength=0.5)[0]
    )


def test_half_precision() -> None:
    """Parts in bfloat16: images in float32, near those of float32, the sampling state as precise as ever."""
    model = models.miniature("sdxl").to(dtype=torch.bfloat16)
    latents, images = drawn(model, guidance=2.0)
    assert latents.dtype == images.dtype == torch.float32
    torch.testing.assert_close(images, drawn(mini("sdxl"), guidance=2.0)[1], rtol=0, atol=0.1)


def test_previews_on_the_way() -> None:
    """Every step is shown once. By the autoencoder where there is nothing smaller: that of the last step is
    the image itself."""
    model = replace(mini(), preview=None)
    steps: list[Step] = []
    images = generate(model, "a corgi", watch=steps.append, sampler="ddim", **SMALL)
    assert [step.i for step in steps] == [0, 1, 2]
    torch.testing.assert_close(preview(model, steps[-1]), images, rtol=0, atol=1e-5)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

        def decode(self, latents: Tensor) -> Tensor:
            return latents[:, :3] * self.factor

    shown = preview(replace(model, preview=Tiny()), steps[0])  # type: ignore[arg-type]
    torch.testing.assert_close(shown, (steps[0].x0[:, :3] * 0.5 / 2 + 0.5).clamp(0, 1))
    assert not shown.requires_grad


def test_it_starts_from_the_noise_of_the_seeds() -> None:
    """One Euler step of a network that sees nothing but noise: what is left of it is what the seeds draw."""
    model = mini()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.network, "forward", lambda x, t, condition: torch.zeros_like(x))
        latents, _ = drawn(model, seeds=[11, 12], steps=1, sampler="euler", guidance=1.0)
    level = model.grid(1)[0]
    torch.testing.assert_close(latents, initial_noise([11, 12], SHAPE) * level.sigma / level.alpha)


def test_it_leaves_no_gradients() -> None:
    assert not generate(mini(), "a corgi", **SMALL).requires_grad
    assert torch.is_grad_enabled()


# Mistakes ---------------------------------------------------------------------------------------------------


def without(part: str) -> models.Model:
    return replace(mini(), **{part: None})  # type: ignore[arg-type]


def mute(family: str) -> models.Model:
    """One whose T5 has no tokenizer."""
    model = models.miniature(family)
    del model.require("text").tokenizers["t5"]
    return model


RGB, MASK = picture(3), picture(1)
# the model, what is given beside a prompt, and what the line must say
MISTAKES: dict[str, tuple[Callable[[], models.Model], dict[str, Any], str]] = {
    "no text": (lambda: without("text"), {}, "this model has no text (it has backbone, vae, preview): "
                                             "load it with a file that holds its text"),
    "no vae": (lambda: without("vae"), {}, "this model has no vae"),
    "no network": (lambda: without("backbone"), {}, "this model has no backbone"),
    "no prompts": (mini, {"prompts": []}, "nothing to draw"),
    "prompt": (mini, {"prompts": [3]}, "prompts must be a text or a list of texts"),
    "no seeds": (mini, {"seeds": []}, "nothing to draw"),
    "seeds": (mini, {"prompts": ["a", "b"], "seeds": [1, 2, 3]}, "2 prompts for 3 seeds"),
    "seed": (mini, {"seeds": [-1]}, "seed must lie in 0 ... 2^63 - 1, not -1"),
    "half a seed": (mini, {"seeds": [0.5]}, "seeds must be a list of whole numbers or null"),
    "negative": (mini, {"negative": ["a", "b"]}, "2 negative prompts for 1 images"),
    "negative of nothing": (mini, {"negative": "ugly", "guidance": 1.0}, "guidance is off"),
    "negative of lcm": (lambda: mini("lcm"), {"negative": "ugly"},
        "this network takes guidance as input: leave negative out"),
    "guide of lcm": (lambda: mini("lcm"), {"guide": {"percentile": 0.9}}, "leave guide out"),
    "guide off": (mini, {"guide": {"interval": (0.1, 0.5)}, "guidance": 1.0}, "guidance=1 is off"),
    "guide": (mini, {"guide": {"rules": 3}}, "no guide parameter named 'rules'; did you mean 'rule'?"),
    "rule": (mini, {"guide": {"rule": {"name": "apgg"}}}, "did you mean 'apg'?"),
    "guidance": (mini, {"guidance": float("nan")}, "guidance must be a number"),
    "long": (mini, {"long": "trunk"}, "no way with long prompts named 'trunk'; did you mean 'chunk'?"),
    "sampler": (mini, {"sampler": "ddiim"}, "did you mean 'ddim'?"),
    "option": (mini, {"sampler": "ddim", "etta": 1.0}, "no option of ddim named 'etta'; did you mean 'eta'?"),
    "option's value": (mini, {"sampler": "ddim", "eta": "high"}, "eta of ddim must be a number, not 'high'"),
    "steps": (mini, {"steps": 0}, "steps must be a whole number >= 1, not 0"),
    "grid": (mini, {"grid": {"spacing": "karass"}}, "did you mean 'karras'?"),
    "grid's option": (mini, {"grid": {"rho": 5.0}}, "rho"),
    "size": (mini, {"height": 100}, "multiples of 8, not 100x64 (height x width): 96x64 is near"),
    "no size": (mini, {"height": 0}, "multiples of 8, not 0x64 (height x width): 8x64 is near"),
    "half a size": (mini, {"height": 32.0}, "height must be a whole number or null, not 32.0"),
    "other size": (mini, {"image": RGB, "height": 64}, "the image is 32x64, not 64x64 (height x width)"),
    "odd image": (mini, {"image": torch.rand(1, 3, 30, 64), "height": None}, "multiples of 8, not 30x64"),
    "image": (mini, {"image": RGB[0]}, "the image must be floating point (1, 3, H, W) in [0, 1], not "
                                       "torch.float32 (3, 32, 64)"),
    "images": (mini, {"image": RGB.repeat(3, 1, 1, 1), "seeds": [1, 2]}, "the image must be floating "
                                                                         "point (1 or 2, 3, H, W)"),
    "bytes": (mini, {"image": (RGB * 255).byte()}, "in [0, 1], not torch.uint8"),
    "range": (mini, {"image": RGB * 2 - 1}, "in [0, 1], not in -"),
    "nan": (mini, {"image": RGB * torch.nan}, "in [0, 1], not in nan ... nan"),
    "path": (mini, {"image": "cat.png"}, "samplers.read_image reads a file"),
    "mask": (mini, {"mask": MASK}, "mask is for an image: give image too"),
    "mask's size": (mini, {"image": RGB, "mask": MASK[..., :32]}, "the mask is 32x32, the image 32x64 "
                                                                  "(height x width)"),
    "mask's channels": (mini, {"image": RGB, "mask": RGB}, "the mask must be floating point (1, 1, H, W)"),
    "strength": (mini, {"image": RGB, "strength": 1.5}, "strength is a share of the steps in (0, 1], not "
                                                        "1.5"),
    "strength's kind": (mini, {"image": RGB, "strength": True}, "strength must be a number or null, not "
                                                                "True"),
    "strength of nothing": (mini, {"strength": 0.5}, "strength is for an image"),
    "image guidance": (mini, {"image": RGB, "image_guidance": 2.0},
        "image_guidance is for networks that edit"),
    "inpainting": (lambda: mini(in_channels=9), {}, "sees 5 channels besides x: give it an image and a mask"),
    "inpainting without": (lambda: mini(in_channels=9), {"image": RGB}, "this network is for inpainting: "
                                                                        "give a mask"),
    "editing": (lambda: mini(in_channels=8), {}, "sees 4 channels besides x: give it an image to edit"),
    "editing half": (lambda: mini(in_channels=8), {"image": RGB, "strength": 0.5}, "this network edits "
                                                                                   "the whole image"),
    "editing a part": (lambda: mini(in_channels=8), {"image": RGB, "mask": MASK}, "leave mask out"),
    "distilled editing": (
        lambda: mini("lcm", in_channels=8),
        {"image": RGB, "image_guidance": 2.0},
        "takes guidance as its only input scale: leave image_guidance out",
    ),
    "editing rule": (lambda: mini(in_channels=8), {"image": RGB, "guide": {"percentile": 0.9}}, "leave "
                                                                                                "guide out"),
    "lengths": (mini, {"prompts": ["a " * n for n in (370, 445, 520)]}, "prompts of 5, 6, 7 pieces of 75 "
                                                                        "tokens in one batch would"),
    "weight": (mini, {"prompts": f"(a:{'9' * 400})", "weighted": True}, "weights are at most 100, not inf, "
                                                                        "in the prompt"),
    "numbers": (mini, {"numbers": {"height": 5}},
        "this family takes no numbers besides the prompt: leave height out"),
    "number": (lambda: mini("sdxl"), {"numbers": {"hight": 5}}, "no number named 'hight'; did you mean "
                                                                "'height'?"),
    "score": (lambda: mini("sdxl"), {"numbers": {"score": 5}}, "no number named 'score'"),
    "number's value": (lambda: mini("sdxl"), {"numbers": {"top": "5"}}, "the number top must be a number, "
                                                                        "not '5'"),
    "refiner": (mini, {"refiner": without("text")}, "this model has no text"),
    "other refiner": (mini, {"refiner": lambda: mini("sdxl-refiner")},
        "model and refiner differ in their latents"),
    "refiner's schedule": (lambda: mini("playground-v2.5"), {"refiner": lambda: mini("sdxl-refiner")},
        "model and refiner differ in their latents"),
    "refiner that edits": (mini, {"refiner": lambda: mini(in_channels=8)},
        "this refiner also takes an image"),
    "refiner's kind": (mini, {"refiner": "refiner.safetensors"}, "refiner must be Model or null, not "
                                                                 "'refiner.safetensors'"),
    "handover of nothing": (mini, {"handover": 0.8}, "give refiner too, or leave it out"),
    "handover's kind": (mini, {"refiner": lambda: mini(), "handover": "late"}, "handover must be a "
                                                                               "number, not 'late'"),
    "handover": (mini, {"refiner": lambda: mini(), "handover": 1.0}, "in (0, 1), not 1"),
    "nothing to refine": (mini, {"refiner": lambda: mini(), "grid": {"spacing": "trailing"}},
        "the refiner has none of the 3 steps"),
    "nothing before": (mini, {"refiner": lambda: mini(), "image": RGB, "strength": 0.1},
        "the first model has none of the 1 steps"),
    "tile": (mini, {"tile": 0}, "must be at least 1, not 0"),
    "device": (mini, {"device": "gpu"}, "no device 'gpu' here"),
    "offload": (mini, {"offload": True}, "offload needs the device on which parts work: give device='cuda'"),
    "true_cfg of sd1": (mini, {"true_cfg": 2.0}, "true_cfg is for networks that take guidance as an input"),
    "true_cfg of sd3": (lambda: mini("sd3"), {"true_cfg": 2.0},
        "true_cfg is for networks that take guidance as an input"),
    "true_cfg of schnell": (lambda: mini("flux-schnell"), {"true_cfg": 2.0},
        "true_cfg is for networks that take guidance as an input"),
    "true_cfg's kind": (lambda: mini("flux-dev"), {"true_cfg": True}, "true_cfg must be a number or null, "
                                                                      "not True"),
    "negative of dev": (lambda: mini("flux-dev"), {"negative": "ugly"},
        "leave negative out, or give true_cfg=2"),
    "negative with none": (lambda: mini("flux-dev"), {"negative": "ugly", "true_cfg": 1.0},
        "leave negative out, or give true_cfg=2"),
    "negative of turbo": (lambda: mini("sdxl-turbo"), {"negative": "ugly", "guidance": 0.0},
        "guidance is off"),
    "negative of schnell": (lambda: mini("flux-schnell"), {"negative": "ugly"}, "guidance is off"),
    "guide of dev": (lambda: mini("flux-dev"), {"guide": {"percentile": 0.9}},
        "leave guide out, or give true_cfg=2"),
    "fill": (lambda: mini("flux-fill"), {}, "sees 80 channels besides x: give it an image and a mask"),
    "fill without": (lambda: mini("flux-fill"), {"image": RGB}, "this network is for inpainting: give a "
                                                                "mask"),
    "canny": (lambda: mini("flux-canny"), {},
        "sees 16 channels besides x: give it an image of edges or depths"),
    "canny of a part": (lambda: mini("flux-canny"), {"image": RGB, "mask": MASK}, "leave mask out"),
    "canny half": (lambda: mini("flux-depth"), {"image": RGB, "strength": 0.5}, "leave strength out"),
    "canny's scale": (lambda: mini("flux-canny"), {"image": RGB, "image_guidance": 1.5}, "image_guidance "
                                                                                         "is for networks "
                                                                                         "that edit"),
    "size of flux": (lambda: mini("flux-dev"), {"height": 42}, "multiples of 8, not 42x64 (height x "
                                                               "width): 40x64 is near"),
    "size of sd3": (lambda: mini("sd3"), {"width": 70}, "multiples of 8, not 32x70 (height x width): "
                                                        "32x72 is near"),
    "beyond its positions": (lambda: mini("sd3"), {"height": 528}, "up to 512 pixels a side, not 528x64 "
                                                                   "(height x width)"),
    "no tokens of flux": (lambda: mute("flux-dev"), {}, "T5 has no tokenizer: load its "
                                                        "spiece.model or tokenizer.json too"),
    "no tokens of sd3": (lambda: mute("sd3"), {}, "T5 has no tokenizer: load its spiece.model "
                                                  "or tokenizer.json too"),
    "refiner of a flow": (lambda: mini("sd3"), {"refiner": lambda: mini("sdxl-refiner")},
        "model and refiner differ in their latents"),
    "flow for a refiner": (lambda: mini("sdxl"), {"refiner": lambda: mini("flux-dev")},
        "model and refiner differ in their latents"),
    "flow of another kind": (lambda: mini("sd3"), {"refiner": lambda: mini("flux-dev")},
        "model and refiner differ in their latents"),
    "refiner that fills": (lambda: mini("flux-dev"), {"refiner": lambda: mini("flux-fill")},
        "this refiner also takes an image"),
    "numbers of flux": (lambda: mini("flux-dev"), {"numbers": {"height": 5}},
        "this family takes no numbers besides the prompt"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "given", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes_are_found_before_anything_is_computed(
    model: Callable[[], models.Model], given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what would be right."""

    def computes(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(nn.Module, "__call__", computes)  # of every network and every layer in it
    settings = {**({} if "image" in given else SMALL), "steps": 3, **given}
    if callable(refiner := given.get("refiner")):
        settings["refiner"] = refiner()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        generate(model(), settings.pop("prompts", "a corgi"), **settings)
    assert "\n" not in str(error.value)


def test_a_schedule_of_its_own_is_no_refiner_s() -> None:
    """Times would mean other levels."""
    refiner = models.build({**mini("sdxl-refiner").spec, "schedule": {"name": "linear"}})
    with pytest.raises(ValueError, match="model and refiner differ in their schedules"):
        generate(mini("sdxl"), "a corgi", refiner=refiner)


def test_lost_weights_make_no_black_images() -> None:
    """The seed and the step are named, and the weight where one is no number."""
    model = models.miniature("sd1")
    first = next(iter(model.network.state_dict()))
    for value, error, message in (
        (1e30, FloatingPointError, "2 of 2 samples are not finite, the first of seed 4, from step 0 on"),
        (
            torch.nan,
            ValueError,
            f"the backbone's weight {first!r} holds values that are not finite: load it again from an "
            "intact file",
        ),
    ):
        with torch.no_grad():
            model.network.state_dict()[first].fill_(value)
        with pytest.raises(error, match=message):
            generate(model, "a corgi", seeds=[4, 5], **SMALL)


def test_pictures_of_it() -> None:
    """samplers.to_pil: one picture per image, rounded to the nearest of 256 values."""
    images = picture(3, n=2)
    pictures = samplers.to_pil(images)
    assert [(p.size, p.mode) for p in pictures] == [((64, 32), "RGB")] * 2
    for image, p in zip(images, pictures, strict=True):
        assert p.tobytes() == (image * 255).round().byte().permute(1, 2, 0).numpy().tobytes()
    assert samplers.to_pil(images[0, :1])[0].mode == "L"
    for wrong in (images[0, 0], images[:, :2], (images * 255).byte()):
        with pytest.raises(ValueError, match="pictures need images"):
            samplers.to_pil(wrong)


@pytest.mark.parametrize(
    ("family", "given", "reads"),
    [
        ("flux-dev", {}, 1),
        ("flux-dev", {"true_cfg": 2.0}, 2),
        ("flux-schnell", {}, 1),
        ("sd3", {}, 2),
        ("sd3", {"guidance": 1.0}, 1),
    ],
)
def test_what_nothing_leads_away_from_is_not_read(family: str, given: dict[str, Any], reads: int) -> None:
    """T5 is the largest part: without classifier-free guidance it reads the prompt alone."""
    model = models.miniature(family)
    calls: list[object] = []
    model.require("text").towers["t5"].register_forward_hook(lambda *call: calls.append(call))
    samplers.generate(model, "a cat", steps=1, **given)
    assert len(calls) == reads


def test_tables_come_home_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded, a part has its own parameters and buffers again afterwards, which moving to a device
    replaces."""
    network = models.miniature("sd3").network
    pack(
        network,
        "blocks.0.image.mlp.0",
        Packed("fp8", torch.zeros(512, 128, dtype=torch.float8_e4m3fn), torch.ones(())),
    )
    home = {name: value.data_ptr() for name, value in (*network.named_parameters(), *network.named_buffers())}

    def moved(*place: object) -> nn.Module:
        return network._apply(torch.clone)

    monkeypatch.setattr(network, "to", moved)
    with on_device(network, torch.device("cpu"), offload=True):
        away = {
            name: value.data_ptr() for name, value in (*network.named_parameters(), *network.named_buffers())
        }
        assert not set(home.values()) & set(away.values())
    assert {
        name: value.data_ptr() for name, value in (*network.named_parameters(), *network.named_buffers())
    } == home


def test_a_dedistilled_flux_is_guided() -> None:
    """By the formula, whatever the scale; its base, [schnell], by none."""
    model, text = mini("flux-dedistilled"), mini("flux-dedistilled").require("text")
    with torch.no_grad():
        condition, null = (text.encode([prompt]).condition for prompt in ("a corgi", "ugly"))
    for scale in (3.5, 2.0):
        by_hand = sample(
            "euler",
            cfg(model, null, scale),
            model.grid(3, (4, 8)),
            shape=(16, 4, 8),
            seeds=[0],
            condition=condition,
        )
        assert torch.equal(
            drawn(model, negative="ugly", guidance=None if scale == 3.5 else scale)[0], by_hand
        )
    with pytest.raises(ValueError, match="true_cfg is for networks that take guidance as an input"):
        drawn(model, true_cfg=2.0)


def test_schnell_is_told_no_guidance() -> None:
    """Its publisher's network takes none, and was distilled to do without the other kind."""
    with pytest.raises(
        ValueError, match=r"FLUX.1 \[schnell\] was distilled to draw without guidance: leave it out"
    ):
        samplers.generate(models.miniature("flux-schnell"), "a cat", steps=1, guidance=3.5)


@pytest.mark.parametrize("family", ["sd-turbo", "sdxl-turbo", "sd3.5-large-turbo", "flux-schnell"])
def test_guidance_0_is_off_where_networks_are_meant_without(family: str) -> None:
    """As their publishers write it: the prompt is followed, as with 1."""
    model = mini(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        zero, one, other = (
            drawn(model, p, guidance=g)[0] for p, g in (("a cat", 0.0), ("a cat", 1.0), ("an owl", 0))
        )
    assert torch.equal(zero, one)
    assert not torch.equal(zero, other)


def test_guidance_0_is_no_prompt_elsewhere() -> None:
    """What the formula says, with a warning: the negative prompt alone is followed."""
    model = mini("sd1")
    with pytest.warns(UserWarning, match="guidance scale 0 does not follow the prompt: 1 is off"):
        zero = drawn(model, guidance=0.0, negative="ugly")[0]
    torch.testing.assert_close(zero, drawn(model, "ugly", guidance=1.0)[0], rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="guidance scale -1 does not follow"):
        drawn(model, guidance=-1.0)
    with pytest.warns(UserWarning, match="guidance scale 0 does not follow"):
        drawn(mini("flux-dev"), true_cfg=0.0)


@pytest.mark.parametrize("family", ["flux-dev", "lcm"])
def test_embedded_guidance_is_not_negative(family: str) -> None:
    with pytest.raises(ValueError, match="distilled for positive guidance: guidance=-1"):
        drawn(mini(family), guidance=-1.0)


# Grids that need something of the model ---------------------------------------------------------------------

AYS = {"sd1": "StableDiffusionSigmas", "sdxl": "StableDiffusionXLSigmas", "sdxl-v": "StableDiffusionXLSigmas"}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_align_your_steps_takes_the_table_of_the_family(family: str) -> None:
    """Wherever a grid is made; where none is published, one has to be named."""
    model, settings = models.published(family), {"spacing": "align_your_steps"}
    makers: list[Callable[[dict[str, Any]], Grid]] = [
        lambda grid: model.grid(10, **grid),
        lambda grid: usage(model, steps=10, grid=grid).levels(model),
        lambda grid: usage(model, steps=10, grid=grid).levels(model, (512, 512)),
    ]
    for make in makers:
        if family in AYS:
            assert [level.ratio for level in make(settings)] == pytest.approx(
                diffusers.schedulers.AysSchedules[AYS[family]], rel=3e-5
            )
        else:
            with pytest.raises(
                ValueError,
                match=r"no table of align_your_steps is published for .*: name one, table=sd1 or sdxl or svd",
            ):
                make(settings)
        if family != "playground-v2.5":
            assert make({**settings, "table": "sd1"})[1].ratio == pytest.approx(6.475, rel=1e-4)


def test_a_model_of_no_family_names_its_table() -> None:
    model = models.build({key: value for key, value in mini().spec.items() if key != "family"}, "meta")
    with pytest.raises(ValueError, match="published for this model: name one"):
        model.grid(10, spacing="align_your_steps")


def test_mu_shift_counts_the_tokens_of_the_model() -> None:
    """Of the size it was trained on where no other is said, and of any number that is."""
    model = mini("flux-dev")
    assert model.shape[1:] == (16, 16)
    grids = {
        64: model.grid(4),
        128: model.grid(4, (32, 16), spacing="mu_shift"),
        9: model.grid(4, spacing="mu_shift", tokens=9),
    }
    for tokens, made in grids.items():
        assert made.levels == time_grid(model.schedule, 4, "mu_shift", tokens=tokens).levels
    assert (
        models.published("flux-dev").grid(4).levels
        == time_grid(model.schedule, 4, "mu_shift", tokens=4096).levels
    )
    line = (256, 0.5, 8192, 0.9)
    other = models.build({**model.spec, "grid": {"spacing": "mu_shift", "line": line}})
    assert (
        other.grid(4, spacing="mu_shift", tokens=9).levels
        == time_grid(model.schedule, 4, "mu_shift", tokens=9, line=line).levels
    )
