"""What every network promises: it starts at zero, uses all it has and all it is told, compiles, and refuses the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from models import DiT, DiTParams, UNet, UNetParams
from tests.models.small import ADM, CLASSES, DIT, KINDS, UNET, Kind, randomised

UNCONDITIONAL = {
    "unet": Kind(UNet, UNetParams(**UNET, attention=(0, 0), middle_attention=0), (8, 12)),
    "dit": Kind(DiT, DiTParams(**DIT, num_classes=None), (8, 8)),
}
CLASS_CONDITIONAL = {"unet": Kind(UNet, ADM, (8, 12)), "dit": Kind(DiT, CLASSES, (8, 8))}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fresh_network_outputs_zero(kind: Kind) -> None:
    """Before training the output is exactly zero, whatever the input."""
    x, t, given = kind.inputs()
    assert not kind.fresh()(x, t, **given).any()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradient_reaches_every_parameter(kind: Kind) -> None:
    """No parameter is without influence on the output."""
    network = randomised(kind.fresh())
    x, t, given = kind.inputs()
    network(x, t, **given).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_condition_changes_the_output(kind: Kind) -> None:
    """Time and each condition of one sample change that sample's output, and no other's."""
    network = randomised(kind.fresh())
    x, t, given = kind.inputs()
    with torch.no_grad():
        before = network(x, t, **given)
        for name, value in {"t": t, **given}.items():
            other = torch.cat([value[:1] - 1, value[1:]])
            after = network(x, **{"t": t, **given, name: other})
            assert (after[0] - before[0]).abs().max() > 1e-3, name
            torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_time_factor_brings_t_to_the_range_of_indices(kind: Kind) -> None:
    """A network with time_factor 1000 at t is the one with factor 1 at 1000 t."""
    x, _, given = kind.inputs()
    t = torch.tensor([0.25, 0.5])
    scaled, plain = (randomised(kind.network(replace(kind.params, time_factor=factor))) for factor in (1000.0, 1.0))
    with torch.no_grad():
        torch.testing.assert_close(scaled(x, t, **given), plain(x, 1000 * t, **given), rtol=0, atol=1e-5)
        assert not torch.allclose(scaled(x, t, **given), plain(x, t, **given), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_dropout_is_for_training_only(kind: Kind) -> None:
    """It makes the output random in training mode, and does nothing in evaluation mode."""
    x, t, given = kind.inputs()
    dropping, plain = (randomised(kind.network(replace(kind.params, dropout=rate))) for rate in (0.5, 0.0))
    with torch.no_grad():
        assert torch.equal(dropping(x, t, **given), plain(x, t, **given))
        dropping.train()
        assert not torch.allclose(dropping(x, t, **given), dropping(x, t, **given), atol=1e-3)


def smallest(kind: Kind) -> nn.Module:
    """Every kind of layer once, for tracing takes seconds."""
    if isinstance(kind.params, UNetParams):
        return UNet(replace(kind.params, blocks=1, attention=(0, 0), middle_attention=1))
    return DiT(replace(kind.params, depth=1))


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name != "DiT, variance"], ids=lambda kind: kind.network.__name__)
def test_compiles_as_one_graph_for_all_times(kind: Kind) -> None:
    """torch.compile makes one graph without a break, does not recompile as t changes, and computes the same."""
    torch._dynamo.reset()
    network = randomised(smallest(kind))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x, _, given = kind.inputs()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in (999.0, 875.5, 750.0, 500.0, 333.3, 250.0, 125.0, 10.0, 1.0, 0.0):
            level = torch.tensor(t).expand(2)
            torch.testing.assert_close(compiled(x, level, **given), network(x, level, **given))


@pytest.mark.parametrize("name", ["label", "context", "vector", "guidance"])
@pytest.mark.parametrize("kind", UNCONDITIONAL.values(), ids=UNCONDITIONAL)
def test_refuses_a_condition_it_has_no_use_for(kind: Kind, name: str) -> None:
    """A condition that would be ignored raises, and the error names it."""
    x, t, _ = kind.inputs()
    with pytest.raises(ValueError, match=f"has no use for the condition '{name}'; it takes: none"):
        kind.fresh()(x, t, **{name: torch.zeros(2, dtype=torch.long)})


@pytest.mark.parametrize(("kind", "name"), [(name, condition) for name, kind in KINDS.items() for condition in kind.inputs()[2]])
def test_refuses_to_do_without_a_condition(kind: str, name: str) -> None:
    """A missing condition raises, and the error names it."""
    x, t, given = KINDS[kind].inputs()
    del given[name]
    with pytest.raises(ValueError, match=f"needs the condition '{name}'"):
        KINDS[kind].fresh()(x, t, **given)


@pytest.mark.parametrize("label", [-1, 11])
@pytest.mark.parametrize("kind", CLASS_CONDITIONAL.values(), ids=CLASS_CONDITIONAL)
def test_refuses_labels_out_of_range(kind: Kind, label: int) -> None:
    """Classes are 0 to 9 and the null label is 10; any other label raises."""
    x, t, _ = kind.inputs()
    with pytest.raises(ValueError, match=f"label {label} is out of range"):
        kind.fresh()(x, t, label=torch.tensor([0, label]))
