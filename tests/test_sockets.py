"""No test reaches for a network: what conftest.py refuses, and what those marked loopback may do."""

from __future__ import annotations

import socket
from urllib.request import urlopen

import pytest


@pytest.fixture(scope="module")
def reached() -> str:
    """What comes of trying in a fixture that many tests share."""
    try:
        socket.create_connection(("127.0.0.1", 9))
    except (AssertionError, OSError) as error:
        return str(error)
    return "connected"


def test_none_is_opened(reached: str) -> None:
    """By any way, in tests and in fixtures."""
    assert reached == "a socket was opened"
    with pytest.raises(AssertionError, match="a socket was opened"):
        urlopen("http://127.0.0.1:9/")
    with socket.socket() as own:
        for reach in (own.connect, own.connect_ex, own.bind):
            with pytest.raises(AssertionError, match="a socket was opened"):
                reach(("127.0.0.1", 0))


@pytest.mark.loopback
def test_loopback_is_this_machine() -> None:
    """And nothing beyond it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname()).close()
    with pytest.raises(AssertionError, match="a socket was opened"):
        socket.create_connection(("192.0.2.1", 80))  # an address kept for documentation (RFC 5737)
    with pytest.raises(AssertionError, match="a socket was opened"):
        socket.getaddrinfo("huggingface.co", 443)
