"""Prompts to the conditions of a batch: what each family's network is told, in its own dtype, and how often
towers are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from diffusion import FLOW, RectifiedFlow
from models import CLIPTextParams, Model, T5Params, T5Tokenizer, TextEncoder, TextParams
from samplers.prompting import Prompts, encode_prompts
from tests.models.small import randomised
from tests.models.text_peers import spiece, text_of

L = CLIPTextParams(width=32, layers=2, heads=2)
G = replace(L, width=40, activation="gelu", projection=24)
X = T5Params(vocab=250, width=96, layers=1, heads=2, head_dim=32, hidden=64)
SHORT = {"t5": {"length": 24}}
JOINT = {
    "flux": text_of("flux-dev", SHORT, clip_l=L, t5=X),
    "sd3": text_of("sd3", SHORT, clip_l=L, clip_g=G, t5=X),
    "sd3 without T5": replace(text_of("sd3", clip_l=L, clip_g=G), zeros=24, width=96),
}
LONG = "two cats, " * 60


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def model(params: TextParams, folder: Path) -> Model:
    """Text towers beside a network of another dtype."""
    text = cast(TextEncoder, randomised(TextEncoder(params)))
    if "t5" in params.readers:
        (folder / "spiece.model").write_bytes(spiece())
        text.tokenizers["t5"] = T5Tokenizer.open(folder / "spiece.model")
    return Model(nn.Linear(2, 2).to(torch.bfloat16), RectifiedFlow(), FLOW, text=text)


@pytest.mark.parametrize("name", JOINT)
def test_conditions_of_families_that_read_text_beside_the_image(name: str, tmp_path: Path) -> None:
    """One length for all prompts, none repeated; negative prompts and none; each as the text encoder has it,
    in the network's dtype."""
    made = model(JOINT[name], tmp_path)
    texts, negative = ("a cat", LONG, "a cat"), ("dog", None, None)
    assert made.text is not None
    for prompts in (Prompts(texts, negative, (0, 1, 2)), Prompts(texts, negative, (0, 1, 2), long="cut")):
        found = encode_prompts(made, prompts, {})
        empty = made.text.null(1)
        expected = {
            "cond": [made.text.encode([prompt]).condition for prompt in texts],
            "null": [
                empty if prompt is None else made.text.encode([prompt]).condition for prompt in negative
            ],
        }
        for side, given in (("cond", found.condition.tensors), ("null", found.null.tensors)):
            assert given["context"].shape == (3, JOINT[name].rows, 96)
            for part in ("context", "vector"):
                assert given[part].dtype == torch.bfloat16
                assert torch.equal(
                    given[part], torch.cat([row.tensors[part] for row in expected[side]]).bfloat16()
                )
        assert found.dropped == made.text.encode([LONG]).dropped != ("",)


def test_no_prompt_is_read_twice(tmp_path: Path) -> None:
    """A T5 is large: prompts that stand there twice are read once, and so is the empty one beside all without
    a negative prompt."""
    made = model(JOINT["flux"], tmp_path)
    assert made.text is not None
    calls: list[int] = []
    made.text.towers["t5"].register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    encode_prompts(made, Prompts.build(["a cat", "a dog", "a cat"], None, None), {})
    assert calls == [1, 1, 1]
    assert not encode_prompts(made, Prompts.build("a cat", None, None), {}, away=False).null
    assert calls == [1, 1, 1, 1]


def test_what_is_left_out_of_either_prompt_is_said_once(tmp_path: Path) -> None:
    """In the order of the images, a prompt before its negative one; nothing for what is read whole."""
    made = model(text_of("sd1", clip_l=L), tmp_path)
    told = Prompts((LONG, "a cat", LONG), ("a dog", "red " * 80, None), (0, 1, 2), long="cut")
    assert encode_prompts(made, told, {}).dropped == (" ".join(["two cats ,"] * 35), " ".join(["red"] * 5))
    assert encode_prompts(made, Prompts.build([LONG], None, None), {}).dropped == ()
