"""A published file with an address of its own, from a server on this machine."""

from __future__ import annotations

import hashlib
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from models.download import PlainFile, download

pytestmark = pytest.mark.loopback


def test_a_file_of_its_own_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fetched once, checked by its SHA-256, and taken from its place afterwards; other bytes are one
    line, and leave nothing."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "weights.pth").write_bytes(b"weights")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/weights.pth"
        right = PlainFile(address, hashlib.sha256(b"weights").hexdigest(), 7, "none")
        monkeypatch.setattr(
            sys.modules["models.download"],
            "FILES",
            {"plain": right, "false": replace(right, sha256="0" * 64)},
        )
        (path,) = download("plain", folder=tmp_path / "cache")
        assert path.read_bytes() == b"weights"
        with pytest.raises(OSError, match=r"^false cannot be downloaded from http://127[^\n]*hash[^\n]*$"):
            download("false", folder=tmp_path / "other")
        server.shutdown()
    assert download("plain", folder=tmp_path / "cache") == [path]
    assert list((tmp_path / "other").iterdir()) == []
    with pytest.raises(ValueError, match="plain is one file without revisions"):
        download("plain", revision="main")
    path.write_bytes(b"other")
    with pytest.raises(OSError, match="delete it, and download it again"):
        download("plain", folder=tmp_path / "cache")
