"""Downloads published weights by name into a cache. Only this module of the library opens a socket.

Cached files are used without a socket. A missing file is downloaded to a partial file, which a later call
continues if the connection is lost, and enters the cache only if its SHA-256 is the one that the hub states.
The server is not trusted: its answers become part of a path only if they are hashes, and a download ends when
the server sends more than it promised, or stalls. The cache has the layout of the hub's own library and is
shared with it; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE apply.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import torch

from diffusion.messages import brief, first_line, one_line
from diffusion.spec import check_names, check_type
from models.files.text import parse_json, sha256_of_file
from models.files.writing import replacing

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

    from models.families import Published

T = TypeVar("T")
Progress = Callable[[int], object]  # called with the size of every chunk that arrives, in bytes

PATIENCE = 60.0  # seconds
MIN_RECEIVED = 2**16  # bytes in that time; a server that sends fewer stalls
MAX_ANSWER = 2**24  # bytes of the hub's description of a repository
COMPRESSED = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")  # values of Content-Encoding
MAX_NAME = 500  # characters of a file's name on the hub
TRIES, PAUSE = 5, 1.0  # attempts in a row that bring no byte, and the seconds between them
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")  # the end of a shard's name
NO_HUB = "does HF_ENDPOINT point to a hub?"


@dataclass(frozen=True)
class PlainFile:
    """A file with its own address, outside the hub."""

    address: str
    sha256: str
    size: int
    licence: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.address.rpartition("/")[2]


# The network of the Frechet Inception distance, which pytorch-fid converted from TensorFlow.
FILES = {
    "inception": PlainFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
        "Apache 2.0",
    )
}


def download(
    name: str,
    *,
    files: Sequence[str] = (),
    revision: str | None = None,
    folder: str | Path | None = None,
    patience: float = PATIENCE,
) -> list[Path]:
    """Paths of a published model, downloaded unless cached: models.load(*models.download("sdxl")).

    Shards are downloaded with their index, and only the index is returned, since `load` takes the index. Some
    models need their family named, see PUBLISHED: models.load(*models.download(name), family="sdxl-turbo").

    name      one of PUBLISHED or FILES, or any repository on the hub, "owner/name"
    files     only these files; pickles (.ckpt, .bin) must be named here. Default: those in PUBLISHED, or a
              repository's only safetensors file
    revision  a commit, tag or branch; default: the one in PUBLISHED, or "main". A branch keeps meaning the
              commit that was first downloaded
    folder    the cache; default: the hub library's own, for FILES torch's, which other tools share
    patience  seconds without an answer, or with less than 64 KiB of a file, after which a server has stalled

    Raises ValueError for an unknown name, and OSError, in one line, when a file cannot be downloaded: no
    network, no such file, no permission, no disk space, or a wrong hash, after which the file is deleted. A
    partial download is kept for the next call.
    """
    from huggingface_hub import constants

    from models.families import PUBLISHED, Published

    check_type("files", files, Sequence[str])
    check_type("patience", patience, float)
    if not patience > 0:
        raise ValueError(f"patience, in seconds, must be above 0, not {patience:g}")
    for what, value in (*(("file", file) for file in files), ("revision", revision or "")):
        _check_name(what, value)
    if "/" not in name:
        check_names("published model", [name], [*PUBLISHED, *FILES])
    if name in FILES:
        if files or revision:
            raise ValueError(f"{name} is one file without revisions: leave files and revision out")
        return [_obtain_plain(name, path_in_cache(name, folder), patience)]
    model = PUBLISHED.get(name, Published(name))
    model = replace(model, files=tuple(files) or model.files, revision=revision or model.revision)
    if not model.files:
        model = replace(model, files=(_only_safetensors(model, patience),))
    cache = Path(folder or constants.HF_HUB_CACHE).expanduser().absolute()
    paths = {file: _obtain(model, file, cache, patience) for file in model.files}
    indexed = {Path(file).parent for file in model.files if file.endswith(".index.json")}
    return [path for file, path in paths.items() if not (SHARD.search(file) and Path(file).parent in indexed)]


def path_in_cache(name: str, folder: str | Path | None = None) -> Path:
    """The path of one of FILES in the cache, whether it is downloaded yet or not."""
    folder = Path(folder or Path(torch.hub.get_dir()) / "checkpoints")
    return folder.expanduser().absolute() / FILES[name].name


def _check_name(what: str, name: str) -> None:
    """ValueError for a file or revision whose name could lead out of its folder."""
    leads_out = ".." in name.split("/") or name.startswith("/")
    if leads_out or not name.isprintable() or set(name) & set('\\:*?"<>|') or len(name) > MAX_NAME:
        raise ValueError(
            f"no {what} on the hub is called {brief(name)}: it has no '..' or backslash and does not begin "
            "with '/'"
        )


def _obtain_plain(name: str, path: Path, patience: float) -> Path:
    """Download one of FILES unless it is cached. OSError, in one line, on failure or a wrong hash."""
    file = FILES[name]
    if not path.exists():
        try:
            with replacing(path) as temporary, temporary.open("wb") as out:
                receive = partial(_receive, file.address, out, file.size, file.name, {})
                _within(patience, receive)
                out.flush()
                if (digest := sha256_of_file(temporary)) != file.sha256:
                    raise OSError(f"its SHA-256 hash is {digest}, not {file.sha256}")
        except Exception as error:  # including the HTTP client's own exceptions
            raise OSError(f"{name} cannot be downloaded from {file.address}: {one_line(error)}") from error
    if (digest := sha256_of_file(path)) != file.sha256:
        raise OSError(f"{path} has SHA-256 {digest}, not {file.sha256}: delete it, and download it again")
    return path


def _only_safetensors(model: Published, patience: float) -> str:
    """The name of a repository's only safetensors file; ValueError if it has several or none."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not marked so

    address, answer = f"{constants.ENDPOINT}/api/models/{model.repo}/revision/{model.revision}", BytesIO()
    with _in_one_line(model, "the files"):
        _within(patience, lambda report: _stream(address, answer, MAX_ANSWER, build_hf_headers(), report))
        try:
            names = [str(entry["rfilename"]) for entry in parse_json(answer.getvalue())["siblings"]]
        except (ValueError, KeyError, TypeError):
            raise OSError(f"the hub's answer does not list the files of {model.repo}: {NO_HUB}") from None
    names = [name for name in names if name.endswith(".safetensors")]
    if len(names) != 1:
        listed = brief(names) if names else "no safetensors file"
        raise ValueError(f"say which files of {model.repo} to download, files=[...]: it holds {listed}")
    _check_name("file", names[0])
    return names[0]


def _obtain(model: Published, file: str, cache: Path, patience: float) -> Path:
    """The path of one file in the cache, after downloading it if necessary."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    cached = try_to_load_from_cache(model.repo, file, cache_dir=cache, revision=model.revision)
    if isinstance(cached, str):
        return Path(cached)
    with _in_one_line(model, file):
        address = hf_hub_url(model.repo, file, revision=model.revision)
        remote = _within(patience, lambda report: get_hf_file_metadata(address))
        if (commit := remote.commit_hash) is None:
            raise OSError(f"the hub's answer names no commit: {NO_HUB}")
        etag = remote.etag or ""
        for what, name, length in (("commit", commit, "40"), (file, etag, "40}|[0-9a-f]{64")):
            if not re.fullmatch(f"[0-9a-f]{{{length}}}", name):
                raise OSError(f"the hub's answer names {what} by {brief(name)}, not by a hash: {NO_HUB}")
        if remote.size is None or remote.size < 0:
            raise OSError(f"the hub's answer does not state the size of {file}: {NO_HUB}")
        if len(etag) == 40 and not file.endswith((".json", ".txt")):  # a git hash, as small files have
            message = f"the hub states no SHA-256 of {file} in {model.repo}: only its size is checked"
            warnings.warn(message, stacklevel=2)
        home = cache / repo_folder_name(repo_id=model.repo, repo_type="model")
        pointer = home / "snapshots" / commit / file
        _fetch(model, file, remote, home, pointer, patience)
        if commit != model.revision:
            with replacing(home / "refs" / model.revision) as temporary:
                temporary.write_text(commit)
    return pointer


def _fetch(
    model: Published, file: str, remote: HfFileMetadata, home: Path, pointer: Path, patience: float
) -> None:
    """Download a file to its place in the cache, and link to it. Other processes wait meanwhile."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm  # type: ignore[attr-defined]  # public, but not marked so

    blob = home / "blobs" / str(remote.etag)
    unfinished = blob.with_name(f"{blob.name}.partial")
    lock = home.parent / ".locks" / home.name / f"{blob.name}.lock"
    for folder in (blob.parent, lock.parent, pointer.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            size, done = remote.size or 0, unfinished.stat().st_size if unfinished.exists() else 0
            if size - done > (free := shutil.disk_usage(home).free):
                lack = f"{(size - done) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
                raise OSError(errno.ENOSPC, lack, str(home))
            # Plain HTTP, because Xet starts over after a lost connection. The hub's own address, because the
            # signed one that it redirects to expires. By commit, because a branch may move meanwhile.
            address = hf_hub_url(model.repo, file, revision=remote.commit_hash)
            with (
                unfinished.open("ab" if done <= size else "wb") as out,
                tqdm(total=size, initial=out.tell(), unit="B", unit_scale=True, desc=file) as bar,  # type: ignore[no-untyped-call]
            ):

                def receive(report: Progress) -> None:
                    what, headers = f"{file} of {model.repo}", build_hf_headers()
                    _receive(address, out, size, what, headers, lambda new: (report(new), bar.update(new)))

                _within(patience, receive)
                out.flush()
                os.fsync(out.fileno())
            if len(blob.name) == 64 and (digest := sha256_of_file(unfinished)) != blob.name:
                unfinished.unlink()
                wrong = f"{file} of {model.repo} has SHA-256 {digest}, not {blob.name}, and was deleted"
                raise OSError(f"{wrong}: download it again")
            unfinished.replace(blob)
        pointer.unlink(missing_ok=True)  # a link whose content is gone
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # a file system without links
            shutil.copyfile(blob, pointer)


def _within(patience: float, work: Callable[[Progress], T]) -> T:
    """Run a download in a thread and return its result. OSError if it stalls: the thread is abandoned."""
    received, abandoned, result = [0], threading.Event(), Future[T]()

    def report(size: int) -> None:
        if abandoned.is_set():
            raise OSError("the download was abandoned")
        received[0] += size

    def run() -> None:
        try:
            result.set_result(work(report))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            before = received[0]
            if wait([result], timeout=patience).done:
                return result.result()
            if (new := received[0] - before) < MIN_RECEIVED:
                raise OSError(
                    f"the server stalls: {new:,} bytes came in {patience:g} seconds; try again, or with more "
                    "patience"
                )
    finally:
        abandoned.set()


def _receive(
    address: str, out: BinaryIO, size: int, what: str, headers: Mapping[str, str], report: Progress
) -> None:
    """Append the rest of `size` bytes to a file, with retries. OSError for an answer of another size."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # the client's own

    tries = TRIES
    while (done := out.tell()) < size:
        try:
            _stream(address, out, size, headers, report)
        except HfHubHTTPError:
            raise
        except HTTPError:
            tries = TRIES if out.tell() > done else tries - 1
            if tries < 1:
                raise
            time.sleep(PAUSE)
        else:
            if out.tell() < size:
                raise OSError(f"{what} should be of size {size} but has size {out.tell()}")


def _stream(address: str, out: BinaryIO, max_size: int, headers: Mapping[str, str], report: Progress) -> None:
    """Append the rest of an answer's body to `out`. OSError if `out` would exceed `max_size` bytes."""
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]  # public, but not marked so

    start = out.tell()
    headers = {**headers, "Accept-Encoding": "identity"}  # a few compressed bytes may unpack to gigabytes
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", address, headers=headers, follow_redirects=True, timeout=10) as response:
        if response.status_code >= 400:
            response.close()  # an error's text may be endless
            hf_raise_for_status(response)
        if start and response.status_code == 200:  # the server ignores Range and sends the whole file
            out.seek(0)
            out.truncate()
        if (encoding := response.headers.get("Content-Encoding", "").lower()) in COMPRESSED:
            raise OSError(f"the server sends compressed data ({encoding}), which was not requested")
        for chunk in response.iter_raw():
            report(len(chunk))
            if out.tell() + len(chunk) > max_size:
                raise OSError(
                    f"the server sends more than the {max_size:,} bytes that were expected: does it serve "
                    "another file?"
                )
            out.write(chunk)


@contextmanager
def _in_one_line(model: Published, what: str) -> Iterator[None]:
    """Turn every error of network, hub and disk into an OSError in one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]  # the client's own

    what = f"{what} of {model.repo}"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        closed = (
            f"the hub keeps {what} closed to you ({status}): if its page asks you to accept a licence, do "
            "so, and log in with `hf auth login` or set HF_TOKEN; if it has no page, the name is wrong"
        )
        absent = f"the hub does not have {what} at revision {model.revision!r}: check the names"
        lines = {401: closed, 403: closed, 404: absent}
        raise OSError(lines.get(status, f"the hub answers {status} for {what}: try again later")) from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"HF_HUB_OFFLINE is set, and the cache lacks {what}") from error
    except HTTPError as error:
        lost = f"no connection to the hub for {what} ({one_line(error)})"
        raise OSError(f"{lost}: try again, the partial download is kept") from error
    except OSError as error:
        if error.errno is not None:
            path = error.filename or "the cache"
            raise OSError(f"cannot write {path} for {what}: {error.strerror}") from error
        text = first_line(error)
        raise OSError(text if model.repo in text else f"{what}: {text}") from error
    except ValueError as error:  # such as an invalid address in it
        raise OSError(f"the hub's answer for {what} cannot be read ({error}): {NO_HUB}") from error
