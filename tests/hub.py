"""A hub of our own on 127.0.0.1: files of repositories as the real one serves them, and all that can go wrong
on the way.

A file's address answers with its commit, size and SHA-256, offers Xet, and refers to another host for the
content, which takes ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass
class Request:
    """One that the hub was sent. place: "hub", "store" or "api"."""

    method: str
    place: str
    path: str
    range: str | None
    token: str | None


class Hub(ThreadingHTTPServer):
    """Serves repositories, {"owner/name": {"file": content}}, until it is stopped.

    commits   every commit's repositories; branches stand for the last one
    cuts      for each download to come, the bytes after which its connection is lost; later ones are served
              whole
    reset     connections are lost by a reset, and not by an early end
    gate      a download waits for it: where its connection is to be lost, or at its start
    status    answered in place of everything, with `code` as the hub's reason
    false     {"file": content}: served in place of the file's content, under the true SHA-256
    lfs       whether files are kept by their SHA-256, and offered over Xet; or in git, under another hash
    ranges    whether parts of a file are served
    odd       headers in place of the hub's own, {"ETag": ...}
    pace      {"file": (bytes, seconds)}: its content comes in such pieces, at such intervals, and never ends
    requests  all so far, in order
    """

    daemon_threads = True

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.push(files)
        self.cuts: list[int] = []
        self.reset = False
        self.gate, self.stopped = threading.Event(), threading.Event()
        self.gate.set()
        self.status: int | None = None
        self.code = ""
        self.false: dict[str, bytes] = {}
        self.lfs = True
        self.ranges = True
        self.odd: dict[str, str] = {}
        self.pace: dict[str, tuple[int, float]] = {}
        self.requests: list[Request] = []
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def push(self, files: dict[str, dict[str, bytes]]) -> str:
        """A new commit, in every repository."""
        self.commits[commit := f"{len(self.commits):040x}"] = files
        return commit

    def downloads(self) -> list[Request]:
        """The requests for content."""
        return [request for request in self.requests if request.place == "store" and request.method == "GET"]

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """An end, which comes after all data; or a reset, which does not."""
        (self.close_request if self.reset else super().shutdown_request)(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is one of the cases; anything else is not."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # as it came

    def stop(self) -> None:
        """From now on there is nobody at this address."""
        self.gate.set()
        self.stopped.set()
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
            self.server_close()

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Handler(BaseHTTPRequestHandler):
    """One connection per request (HTTP/1.0), so that a stopped hub is gone at once."""

    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.server
        place = (
            "api" if self.path.startswith("/api/") else "store" if self.path.startswith("/store/") else "hub"
        )
        hub.requests.append(
            Request(self.command, place, self.path, self.headers["Range"], self.headers["Authorization"])
        )
        asked = re.fullmatch(
            r"/api/models/(.+)/revision/([^/?]+)()|/(?:store/)?(.+)/resolve/([^/]+)/(.+)", self.path
        )
        repo, revision, file = (
            [part for part in asked.groups() if part is not None][:3] if asked else ("", "", "")
        )
        commit = list(hub.commits)[-1] if revision == "main" else revision
        files = hub.commits.get(commit, {}).get(repo, {})
        if hub.status is not None:
            self.reply(hub.status, {"X-Error-Code": hub.code})
        elif not files:
            known = repo in list(hub.commits.values())[-1]
            self.reply(404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        elif place == "api":
            if "siblings" in hub.pace:
                self.drip(*hub.pace["siblings"])
            else:
                about = {"sha": commit, "siblings": [{"rfilename": name} for name in files]}
                self.reply(200, {"Content-Type": "application/json"}, json.dumps(about).encode())
        elif file not in files:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif place == "hub":
            self.refer(commit, files[file])
        elif file in hub.pace:
            self.drip(*hub.pace[file])
        else:
            self.serve(hub.false.get(file, files[file]))

    def refer(self, commit: str, content: bytes) -> None:
        """What the hub itself says of a file: the content is elsewhere, on what counts as another host."""
        headers = {
            "Location": f"http://localhost:{self.server.server_port}/store{self.path}",
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
        }
        if self.server.lfs:
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers |= {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": f"{self.server.address}/api/xet"}
        self.reply(302, headers | self.server.odd)

    def serve(self, content: bytes) -> None:
        """The content, from where the client asks for it to where the connection is to be lost."""
        hub = self.server
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "") if hub.ranges else None
        start = int(asked[1]) if asked else 0
        if start and start >= len(content):
            self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        cut = hub.cuts.pop(0) if hub.cuts else None
        self.reply(206 if asked else 200, headers, content[start:], cut or 0)
        hub.gate.wait()
        if cut is None:
            self.wfile.write(content[start:])
        elif hub.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def drip(self, size: int, seconds: float) -> None:
        """An answer without an end, or until nobody listens any more."""
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while not self.server.stopped.wait(seconds):
                self.wfile.write(bytes(size))

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])

    def log_message(self, *args: object) -> None:
        """Nothing: a test that fails shows the requests."""
