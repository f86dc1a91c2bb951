"""A compiled network is not slowed by solvers: no graph break, and one compilation for all steps, levels and
solvers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from diffusion import (
    ClassifierFreeGuidance,
    Clipped,
    Condition,
    Denoiser,
    DiscreteVP,
    RectifiedFlow,
    Schedule,
    V,
    initial_noise,
    time_grid,
)
from models.layers import blocks
from samplers import generate, sample
from tests.samplers.cases import DISTINCT_SAMPLERS

SHAPE = (2, 4, 4)


class Tiny(nn.Module):
    """Depends on x, on t and on a label."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.classes = nn.Conv2d(2, 2, 3, padding=1), nn.Embedding(4, 2)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.tanh(
            self.mix(x) + self.classes(condition.label)[:, :, None, None] + t.sin()[:, None, None, None]
        )


@pytest.fixture
def strict_compilation() -> Iterator[None]:
    """A second compilation of the same network is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("strict_compilation")
@pytest.mark.parametrize("schedule", [DiscreteVP.scaled_linear(), RectifiedFlow()], ids=["vp", "flow"])
def test_a_compiled_network_is_compiled_once(schedule: Schedule) -> None:
    """Under fullgraph=True and error_on_recompile every solver, guided and clipped, gives what the plain
    network gives."""
    torch.manual_seed(0)
    network = Tiny().eval().requires_grad_(False)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    condition, null = Condition(label=torch.tensor([1, 2])), Condition(label=torch.tensor([0]))
    for name in DISTINCT_SAMPLERS:
        plain, fast = (
            sample(
                name, Clipped(ClassifierFreeGuidance(Denoiser(f, schedule, V), 2.0, null)),
                time_grid(schedule, 7),
                shape=SHAPE, seeds=[0, 1], condition=condition,
            )
            for f in (network, compiled)
        )  # fmt: skip
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("strict_compilation")
def test_the_test_notices() -> None:
    """A network told its time as a number is compiled anew at every level, which is an error here."""

    def network(x: Tensor, t: float) -> Tensor:
        return x * t

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = initial_noise([0], SHAPE)
    compiled(x, 0.5)
    with pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(x, 0.25)


def test_generate_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, seeds, steps, samplers and sizes are drawn with the graphs of the first call, and come
    out as without them."""
    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "BACKEND", "eager")
    model = models.miniature("sd3.5-medium")
    first = {"steps": 2, "height": 64, "width": 64}
    calls: list[dict[str, Any]] = [
        first,
        {**first, "width": 96, "sampler": "heun", "seeds": [3, 4]},
        {**first, "steps": 3, "guidance": 2.0},
    ]
    graphs = []
    for prompt, call in zip(("a cat", "a longer one, of a dog", "a fox"), calls, strict=True):
        image = generate(model, prompt, compile=True, **call)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch.testing.assert_close(image, generate(model, prompt, **call))
    assert graphs == graphs[:1] * 3
