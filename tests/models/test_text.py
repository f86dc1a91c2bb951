"""Text encoders: contexts and vectors of every family as reference pipelines make them; long and weighted
prompts; no prompt at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from diffusion import Condition
from models.layers.conditioning import sinusoid
from models.networks.clip import CLIP_G, CLIP_H, CLIP_L, CLIPText, CLIPTextParams
from models.networks.t5 import T5, T5_XXL, T5Params
from models.text.clip import CLIPReader
from models.text.clip_tokenizer import BOS, EOS, detokenize, tokenize
from models.text.encoder import TextEncoder
from models.text.recipes import TextParams
from models.text.t5 import T5Reader
from models.text.t5_tokenizer import T5Tokenizer
from tests.models.small import randomised, relative_error
from tests.models.text_peers import (
    in_open_clip,
    in_transformers,
    padded,
    t5_in_folder,
    t5_in_transformers,
    text_of,
    transformers_tokenizer,
)
from tests.peers import diffusers, open_clip

L = CLIPTextParams(width=32, layers=3, heads=4)
G = CLIPTextParams(width=40, layers=4, heads=5, activation="gelu", projection=24)
H = CLIPTextParams(width=48, layers=3, heads=3, activation="gelu", projection=16)
X = T5Params(vocab=250, width=96, layers=2, heads=2, head_dim=32, hidden=64)
FAMILIES: dict[str, TextParams] = {
    "sd1": text_of("sd1", clip_l=L),
    "sd2": text_of("sd2", clip_h=H),
    "sdxl": text_of("sdxl", clip_l=L, clip_g=G),
    "refiner": text_of("sdxl-refiner", clip_g=G),
}

PROJECTED: dict[str, Any] = {"clip_l": {"projected": True}}
SIZES: dict[str, Any] = dict(height=768, width=1024, top=0, left=128)
TARGET: dict[str, Any] = dict(target_height=512, target_width=640)
NUMBERS: dict[str, Any] = {
    "sd1": None,
    "sd2": None,
    "sdxl": {**SIZES, **TARGET},
    "refiner": {**SIZES, "score": 6.0},
}

PROMPTS = ["a photo of an astronaut riding a horse on mars", "", "two cats, 35mm; " * 12]
NEGATIVES = ["blurry, low quality", "text", "watermark " * 80]
LONG = " ".join(f"word{i}" for i in range(60))  # 60 words of at least two tokens
BOUND = 1e-5


def encoder(params: TextParams) -> TextEncoder:
    with torch.device("meta"):
        made = TextEncoder(params)
    return cast(TextEncoder, randomised(made.to_empty(device="cpu")))


class Read(NamedTuple):
    """What is read of prompts; no context or vector is an error where it is asked for."""

    condition: Condition
    dropped: tuple[str, ...] = ()

    @property
    def context(self) -> Tensor:
        return self.condition.tensors["context"]

    @property
    def vector(self) -> Tensor:
        return self.condition.tensors["vector"]


def encode(text: TextEncoder, prompts: Sequence[str], **how: Any) -> Read:
    return Read(*text.encode(prompts, **how))


def null_of(text: TextEncoder, n: int, *, like: Read | None = None, **how: Any) -> Read:
    return Read(text.null(n, like=None if like is None else like.condition, **how))


@pytest.fixture(scope="module")
def encoders() -> dict[str, TextEncoder]:
    """One of every family with random weights, which no test changes."""
    return {name: encoder(params) for name, params in FAMILIES.items()}


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=FAMILIES)
def family(
    request: pytest.FixtureRequest, encoders: dict[str, TextEncoder]
) -> tuple[TextEncoder, Callable[..., Read]]:
    """An encoder, and its `encode` with the numbers it needs."""
    text, numbers = encoders[request.param], NUMBERS[request.param]
    return text, lambda prompts, **options: encode(text, prompts, numbers=numbers, **options)


def tower(text: TextEncoder, name: str) -> CLIPText:
    return cast(CLIPText, text.towers[name])


def close(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= BOUND


# ---- what reference pipelines compute


def aug_input(time_ids: list[list[float]], pooled: Tensor) -> Tensor:
    """What diffusers' SDXL UNet feeds its vector embedding: pooled text and the numbers' sinusoids."""
    time_ids_ = torch.tensor(time_ids)
    size = pooled.shape[1] + 256 * time_ids_.shape[1]
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4,),
        norm_num_groups=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        mid_block_type=None,
        cross_attention_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=size,
    )
    seen: list[Tensor] = []
    unet.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    unet.get_aug_embed(pooled, pooled, {"text_embeds": pooled, "time_ids": time_ids_})
    return seen[0]


def test_sd1_equals_diffusers(encoders: dict[str, TextEncoder]) -> None:
    """Context of prompts and negative prompts, cut at 77 tokens; and of no negative prompt."""
    text = encoders["sd1"]
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=in_transformers(tower(text, "clip_l"), eos_token_id=2),
        tokenizer=transformers_tokenizer(),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
    ours = encode(text, PROMPTS, long="cut")
    close(ours.context, positive)
    assert ours.condition.vector is None
    close(encode(text, NEGATIVES, long="cut").context, negative)
    _, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    close(null_of(text, 3, like=ours).context, negative)


@pytest.mark.parametrize("layers", [24, 23])
def test_sd2_reads_the_state_after_23_blocks(layers: int) -> None:
    """SD2's context is what its original code takes from open_clip: all blocks but the last, then the final
    norm; padded with 0.

    Published files hold OpenCLIP-H's 24 blocks, or (diffusers) the 23 that matter; both give the same.
    """
    narrow = replace(CLIP_H, width=48, heads=3, projection=16)
    whole = encoder(text_of("sd2", clip_h=narrow))
    peer = in_open_clip(tower(whole, "clip_h"))
    x = peer.token_embedding(padded(PROMPTS)) + peer.positional_embedding
    for block in peer.transformer.resblocks[:-1]:
        x = block(x, attn_mask=peer.attn_mask)
    expected = peer.ln_final(x)

    held = replace(narrow, layers=layers, projection=None if layers == 23 else 16)
    params = text_of("sd2", {"clip_h": {"skip": layers - 23}}, clip_h=held)
    ours = TextEncoder(params)
    ours.load_state_dict({name: whole.state_dict()[name] for name in ours.state_dict()})
    close(encode(ours, PROMPTS, long="cut").context, expected)
    assert (
        relative_error(
            encode(ours, PROMPTS, long="cut").context, peer.ln_final(peer.transformer.resblocks[-1](x))
        )
        > 0.01
    )


def test_sd2_equals_diffusers(encoders: dict[str, TextEncoder]) -> None:
    """The same from a diffusers pipeline, whose tower ends where the context is taken."""
    short = text_of("sd2", {"clip_h": {"skip": 0}}, clip_h=replace(H, layers=2, projection=None))
    text = encoder(short)
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=in_transformers(tower(text, "clip_h")),
        tokenizer=transformers_tokenizer(pad_token="!"),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
    close(encode(text, PROMPTS, long="cut").context, positive)
    close(encode(text, NEGATIVES, long="cut").context, negative)


def test_sdxl_equals_diffusers(encoders: dict[str, TextEncoder]) -> None:
    """Context and vector of prompts and negative prompts, and the zeros for no negative prompt, which keep
    the numbers."""
    text = encoders["sdxl"]
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=in_transformers(tower(text, "clip_l"), eos_token_id=2),
        text_encoder_2=in_transformers(tower(text, "clip_g")),
        tokenizer=transformers_tokenizer(),
        tokenizer_2=transformers_tokenizer(pad_token="!"),
        unet=None,
        scheduler=None,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    time_ids = [[768.0, 1024.0, 0.0, 128.0, 512.0, 640.0]] * 3
    positive, negative, pooled, negative_pooled = pipe.encode_prompt(
        PROMPTS, device="cpu", negative_prompt=NEGATIVES
    )
    ours = encode(text, PROMPTS, numbers=NUMBERS["sdxl"], long="cut")
    close(ours.context, positive)
    close(ours.vector, aug_input(time_ids, pooled))
    other = encode(text, NEGATIVES, numbers=NUMBERS["sdxl"], long="cut")
    close(other.context, negative)
    close(other.vector, aug_input(time_ids, negative_pooled))

    _, negative, _, negative_pooled = pipe.encode_prompt(PROMPTS, device="cpu")
    for null in (null_of(text, 3, like=ours), null_of(text, 3, numbers=NUMBERS["sdxl"])):
        assert not negative.any()
        assert torch.equal(null.context, negative)
        close(null.vector, aug_input(time_ids, negative_pooled))


def test_refiner_equals_diffusers(encoders: dict[str, TextEncoder]) -> None:
    """bigG alone; the score is 6.0 beside prompts and 2.5 beside negative ones; no negative prompt is the
    empty one."""
    text = encoders["refiner"]
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=in_transformers(tower(text, "clip_g")),
        tokenizer=None,
        tokenizer_2=transformers_tokenizer(pad_token="!"),
        unet=None,
        scheduler=None,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    positive, negative, pooled, negative_pooled = pipe.encode_prompt(
        PROMPTS, device="cpu", negative_prompt=NEGATIVES
    )
    ours = encode(text, PROMPTS, numbers={**SIZES, "score": 6.0}, long="cut")
    close(ours.context, positive)
    close(ours.vector, aug_input([[768.0, 1024.0, 0.0, 128.0, 6.0]] * 3, pooled))
    other = encode(text, NEGATIVES, numbers={**SIZES, "score": 2.5}, long="cut")
    close(other.context, negative)
    close(other.vector, aug_input([[768.0, 1024.0, 0.0, 128.0, 2.5]] * 3, negative_pooled))

    _, negative, _, negative_pooled = pipe.encode_prompt(PROMPTS, device="cpu", negative_prompt=None)
    null = null_of(text, 3, numbers={**SIZES, "score": 2.5}, like=ours)
    close(null.context, negative)
    close(null.vector, aug_input([[768.0, 1024.0, 0.0, 128.0, 2.5]] * 3, negative_pooled))


def test_bigg_equals_open_clip(encoders: dict[str, TextEncoder]) -> None:
    """SDXL's original code takes bigG from open_clip: penultimate state without norm, and the pooled
    output."""
    text = encoders["refiner"]
    peer, tokens = in_open_clip(tower(text, "clip_g")), padded(["a cat!", "tom &amp; jerry"])
    ours = encode(text, ["a cat!", "tom &amp; jerry"], numbers=NUMBERS["refiner"])
    states = peer.forward_intermediates(tokens, indices=[2], output_fmt="NLC")["text_intermediates"]
    close(ours.context, states[0])
    close(ours.vector[:, :24], peer(tokens))


@pytest.mark.parametrize(
    ("params", "context", "vector", "blocks", "pads"),
    [
        (text_of("sd1", clip_l=CLIP_L), 768, None, [12], [EOS]),
        (text_of("sd2", clip_h=CLIP_H), 1024, None, [23], [0]),
        (text_of("sdxl", clip_l=CLIP_L, clip_g=CLIP_G), 2048, 2816, [11, 31], [EOS, 0]),
        (text_of("sdxl-refiner", clip_g=CLIP_G), 1280, 2560, [31], [0]),
        (text_of("flux-dev", clip_l=CLIP_L, t5=T5_XXL), 4096, 768, [None], [EOS]),
        (text_of("sd3", clip_l=CLIP_L, clip_g=CLIP_G), 4096, 2048, [11, 31], [EOS, 0]),
        (
            text_of("sd3", PROJECTED, clip_l=replace(CLIP_L, projection=768), clip_g=CLIP_G, t5=T5_XXL),
            4096,
            2048,
            [11, 31],
            [EOS, 0],
        ),
    ],
)
def test_published_sizes(
    params: TextParams, context: int, vector: int | None, blocks: list[int | None], pads: list[int]
) -> None:
    """The presets have the widths that the published UNets take, and read the states that their code
    reads."""
    assert (params.context_dim, params.vector_dim) == (context, vector)
    clips = [reader for reader in params.readers.values() if isinstance(reader, CLIPReader)]
    assert [
        None if reader.skip is None else reader.network.layers - reader.skip for reader in clips
    ] == blocks
    assert [reader.pad for reader in clips] == pads
    assert {reader.rows for reader in clips} == {77}


# ---- prompts longer than a tower reads


def test_chunks_are_the_plain_path_for_short_prompts(family: tuple[TextEncoder, Callable[..., Read]]) -> None:
    """Up to 75 tokens there is one chunk, bitwise the prompt cut at 75, and nothing is dropped."""
    text, encode = family
    full = " ".join(["cat"] * 75)
    for prompts in (["a cat", ""], [full, "a cat"]):
        chunked, cut = encode(prompts), encode(prompts, long="cut")
        assert torch.equal(chunked.context, cut.context)
        assert chunked.context.shape == (2, 77, text.params.context_dim)
        assert (
            (chunked.condition.vector is None)
            == (cut.condition.vector is None)
            == (text.params.vector_dim is None)
        )
        if chunked.condition.vector is not None and cut.condition.vector is not None:
            assert torch.equal(chunked.vector, cut.vector)
        assert chunked.dropped == cut.dropped == ("", "")


def test_a_long_prompt_is_its_chunks_one_after_the_other(
    family: tuple[TextEncoder, Callable[..., Read]],
) -> None:
    """Every 75 tokens are encoded like a prompt of their own; shorter prompts are filled up with empty ones;
    the vector is the first's."""
    _, encode = family
    ids = tokenize(LONG)
    parts = [detokenize(ids[i : i + 75]) for i in range(0, len(ids), 75)]
    assert [i for part in parts for i in tokenize(part)] == ids
    assert len(parts) > 2
    ours = encode([LONG, "a cat"])
    first, *rest = [
        encode([part, prompt]) for part, prompt in zip(parts, ["a cat"] + [""] * len(parts), strict=False)
    ]
    close(ours.context, torch.cat([first.context, *[part.context for part in rest]], dim=1))
    if ours.condition.vector is not None and first.condition.vector is not None:
        close(ours.vector, first.vector)
    assert ours.dropped == ("", "")


def test_chunks_gives_guidance_two_conditions_of_one_length(
    family: tuple[TextEncoder, Callable[..., Read]],
) -> None:
    """With the count of both together, prompts and negative prompts have contexts of equal length; more
    chunks change no first one."""
    text, encode = family
    assert [
        text.count_chunks([prompt]) for prompt in ("", "cat " * 75, "cat " * 76, "cat " * 150, "cat " * 151)
    ] == [1, 1, 2, 2, 3]
    count = text.count_chunks(["a cat", LONG])
    short, long, plain = encode(["a cat"], chunks=count), encode([LONG], chunks=count), encode(["a cat"])
    assert short.context.shape == long.context.shape == (1, 77 * count, text.params.context_dim)
    assert encode([LONG], chunks=1).context.shape == long.context.shape
    close(short.context[:, :77], plain.context)
    if short.condition.vector is not None and plain.condition.vector is not None:
        close(short.vector, plain.vector)


@pytest.mark.parametrize("chunks", [1, 2])
def test_cut_says_what_it_dropped(encoders: dict[str, TextEncoder], chunks: int) -> None:
    """Text beyond the chunks is not encoded, and comes back; the rest is encoded as if there had been no
    more."""
    text, ids = encoders["sd1"], tokenize(LONG)
    cut = encode(text, ["a cat", LONG], long="cut", chunks=chunks)
    assert cut.dropped == ("", detokenize(ids[75 * chunks :]))
    kept = encode(text, ["a cat", detokenize(ids[: 75 * chunks])], chunks=chunks)
    assert torch.equal(cut.context, kept.context)
    assert kept.dropped == ("", "")


# ---- weights


def test_weight_one_changes_nothing(family: tuple[TextEncoder, Callable[..., Read]]) -> None:
    """Bitwise: a weighted prompt without weights, one whose weights are all 1, and one beside a prompt that
    has others."""
    _, encode = family
    plain = encode(["a red cat", "a dog", LONG])
    for weighted in (
        encode(["a red cat", "a dog", LONG], weighted=True),
        encode(["a (red:1.0) cat", "([a]) dog", f"({LONG}:1)"], weighted=True),
    ):
        assert torch.equal(weighted.context, plain.context)
    beside = encode(["a red cat", "a (dog:1.7)", LONG], weighted=True)
    assert torch.equal(beside.context[::2], plain.context[::2])
    assert not torch.equal(beside.context[1], plain.context[1])
    for other in (weighted, beside):
        assert other.condition.vector is None or (
            plain.condition.vector is not None and torch.equal(other.vector, plain.vector)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weight_one_changes_nothing_in_any_dtype(dtype: torch.dtype) -> None:
    """Also where the towers are narrow, and some other row is weighted."""
    text = encoder(FAMILIES["sd1"]).to(dtype)
    plain, weighted = encode(text, ["a red cat"]), encode(text, ["a (red:1.3) cat"], weighted=True)
    assert plain.context.dtype == weighted.context.dtype == dtype
    same = (plain.context == weighted.context).all(dim=-1)[0]
    assert same.tolist() == [i != 2 for i in range(77)]


def test_weights_follow_their_formula(family: tuple[TextEncoder, Callable[..., Read]]) -> None:
    """Row by row empty + weight * (row - empty), in whatever chunk; 0 gives the empty prompt's row; the
    vector does not change."""
    _, encode = family
    words = LONG.split()
    plain, empty = encode([LONG]), encode([""])
    ours = encode(
        [
            f"({' '.join(words[:3])}:0) {' '.join(words[3:50])} [{words[50]}] ({words[51]}:-0.5) "
            f"{' '.join(words[52:])}"
        ],
        weighted=True,
    )
    marks = {range(3): 0.0, range(50, 51): 1 / 1.1, range(51, 52): -0.5}
    weights = [
        next((w for span, w in marks.items() if i in span), 1.0)
        for i, word in enumerate(words)
        for _ in tokenize(word)
    ]
    chunks = plain.context.shape[1] // 77
    weights += [1.0] * (75 * chunks - len(weights))
    rows = torch.cat([torch.tensor([1.0, *weights[i : i + 75], 1.0]) for i in range(0, len(weights), 75)])[
        :, None
    ]
    base = empty.context.repeat(1, chunks, 1)
    close(ours.context, base + rows * (plain.context - base))
    assert torch.equal(
        ours.context[:, 1 : 1 + sum(w == 0 for w in weights)], base[:, 1 : 1 + sum(w == 0 for w in weights)]
    )
    assert ours.condition.vector is None or (
        plain.condition.vector is not None and torch.equal(ours.vector, plain.vector)
    )


def test_brackets_are_text_unless_weights_are_asked_for(encoders: dict[str, TextEncoder]) -> None:
    """Without `weighted` a prompt is read as it stands; with it, brackets do not count against the length."""
    text, prompt = encoders["sd1"], "(cat:1.5) " * 30
    assert text.count_chunks([prompt]) == 3
    assert text.count_chunks([prompt], weighted=True) == 1
    assert encode(text, [prompt], weighted=True).context.shape[1] == 77
    assert not torch.equal(encode(text, ["(cat)"]).context, encode(text, ["cat"]).context)


# ---- no prompt


def test_null_goes_with_a_condition(family: tuple[TextEncoder, Callable[..., Read]]) -> None:
    """As long as the condition it is made for, its numbers kept: zeros, or the empty prompt, as the family
    has it."""
    text, encode = family
    p = text.params
    like = encode([LONG, "a cat"])
    null = null_of(text, 2, like=like)
    expected = encode(["", ""], chunks=like.context.shape[1] // 77)
    numbers = dict.fromkeys(p.numbers, 1.0)
    assert torch.equal(
        null_of(text, 2, numbers=numbers, chunks=like.context.shape[1] // 77).context, null.context
    )
    if p.null == "zeros":
        assert null.context.shape == like.context.shape
        assert not null.context.any()
    else:
        close(null.context, expected.context)
    if null.condition.vector is None:
        assert p.vector_dim is None
        return
    assert torch.equal(null.vector[:, p.pooled_dim :], like.vector[:, p.pooled_dim :])
    pooled = null.vector[:, : p.pooled_dim]
    close(
        pooled + 1,
        (torch.zeros_like(pooled) if p.null == "zeros" else expected.vector[:, : p.pooled_dim]) + 1,
    )


def test_null_refuses_another_batch(encoders: dict[str, TextEncoder]) -> None:
    """A condition of two prompts does not say what three are like; and without a condition the numbers have
    to be given."""
    text = encoders["sdxl"]
    with pytest.raises(ValueError, match="null conditions for 3 prompts cannot be like a condition for 2"):
        null_of(text, 3, like=encode(text, ["a", "b"], numbers=NUMBERS["sdxl"]))
    with pytest.raises(ValueError, match="takes the numbers height, width"):
        null_of(text, 3)


# ---- numbers


def test_numbers_are_one_for_all_or_one_per_prompt(encoders: dict[str, TextEncoder]) -> None:
    """Each is 256 sinusoids behind the pooled text, in the order of `params.numbers`, whatever the order they
    are given in."""
    text = encoders["refiner"]
    scores = [6.0, 2.5]
    ours = encode(text, ["a", "b"], numbers={"score": scores, "left": 4, "top": 3, "width": 2, "height": 1})
    columns = [torch.full((2,), float(i)) for i in (1, 2, 3, 4)] + [torch.tensor(scores)]
    assert torch.equal(ours.vector[:, 24:], torch.cat([sinusoid(column, 256) for column in columns], dim=-1))


def test_numbers_are_exact_beside_towers_in_half_precision() -> None:
    """A size that bfloat16 cannot hold is not rounded before its sinusoids are taken."""
    narrow = encoder(FAMILIES["refiner"]).to(torch.bfloat16)
    ours = encode(narrow, ["a"], numbers={**NUMBERS["refiner"], "height": 1023})
    assert ours.vector.dtype == ours.context.dtype == torch.bfloat16
    assert torch.equal(ours.vector[:, 24 : 24 + 256], sinusoid(torch.tensor([1023.0]), 256).bfloat16())


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        (
            "sdxl",
            None,
            "takes the numbers height, width, top, left, target_height, target_width: give "
            "numbers={'height': ...}",
        ),
        ("sdxl", {**SIZES, "target_height": 512}, "give numbers={'target_width': ...} too"),
        ("sdxl", {**SIZES, **TARGET, "score": 6.0}, "no number named 'score'; known: height"),
        ("sdxl", {**SIZES, **TARGET, "hight": 6.0}, "no number named 'hight'; did you mean 'height'"),
        ("sd1", {"height": 512}, "no number named 'height'; known: none"),
        (
            "refiner",
            {**SIZES, "score": [6.0, 2.5, 1.0]},
            "score has 3 values for 2 prompts: give one, or one per prompt",
        ),
        ("refiner", {**SIZES, "score": "high"}, "score must be a number or a list of numbers, not 'high'"),
        ("refiner", {**SIZES, "score": float("nan")}, "score must be a number"),
    ],
)
def test_refuses_numbers_that_the_family_does_not_take(
    encoders: dict[str, TextEncoder], name: str, numbers: Any, message: str
) -> None:
    """Missing, unknown and unfit numbers raise, and the error says which."""
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        encode(encoders[name], ["a", "b"], numbers=numbers)


# ---- the rest


def test_a_prompt_does_not_depend_on_its_batch(family: tuple[TextEncoder, Callable[..., Read]]) -> None:
    """Each prompt of a batch has the condition that it has alone."""
    _, encode = family
    prompts = ["a cat", "a (dog:1.5) [in] a house", ""]
    together = encode(prompts, weighted=True)
    for i, prompt in enumerate(prompts):
        alone = encode([prompt], weighted=True)
        close(together.context[i : i + 1], alone.context)
        if together.condition.vector is not None and alone.condition.vector is not None:
            close(together.vector[i : i + 1], alone.vector)


def test_towers_of_another_length(encoders: dict[str, TextEncoder]) -> None:
    """Chunks are as long as the towers read: 14 tokens between BOS and EOS for a miniature of 16."""
    text = encoder(text_of("sdxl", clip_l=replace(L, length=16), clip_g=replace(G, length=16)))
    ours = encode(text, ["cat " * 20, "a"], numbers=NUMBERS["sdxl"])
    assert ours.context.shape == (2, 32, 72)
    assert encode(text, ["cat " * 20], numbers=NUMBERS["sdxl"], long="cut").dropped == (
        "cat cat cat cat cat cat",
    )
    tokens = torch.tensor([[BOS, 320, EOS] + [0] * 13])
    close(ours.context[1:, :16, 32:], tower(text, "clip_g")(tokens)[3])
    assert torch.equal(tokens, open_clip.tokenize("a", context_length=16))


@pytest.mark.learns
def test_towers_learn(encoders: dict[str, TextEncoder]) -> None:
    """Conditions carry gradients: text encoders are fine-tuned too. What the family does not read, the last
    block of CLIP-L, gets none."""
    text = encoder(FAMILIES["sdxl"])
    with torch.enable_grad():
        out = encode(text, ["a (cat:1.2)", LONG], numbers=NUMBERS["sdxl"], weighted=True)
        (out.context.square().sum() + out.vector.square().sum()).backward()
    without = {name for name, p in text.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {
        name
        for name, _ in text.named_parameters()
        if name.startswith(("towers.clip_l.blocks.2.", "towers.clip_l.norm."))
    }


@pytest.mark.parametrize(
    "prompt", ["(a:101)", "a [b (c:-1000)]", f"(a:{'9' * 400})", "(" * 50 + "a" + ")" * 50, "((a:99):99)"]
)
def test_refuses_words_that_outweigh_everything(encoders: dict[str, TextEncoder], prompt: str) -> None:
    """One line, which shows the beginning of the prompt. A hundred is allowed, and what is not weighted is
    text."""
    text = encoders["sd1"]
    with pytest.raises(ValueError, match=r"^weights are at most 100, not .* in the prompt '[^\n]*$"):
        encode(text, [prompt], weighted=True)
    assert encode(text, ["(a:100)"], weighted=True).context.isfinite().all()
    encode(text, [prompt], weighted=False)


def test_refuses_prompts_that_are_none(encoders: dict[str, TextEncoder]) -> None:
    """A single text, no prompts, and an unknown way with long ones raise."""
    text = encoders["sd1"]
    for prompts in ("a cat", [7], None):
        with pytest.raises(ValueError, match="prompts must be a list of texts"):
            encode(text, prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"there is no prompt: give at least one, \[''\] for none"):
        encode(text, [])
    with pytest.raises(ValueError, match="no way with long prompts named 'truncate'; known: chunk, cut"):
        encode(text, ["a"], long="truncate")
    with pytest.raises(ValueError, match="chunks must be at least 1, not 0"):
        encode(text, ["a"], long="cut", chunks=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: text_of("sd2", {"clip_h": {"skip": 4}}, clip_h=H),
            "a tower of 3 blocks has no state 4 blocks before its last",
        ),
        (
            lambda: text_of("sd1", {"clip_l": {"tokens": 78}}, clip_l=L),
            "a tower reads 3 to 77 tokens at once, not 78",
        ),
        (
            lambda: text_of("sdxl", clip_l=L, clip_g=replace(G, length=64)),
            r"must read equal numbers of tokens, not \[64, 77\]",
        ),
        (
            lambda: TextParams({"clip_l": CLIPReader(L)}, behind=("clip_g",)),
            "no text encoder named 'clip_g'; did you mean 'clip_l'",
        ),
        (lambda: TextParams({"clip_l": CLIPReader(L, skip=None)}), "no text encoder gives a context"),
        (
            lambda: text_of("sd3", clip_l=L, clip_g=G, t5=replace(X, width=71)),
            "the context has width 72, more than the 71 of the rows behind",
        ),
        (
            lambda: replace(FAMILIES["sdxl"], width=71, zeros=24),
            "the context has width 72, more than the 71 of the rows behind",
        ),
        (
            lambda: text_of("flux-dev", {"t5": {"length": 0}}, clip_l=L, t5=X),
            "length must be 1 to 4096, not 0",
        ),
        (
            lambda: replace(FAMILIES["sd1"], null=cast(Any, "zero")),
            "no rule for null named 'zero'; did you mean 'zeros'",
        ),
    ],
)
def test_refuses_parameters_that_do_not_fit(make: Callable[[], TextParams], message: str) -> None:
    """Parameters that contradict each other raise before there are towers."""
    with pytest.raises(ValueError, match=message):
        make()


# ---- families that attend to text and image together


LP = replace(L, projection=20)
SHORT: dict[str, Any] = {"t5": {"length": 24}}
JOINT: dict[str, TextParams] = {
    "flux": text_of("flux-dev", SHORT, clip_l=L, t5=X),
    "sd3": text_of("sd3", PROJECTED | SHORT, clip_l=LP, clip_g=G, t5=X),
    "sd3 without T5": replace(text_of("sd3", PROJECTED, clip_l=LP, clip_g=G), zeros=24, width=96),
}
TOLD = ["a photo of an astronaut riding the horse on mars", "", "two cats, café déjà-vu; " * 30]
NOT_TOLD = ["(x) dog", "red", "don't word1 " * 40]


@pytest.fixture(scope="module")
def t5_peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[T5Tokenizer, Any]:
    """T5's tokenizer, and transformers' on the same file."""
    folder = tmp_path_factory.mktemp("t5")
    peer = t5_in_folder(folder)
    return T5Tokenizer.open(folder / "spiece.model"), peer


@pytest.fixture(scope="module")
def joint(t5_peer: tuple[T5Tokenizer, Any]) -> dict[str, TextEncoder]:
    """One of every family with random weights and T5's tokenizer, which no test changes."""
    made = {name: encoder(params) for name, params in JOINT.items()}
    for text in made.values():
        text.tokenizers["t5"] = t5_peer[0]
    return made


def in_diffusers(text: TextEncoder, tokenizer: Any) -> diffusers.StableDiffusion3Pipeline:
    """The text parts of SD 3's pipeline, on the same weights; its transformer, for the width of the
    context."""
    network = diffusers.SD3Transformer2DModel(
        sample_size=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=1,
        joint_attention_dim=96,
        caption_projection_dim=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=None,
        vae=None,
        text_encoder=in_transformers(tower(text, "clip_l"), eos_token_id=2),
        tokenizer=transformers_tokenizer(),
        text_encoder_2=in_transformers(tower(text, "clip_g")),
        tokenizer_2=transformers_tokenizer(pad_token="!"),
        text_encoder_3=t5_in_transformers(cast(T5, text.towers["t5"])) if "t5" in text.towers else None,
        tokenizer_3=tokenizer,
    )


@pytest.mark.parametrize("name", ["sd3", "sd3 without T5"])
def test_sd3_equals_diffusers(
    joint: dict[str, TextEncoder], t5_peer: tuple[T5Tokenizer, Any], name: str
) -> None:
    """Context and vector of prompts and negative prompts, some too long for CLIP and for T5, and of no
    negative prompt."""
    text, pipe = joint[name], in_diffusers(joint[name], t5_peer[1])

    def peers(negative: list[str] | None) -> Any:
        return pipe.encode_prompt(TOLD, None, None, "cpu", negative_prompt=negative, max_sequence_length=24)

    positive, negative, pooled, negative_pooled = peers(NOT_TOLD)
    ours, other = encode(text, TOLD), encode(text, NOT_TOLD)
    assert ours.context.shape == (3, 77 + 24, 96)
    for mine, context, vector in ((ours, positive, pooled), (other, negative, negative_pooled)):
        close(mine.context, context)
        close(mine.vector, vector)
    _, negative, _, negative_pooled = peers(None)
    null = null_of(text, 3, like=ours)
    close(null.context, negative)
    close(null.vector, negative_pooled)


def test_sd3_without_a_projection_of_clip_l(
    joint: dict[str, TextEncoder], t5_peer: tuple[T5Tokenizer, Any]
) -> None:
    """The original files' vector: diffusers reads them with the identity for the projection that they do not
    hold.

    It is the same for a tower that holds a projection which the family does not use.
    """
    square = replace(L, projection=32)
    with_projection = encoder(text_of("sd3", SHORT, clip_l=square, clip_g=G, t5=X))
    plain = TextEncoder(text_of("sd3", SHORT, clip_l=L, clip_g=G, t5=X))
    plain.load_state_dict({name: with_projection.state_dict()[name] for name in plain.state_dict()})
    same = encoder(text_of("sd3", PROJECTED | SHORT, clip_l=square, clip_g=G, t5=X))
    same.load_state_dict({**with_projection.state_dict(), "towers.clip_l.projection.weight": torch.eye(32)})
    *_, pooled, _ = in_diffusers(same, t5_peer[1]).encode_prompt(
        TOLD, None, None, "cpu", max_sequence_length=24
    )
    for text in (with_projection, plain):
        text.tokenizers["t5"] = t5_peer[0]
        close(encode(text, TOLD).vector, pooled)


def test_flux_equals_diffusers(joint: dict[str, TextEncoder], t5_peer: tuple[T5Tokenizer, Any]) -> None:
    """Context and vector of prompts, of negative prompts, and of the empty one."""
    text = joint["flux"]
    pipe = diffusers.FluxPipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=in_transformers(tower(text, "clip_l"), eos_token_id=2),
        tokenizer=transformers_tokenizer(),
        text_encoder_2=t5_in_transformers(cast(T5, text.towers["t5"])),
        tokenizer_2=t5_peer[1],
    )
    for prompts in (TOLD, NOT_TOLD):
        context, pooled, _ = pipe.encode_prompt(prompts, device="cpu", max_sequence_length=24)
        ours = encode(text, prompts)
        assert ours.context.shape == (3, 24, 96)
        close(ours.context, context)
        close(ours.vector, pooled)
    context, pooled, _ = pipe.encode_prompt(["", "", ""], device="cpu", max_sequence_length=24)
    for null in (null_of(text, 3, like=ours), null_of(text, 3)):
        close(null.context, context)
        close(null.vector, pooled)


@pytest.mark.parametrize("name", JOINT)
def test_a_joint_context_has_one_length(joint: dict[str, TextEncoder], name: str) -> None:
    """Whatever the prompts: long ones are not read in chunks, and what no tower reads comes back."""
    text = joint[name]
    assert not text.params.chunked
    assert text.count_chunks(TOLD) == text.count_chunks([""]) == 1
    ours = encode(text, TOLD)
    assert ours.context.shape[1] == text.params.rows == (24 if name == "flux" else 101)
    cut = encode(text, TOLD, long="cut")
    assert torch.equal(cut.context, ours.context)
    assert cut.dropped == ours.dropped
    assert ours.dropped[1] == ""
    assert ours.dropped[2].endswith("déjà-vu;" if "t5" in text.towers else "déjà - vu ;")
    with pytest.raises(ValueError, match="chunks must be 1 for this family, not 2"):
        encode(text, TOLD, chunks=2)
    with pytest.raises(ValueError, match="chunks must be 1 for this family, not 2"):
        null_of(text, 1, chunks=2)


def test_what_is_dropped_is_behind_what_is_read(joint: dict[str, TextEncoder]) -> None:
    """With T5, what it does not read: its length less one for its EOS; without, what CLIP does not."""
    told = "two cats; " * 20
    for name in ("flux", "sd3"):
        tokenizer = joint[name].tokenizer("t5")
        ids = tokenizer.tokenize(told)
        assert encode(joint[name], [told, "a"]).dropped == (tokenizer.detokenize(ids[23:]), "")
        assert encode(joint[name], [tokenizer.detokenize(ids[:23])]).dropped == ("",)
    dropped = encode(joint["sd3 without T5"], ["word " * 100, "a"]).dropped
    assert dropped == (" ".join(["word"] * 25), "")


@pytest.mark.parametrize("name", JOINT)
def test_joint_weights_follow_their_formula(joint: dict[str, TextEncoder], name: str) -> None:
    """Row by row empty + weight * (row - empty), for CLIP's rows and T5's; weight 1 changes no bit; the
    vector does not change."""
    text = joint[name]
    plain, empty = encode(text, ["two cats, a dog"]), encode(text, [""])
    ours = encode(text, ["(two cats:1.5), [a dog]"], weighted=True)
    assert torch.equal(encode(text, ["(two cats:1.0), (a:1.0) dog"], weighted=True).context, plain.context)

    def behind(words: list[tuple[int, float]], rows: int, begin: int) -> list[float]:
        return [1.0] * begin + [weight for _, weight in words] + [1.0] * (rows - begin - len(words))

    parts = [("two cats", 1.5), (", ", 1.0), ("a dog", 1 / 1.1)]
    weights: list[float] = []
    if name != "flux":
        weights += behind([(token, weight) for piece, weight in parts for token in tokenize(piece)], 77, 1)
    if "t5" in text.towers:
        tokenizer = text.tokenizer("t5")
        ends = tokenizer.tokenize_with_ends("two cats, a dog")
        weights += behind(
            [(token, 1.5 if end <= 8 else 1.0 if end <= 10 else 1 / 1.1) for token, end in ends], 24, 0
        )
    else:
        weights += [1.0] * 24
    assert {1.5, 1 / 1.1} <= set(weights)
    close(ours.context, empty.context + torch.tensor(weights)[:, None] * (plain.context - empty.context))
    assert torch.equal(ours.vector, plain.vector)


def test_t5_reads_words_whole(joint: dict[str, TextEncoder]) -> None:
    """A bracket within or at the end of a word gives T5 the tokens of the text without it; the last letter's
    weight counts."""
    text = joint["flux"]
    plain, empty = encode(text, ["astronaut, cats"]), encode(text, [""])
    end = len(text.tokenizer("t5").tokenize("astronaut"))
    ours = encode(text, ["astro(naut:2), cats"], weighted=True)
    close(ours.context[:, end - 1], (2 * plain.context - empty.context)[:, end - 1])
    assert torch.equal(ours.context[:, end:], plain.context[:, end:])


@pytest.mark.parametrize("name", JOINT)
def test_a_joint_prompt_does_not_depend_on_its_batch(joint: dict[str, TextEncoder], name: str) -> None:
    """Each prompt of a batch has the condition that it has alone."""
    prompts = ["a (cats:1.5) [in] a", "", TOLD[2]]
    together = encode(joint[name], prompts, weighted=True)
    for i, prompt in enumerate(prompts):
        alone = encode(joint[name], [prompt], weighted=True)
        close(together.context[i : i + 1], alone.context)
        close(together.vector[i : i + 1], alone.vector)


def test_towers_of_different_dtypes(joint: dict[str, TextEncoder], t5_peer: tuple[T5Tokenizer, Any]) -> None:
    """T5 may be narrower than CLIP, or CLIP than T5: the context has the widest dtype."""
    text = encoder(JOINT["sd3"])
    text.tokenizers["t5"] = t5_peer[0]
    text.towers["t5"].to(torch.bfloat16)
    ours = encode(text, TOLD[:2])
    assert ours.context.dtype == torch.float32
    assert relative_error(ours.context, encode(joint["sd3"], TOLD[:2]).context) < 0.03
    assert encode(text.to(torch.bfloat16), TOLD[:2]).context.dtype == torch.bfloat16


def test_t5_without_its_tokens_says_what_to_load(t5_peer: tuple[T5Tokenizer, Any]) -> None:
    """One line: which file, who publishes it, how it is given. A vocabulary that is another model's raises
    too."""
    text = encoder(JOINT["flux"])
    message = r"^T5 has no tokenizer: [^\n]*models\.load\(\.\.\., 'spiece\.model'\)"
    message += r"[^\n]*FLUX\.1-schnell[^\n]*$"
    with pytest.raises(ValueError, match=message):
        encode(text, ["a cat"])
    assert text.count_chunks(["a cat"]) == 1
    small = encoder(text_of("flux-dev", SHORT, clip_l=L, t5=replace(X, vocab=100)))
    small.tokenizers["t5"] = t5_peer[0]
    with pytest.raises(ValueError, match=r"the tokenizer of t5 has \d+ tokens, and this tower 100"):
        encode(small, ["a cat"])


def test_padding_is_masked_as_in_chroma(t5_peer: tuple[T5Tokenizer, Any]) -> None:
    """T5 passes over all of it, the network over all but the first row; other families attend to it, and have
    no mask."""
    text = encoder(TextParams({"t5": T5Reader(X, length=24, masked=True)}))
    text.tokenizers["t5"] = t5_peer[0]
    pipe = diffusers.ChromaPipeline(
        None, None, t5_in_transformers(cast(T5, text.towers["t5"])), t5_peer[1], None
    )
    told = [
        *TOLD,
        t5_peer[0].detokenize(t5_peer[0].tokenize(TOLD[2])[:22]),
        t5_peer[0].detokenize(t5_peer[0].tokenize(TOLD[2])[:23]),
    ]
    context, mask = pipe._get_t5_prompt_embeds(told, max_sequence_length=24, device="cpu")
    ours = text.encode(told).condition
    close(ours.context, context)
    assert ours.mask is not None
    assert torch.equal(ours.mask, mask.bool())
    assert [int(row.sum()) for row in ours.mask[1:]] == [2, 24, 24, 24]
    assert torch.equal(text.null(2).tensors["mask"], ours.mask[[1, 1]])


def test_the_tokenizer_is_no_part_of_the_state(joint: dict[str, TextEncoder]) -> None:
    """State dicts hold weights only; T5's are under towers.t5."""
    names = set(joint["flux"].state_dict())
    assert not any("tokenizer" in name for name in names)
    assert {name for name in names if name.startswith("towers.t5.")} == {
        f"towers.t5.{name}" for name in T5(X).state_dict()
    }


@pytest.mark.learns
def test_joint_towers_learn(t5_peer: tuple[T5Tokenizer, Any]) -> None:
    """Conditions carry gradients to T5 and to CLIP's towers; what the family does not read gets none."""
    text = encoder(text_of("sd3", SHORT, clip_l=LP, clip_g=G, t5=X))
    text.tokenizers["t5"] = t5_peer[0]
    with torch.enable_grad():
        out = encode(text, ["a (cats:1.2)"], weighted=True)
        (out.context.square().sum() + out.vector.square().sum()).backward()
    without = {name for name, p in text.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"towers.clip_l.projection.weight"}
