"""The average of the weights: its closed form, its loan to a network, and its continuation."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from models import EMA


class Net(nn.Module):
    """Two parameters and a buffer."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(3, generator=generator).to(dtype))
        self.register_buffer("count", torch.tensor(seed))


def weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the network holds."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def trained(ema: EMA, steps: range) -> EMA:
    """The average after the weights of Net(step) for each step."""
    for step in steps:
        ema.update(Net(step))
    return ema


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("updates", [1, 2, 9, 30])
def test_average_has_its_closed_form(updates: int, decay: float) -> None:
    """After n updates the average is sum_k (1 - d_k) prod_{j>k} d_j w_k, with d_k = min(decay, (1+k)/(10+k))
    and d_0 = 0."""
    ema = trained(EMA(Net(0), decay), range(1, updates + 1))
    d = [0.0, *(min(decay, (1 + k) / (10 + k)) for k in range(1, updates + 1))]
    share = [(1 - d[k]) * math.prod(d[k + 1 :]) for k in range(updates + 1)]
    for name, average in ema.average.items():
        expected = sum(s * Net(k).state_dict()[name].double() for k, s in enumerate(share))
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
    assert ema.updates == updates


def test_average_is_float32_for_a_half_precision_network() -> None:
    """Steps too small for bfloat16 add up in the average."""
    network = Net(0, torch.bfloat16)
    ema = EMA(network, 0.9999)
    before = weights(network)
    for _ in range(50):
        with torch.no_grad():
            network.weight.copy_(before["weight"] + 1)
        ema.update(network)
    assert ema.average["weight"].dtype == torch.float32
    share = math.prod((1 + k) / (10 + k) for k in range(1, 51))
    start = before["weight"].float()
    torch.testing.assert_close(
        ema.average["weight"], start * share + (before["weight"] + 1).float() * (1 - share), rtol=0, atol=1e-6
    )


def test_average_is_not_the_network() -> None:
    """Training on in place leaves the average alone, and the average never joins the graph."""
    network = Net(0)
    ema = EMA(network)
    with torch.no_grad():
        network.weight.zero_()
    assert torch.equal(ema.average["weight"], Net(0).weight)
    ema.update(network)
    assert not any(value.requires_grad for value in ema.average.values())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_return_bitwise(dtype: torch.dtype, error: type[BaseException] | None) -> None:
    """Within `applied_to` the network holds the average; afterwards its own weights, bit for bit, whatever
    happened inside."""
    network = Net(5, dtype)
    ema = trained(EMA(Net(0)), range(1, 4))
    before = weights(network)
    with suppress(RuntimeError, KeyboardInterrupt), ema.applied_to(network) as inside:
        assert inside is network
        assert all(torch.equal(p, ema.average[name].to(dtype)) for name, p in network.named_parameters())
        assert not torch.equal(network.weight, before["weight"])
        if error is not None:
            raise error
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_error_inside_is_not_swallowed() -> None:
    """`applied_to` hands on what its body raises."""
    with pytest.raises(RuntimeError, match="inside"), EMA(Net(0)).applied_to(Net(1)):
        raise RuntimeError("inside")


def test_copy_to_overwrites_the_parameters_only() -> None:
    """`copy_to` gives the network the average and leaves its buffers as they are."""
    network, ema = Net(5), EMA(Net(0))
    ema.copy_to(network)
    assert torch.equal(network.weight, Net(0).weight)
    assert torch.equal(network.bias, Net(0).bias)
    assert network.count == 5


def test_loaded_average_continues_bitwise() -> None:
    """A run that stops, saves, loads and goes on has the average of one that never stopped."""
    whole = trained(EMA(Net(0)), range(1, 9))
    half = trained(EMA(Net(0)), range(1, 4))
    resumed = EMA(Net(7))
    resumed.load({name: value.clone() for name, value in half.average.items()}, half.updates)
    trained(resumed, range(4, 9))
    assert resumed.updates == whole.updates
    assert all(torch.equal(resumed.average[name], value) for name, value in whole.average.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_refuses_a_decay_out_of_range(decay: float) -> None:
    """A decay of 1 would never learn; one below 0 or not a number means nothing."""
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        EMA(Net(0), decay)
