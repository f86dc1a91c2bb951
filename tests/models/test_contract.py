"""What every network promises: it starts at zero, uses all it has and all it is told, compiles, and refuses
the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion import Condition
from diffusion.condition import RANKS
from models import SD3, DiT, DiTParams, UNet, UNetParams
from models.layers.conditioning import TimeEmbedding
from models.networks.flux import TrunkParams
from tests.models.small import ADM, CLASSES, DIT, KINDS, UNET, Kind, randomised

UNCONDITIONAL = {
    "unet": Kind(UNet, UNetParams(**UNET, attention=(0, 0), middle_attention=0), (8, 12)),
    "dit": Kind(DiT, DiTParams(**DIT, num_classes=None), (8, 8)),
}
CLASS_CONDITIONAL = {"unet": Kind(UNet, ADM, (8, 12)), "dit": Kind(DiT, CLASSES, (8, 8))}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fresh_network_outputs_zero(kind: Kind) -> None:
    """Before training the output is exactly zero, whatever the input."""
    x, t, condition = kind.inputs()
    assert not kind.fresh()(x, t, condition).any()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradient_reaches_every_parameter(kind: Kind) -> None:
    """No parameter is without influence on the output, but one that published files hold: SD 3's last text
    tokens ask nothing."""
    network = randomised(kind.fresh())
    x, t, condition = kind.inputs()
    network(x, t, condition).square().sum().backward()
    idle = ["blocks.1.text.attention.norm_q.weight"] if kind.network is SD3 and kind.params.qk_norm else []
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == idle


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_condition_changes_the_output(kind: Kind) -> None:
    """Time and each condition of one sample change that sample's output, and no other's."""
    network = randomised(kind.fresh())
    x, t, condition = kind.inputs()
    with torch.no_grad():
        before = network(x, t, condition)
        for name, value in {"t": t, **condition.tensors}.items():
            other = torch.cat([value[:1] - 1, value[1:]])
            after = (
                network(x, other, condition)
                if name == "t"
                else network(x, t, replace(condition, **{name: other}))
            )
            assert (after[0] - before[0]).abs().max() > 1e-3, name
            torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [KINDS[name] for name in KINDS if name != "Chroma"],
    ids=[name for name in KINDS if name != "Chroma"],
)
def test_time_factor_brings_t_to_the_range_of_indices(kind: Kind) -> None:
    """A network for t in [0, 1], by its time_factor 1000 or by its kind, is at t the one with factor 1 at
    1000 t."""
    x, _, condition = kind.inputs()
    t = torch.tensor([0.25, 0.5])
    params = replace(kind.params, time_factor=1000.0) if hasattr(kind.params, "time_factor") else kind.params
    scaled, plain = (randomised(kind.network(params)) for _ in range(2))
    time = plain.get_submodule("time")
    assert isinstance(time, TimeEmbedding)
    time.factor = 1.0
    with torch.no_grad():
        torch.testing.assert_close(scaled(x, t, condition), plain(x, 1000 * t, condition), rtol=0, atol=1e-5)
        assert not torch.allclose(scaled(x, t, condition), plain(x, t, condition), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_dropout_is_for_training_only(kind: Kind) -> None:
    """It makes the output random in training mode, and does nothing in evaluation mode; without it both modes
    compute the same."""
    x, t, condition = kind.inputs()
    plain = randomised(kind.fresh())
    with torch.no_grad():
        expected = plain(x, t, condition)
        assert torch.equal(plain.train()(x, t, condition), expected)
        if hasattr(kind.params, "dropout"):
            dropping = randomised(kind.network(replace(kind.params, dropout=0.5)))
            assert torch.equal(dropping(x, t, condition), expected)
            dropping.train()
            assert not torch.allclose(dropping(x, t, condition), dropping(x, t, condition), atol=1e-3)


def smallest(kind: Kind) -> nn.Module:
    """Every kind of layer once, for tracing takes seconds."""
    if isinstance(kind.params, UNetParams):
        return UNet(replace(kind.params, blocks=1, attention=(0, 0), middle_attention=1))
    if isinstance(kind.params, TrunkParams):
        return kind.network(replace(kind.params, depth=1, depth_single=1))
    return kind.network(replace(kind.params, depth=1)) if kind.network is DiT else kind.fresh()


COMPILED = ["UNet, SDXL", "UNet, ADM", "UNet, LCM", "DiT, text", "Flux, dev", "Chroma", "SD 3, 3.5 medium"]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if name in COMPILED else pytest.mark.slow, id=name)
        for name, kind in KINDS.items()
    ],
)
def test_compiles_as_one_graph_for_all_times(kind: Kind) -> None:
    """torch.compile makes one graph without a break, does not recompile as t and guidance change, and
    computes the same, at odd sizes too; a batch equals its samples alone.

    Kinds that have no layer of their own are left to the slow tests.
    """
    torch._dynamo.reset()
    network = randomised(smallest(kind))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x, t, condition = replace(kind, size=kind.size if kind.network is DiT else (7, 9)).inputs()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for part in (0.999, 0.8755, 0.75, 0.5, 0.3333, 0.25, 0.125, 0.01, 0.001, 0.0):
            level = (part if t.max() < 1 else 1000 * part) * torch.ones(2)
            if condition.guidance is not None:
                condition = replace(condition, guidance=10 * part * torch.ones(2))
            out = network(x, level, condition)
            torch.testing.assert_close(compiled(x, level, condition), out)
        assert out.shape[2:] == x.shape[2:]
        torch.testing.assert_close(network(x[:1], level[:1], condition[:1]), out[:1], rtol=0, atol=1e-5)


READERS = {name: kind for name, kind in KINDS.items() if "context" in kind.params.takes}


@pytest.mark.parametrize("kind", READERS.values(), ids=READERS)
def test_contexts_of_two_lengths_in_one_batch(kind: Kind) -> None:
    """Filled up and masked, each sample is what it is alone; without the mask the longer context would be
    another one."""
    network = randomised(kind.fresh())
    x, t, condition = kind.inputs()
    short = replace(condition, context=condition.tensors["context"][:, :2])
    both = Condition.cat([condition[:1], short[1:]])
    with torch.no_grad():
        out = network(x, t, both)
        alone = torch.cat([network(x[:1], t[:1], condition[:1]), network(x[1:], t[1:], short[1:])])
        unmasked = network(x, t, replace(both, mask=None))
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-5)
    assert (unmasked[1] - alone[1]).abs().max() > 1e-3


USELESS = [
    (kind, name)
    for kind in [*UNCONDITIONAL.values(), *KINDS.values()]
    for name in ("label", "context", "vector", "guidance")
    if name not in kind.params.takes
]


@pytest.mark.parametrize(("kind", "name"), USELESS)
def test_refuses_a_condition_it_has_no_use_for(kind: Kind, name: str) -> None:
    """A condition that would be ignored raises, and the error names it and those that are taken."""
    x, t, condition = kind.inputs()
    useless = torch.zeros(2, *[1] * (RANKS[name] - 1), dtype=torch.long if name == "label" else None)
    with pytest.raises(
        ValueError,
        match=f"does not take the condition '{name}'; it takes: {', '.join(kind.params.takes) or 'none'}",
    ):
        kind.fresh()(x, t, replace(condition, **{name: useless}))


@pytest.mark.parametrize(
    ("kind", "name"), [(name, condition) for name, kind in KINDS.items() for condition in kind.params.takes]
)
def test_refuses_to_do_without_a_condition(kind: str, name: str) -> None:
    """A missing condition raises, and the error names it."""
    x, t, condition = KINDS[kind].inputs()
    condition = replace(condition, **{name: None})
    with pytest.raises(ValueError, match=f"needs the condition '{name}'"):
        KINDS[kind].fresh()(x, t, condition)


@pytest.mark.parametrize("label", [-1, 11])
@pytest.mark.parametrize("kind", CLASS_CONDITIONAL.values(), ids=CLASS_CONDITIONAL)
def test_refuses_labels_out_of_range(kind: Kind, label: int) -> None:
    """Classes are 0 to 9 and the null label is 10; any other label raises."""
    x, t, _ = kind.inputs()
    with pytest.raises(ValueError, match=f"label {label} is out of range"):
        kind.fresh()(x, t, Condition(label=torch.tensor([0, label])))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_checkpointing_changes_memory_only(kind: Kind) -> None:
    """The same output and gradients, dropout included, from half of what the graph keeps otherwise; two
    thirds in two small blocks."""
    params = replace(kind.params, dropout=0.1) if hasattr(kind.params, "dropout") else kind.params
    network: Any = randomised(kind.network(params)).train()
    x, t, condition = replace(kind, size=(16, 16) if kind.network is UNet else kind.size).inputs()
    results: list[tuple[list[Tensor | None], int]] = []
    for checkpointing in (False, True):
        network.checkpointing = checkpointing
        kept: dict[int, int] = {}

        def keep(saved: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            out = network(x, t, condition)
        weights = sum(kept.pop(p.untyped_storage().data_ptr(), 0) for p in network.parameters())
        assert weights > 0
        results.append(
            (
                [
                    out,
                    *torch.autograd.grad(out.square().sum(), list(network.parameters()), allow_unused=True),
                ],
                sum(kept.values()),
            )
        )
    (plain, whole), (again, part) = results
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)  # a last stream's queries
        if a is None or b is None:
            continue
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.detach().abs().max()))
    assert part < whole * (1 / 2 if kind.network is UNet else 2 / 3)
