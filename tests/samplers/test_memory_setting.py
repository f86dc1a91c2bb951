"""`memory=6GB` on the command line: the same images, with or without, whatever else is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from configs import compose
from models.layers import streaming
from samplers.modes import draw_config
from samplers.pictures import read_settings
from samplers.results import Outcome
from samplers.text_to_image import TextToImageParams

SMALL: dict[str, Any] = {
    "prompt": "a corgi",
    "height": 64,
    "width": 64,
    "steps": 1,
    "device": "cpu",
    "progress": False,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    model = models.miniature("flux-dev")
    model.network.to(torch.bfloat16)
    models.save(model, folder, layout="separate")
    return [str(path) for path in sorted(folder.iterdir()) if "preview" not in path.name]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results go where the program is called, and budgets are as in a process that takes no memory itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, "resident_bytes", lambda: 0)


@pytest.fixture
def least(weights: list[str]) -> str:
    """The smallest budget that there is."""
    with pytest.raises(ValueError, match="at least") as refused:
        models.load(*weights, memory=1)
    return str(refused.value).split()[-1]


def run(**settings: Any) -> tuple[Outcome, str]:
    return draw_config(SMALL | settings)


@pytest.mark.parametrize("dtype", [None, "fp32", {"backbone": "fp32", "text": "bf16"}])
def test_the_same_image_with_little_memory(dtype: Any, weights: list[str], least: str) -> None:
    """And drawn again from what it says of itself, either way. The budget is nothing that an image, or its
    folder's name, speaks of."""
    assert models.layers.streaming.is_streamed(models.load(*weights, memory=least).network)
    (out, [free]), _ = run(weights=weights, dtype=dtype)
    (small, [streamed]), _ = run(weights=weights, dtype=dtype, memory=least, out="small")
    assert (
        streamed.read_bytes() == free.read_bytes()
        or read_settings(streamed).keys() == read_settings(free).keys()
    )
    assert "memory" not in read_settings(streamed)
    for image, memory in ((free, least), (streamed, None), (streamed, least)):
        _, said = draw_config({"from": str(image), "memory": memory, "progress": False})
        assert said == f"the same as {image}, to the last bit"
    assert run(weights=weights, dtype=dtype, memory=least, seed=1)[0].out == out
    assert small == Path("small")


def test_as_it_is_typed(weights: list[str], least: str) -> None:
    """A size with a unit, or a number of bytes; of a prompt's model only, and said where there is too
    little."""
    given = [f"weights=[{','.join(weights)}]", *(f"{name}={value}" for name, value in SMALL.items())]
    assert draw_config(compose("samplers", [*given, f"memory={least}"]))[0].images
    assert TextToImageParams(weights="a", prompt="b").memory is None
    with pytest.raises(ValueError, match=r"^memory='1MB' is too little for this model: give at least \d+MB"):
        draw_config(compose("samplers", [*given, "memory=1MB"]))
    with pytest.raises(ValueError, match=r"^memory=2000000 is too little"):
        draw_config(compose("samplers", [*given, "memory=2000000"]))
    with pytest.raises(ValueError, match=r"^memory is a size like '6GB' or '800MB', not 'six'"):
        draw_config(compose("samplers", [*given, "memory=six"]))
    with pytest.raises(ValueError, match=r"memory goes with weights=FILE"):
        draw_config({"run": "runs/a", "memory": "6GB"})
