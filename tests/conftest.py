"""What the tests of the mathematics share: one schedule of every kind, and every prediction. And what holds
for every test."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion import (
    EDM,
    EPS,
    FLOW,
    X0,
    CosineVP,
    DiscreteVP,
    Prediction,
    RectifiedFlow,
    Schedule,
    Shifted,
    V,
    VarianceExploding,
)
from models.layers import half
from tests.marks import mark

SCHEDULES: dict[str, Schedule] = {
    "scaled_linear": DiscreteVP.scaled_linear(),
    "zero_snr": DiscreteVP.scaled_linear(zero_terminal_snr=True),
    "cosine_vp": CosineVP(),
    "flow": RectifiedFlow(),
    "shifted_flow": Shifted(RectifiedFlow(), 3.0),
    "shifted_vp": Shifted(DiscreteVP.cosine(steps=100), 2.0),
    "ve": VarianceExploding(),
}
# EDM's without its preconditioning, so that oracles are given x_t and t themselves, on every schedule.
PREDICTIONS = {
    each.name: each for each in (EPS, X0, V, FLOW, replace(EDM, input_scale=None, network_time=None))
}


def within(schedule: Schedule, spacing: str) -> dict[str, Any]:
    """The range that a spacing needs on a schedule whose ends it cannot reach: log-spaced ones need a finite
    log-SNR, and a shift to more noise than the noisiest level needs pure noise. And the options by which any
    number of steps fits.
    """
    low = {"t_end": 0.001} if schedule.t_min == 0 and schedule.level(0).sigma == 0 else {}
    if spacing in ("karras", "exponential", "log_snr"):
        return (
            {**low, "t_start": 0.999 * schedule.t_max} if schedule.level(schedule.t_max).alpha == 0 else low
        )
    if spacing == "mu_shift" and schedule.level(schedule.t_max).alpha > 0:
        return {"mu": -0.5}
    few_steps: dict[str, dict[str, Any]] = {
        "lcm": {"taught": 1000},
        "turbo": {"stride": 0.0009},
        "align_your_steps": {"table": "sd1"},
    }  # by themselves the first two are for few steps, and the last for one model
    return low if spacing == "leading" else few_steps.get(spacing, {})


@pytest.fixture(params=SCHEDULES.values(), ids=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Runs a test on each schedule."""
    return request.param


@pytest.fixture(params=PREDICTIONS.values(), ids=list(PREDICTIONS))
def prediction(request: pytest.FixtureRequest) -> Prediction:
    """Runs a test on each prediction."""
    return request.param


@pytest.fixture
def native_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision as on a CPU that has instructions for it, whichever this one is."""
    for dtype in half.HALF_DTYPES:
        monkeypatch.setitem(half.NATIVE, dtype, True)


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """As in a terminal, here and in programs that a test starts, also where they are ignored: in background
    jobs, and under nohup."""
    handlers: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    handlers |= {signal.SIGHUP: signal.SIG_DFL} if hasattr(signal, "SIGHUP") else {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
OF_THE_SYSTEM = (
    "a path"  # what processes of one program speak through, such as those that decode images: no network
)


def _host(_: socket.socket, address: Any) -> Any:
    return address[0] if isinstance(address, tuple) else OF_THE_SYSTEM


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """In every test and its fixtures, opening a socket raises. Processes that a test starts are their own."""
    here = THIS_MACHINE if item.get_closest_marker("loopback") else ()

    def only_here(opens: Callable[..., Any], host: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if host(*args, **kwargs) not in (*here, OF_THE_SYSTEM):
                raise AssertionError("a socket was opened")
            return opens(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "bind"):
            patch.setattr(socket.socket, name, only_here(getattr(socket.socket, name), _host))
        patch.setattr(
            socket,
            "create_connection",
            only_here(socket.create_connection, lambda address, *_, **__: address[0]),
        )
        patch.setattr(socket, "getaddrinfo", only_here(socket.getaddrinfo, lambda host, *_, **__: host))
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu are skipped where there is none, those marked slow or bench unless asked for; the
    summary says so."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
        pytest.skip("takes minutes and gigabytes: make test-slow")
    if item.get_closest_marker("bench") and "bench" not in item.config.option.markexpr:
        pytest.skip("times us and our peers: make test-slow")
