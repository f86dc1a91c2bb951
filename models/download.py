"""Published weights by name, from where they are published into a cache here. The one function of the library
that opens a socket.

What the cache holds is taken from there, without a socket. What it lacks is fetched into a partial file,
which a later call continues if the connection is lost, and which enters the cache only if its SHA-256 is the
one that the hub names. A server is not trusted: what it says becomes part of a path only if it is a hash, and
it is given up when it sends more than it promised, or stalls. The cache is laid out as the hub's own library
does it, and shared with it; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold.
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
Count = Callable[[int], object]  # told the number of bytes whenever some have come

PATIENCE = 60.0  # seconds
MIN_RECEIVED = 2**16  # bytes in that time; a server that sends fewer stalls
MAX_ANSWER = 2**24  # bytes of the hub's description of a repository
COMPRESSED = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")  # values of Content-Encoding
MAX_NAME = 500  # characters of a file on the hub
TRIES, PAUSE = 5, 1.0  # in a row without a byte, and the seconds between them
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")  # the end of a shard's name


@dataclass(frozen=True)
class PlainFile:
    """A file with an address of its own, not on the hub."""

    address: str
    sha256: str
    size: int
    licence: str

    @property
    def name(self) -> str:
        """Of the file."""
        return self.address.rpartition("/")[2]


# The network of the Frechet Inception distance, as pytorch-fid took it from TensorFlow's graph.
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
    """The files of a published model on this machine, in the order of its table:
    `models.load(*models.download("sdxl"))`.

    Shards that are fetched with their index are not among the paths returned: `load` takes the index.
    Some models need their family named, see PUBLISHED: `models.load(*models.download("sdxl-turbo"),
    family="sdxl-turbo")`.

    name      one of PUBLISHED or FILES, or any repository on the hub, "owner/name"
    files     these of its files, pickles (.ckpt, .bin) only so; left out: those of the table, or a
              repository's only safetensors file
    revision  a commit, tag or branch; left out: that of the table, or "main". A branch stands for what it was
              when first fetched
    folder    where the cache is; left out: the hub library's own, for FILES torch's, which other tools share
    patience  seconds without an answer, or with less than 64 KiB of a file, after which a server is given up
    Raises ValueError for a name that is not known, and OSError, in one line, where a file cannot be had: no
    network, no such file, no permission, no room, or other bytes than the hub promised, which are deleted.
    What has come so far is kept for the next call.
    """
    from huggingface_hub import constants

    from models.families import PUBLISHED, Published

    check_type("files", files, Sequence[str])
    check_type("patience", patience, float)
    if not patience > 0:
        raise ValueError(f"patience, in seconds, must be above 0, not {patience:g}")
    for name_of, value in (*(("file", file) for file in files), ("revision", revision or "")):
        _check_name(name_of, value)
    if "/" not in name:
        check_names("published model", [name], [*PUBLISHED, *FILES])
    if name in FILES:
        if files or revision:
            raise ValueError(f"{name} is one file without revisions: leave files and revision out")
        return [_obtain_plain(name, place(name, folder), patience)]
    model = PUBLISHED.get(name, Published(name))
    model = replace(model, files=tuple(files) or model.files, revision=revision or model.revision)
    if not model.files:
        model = replace(model, files=(_only_safetensors(model, patience),))
    cache = Path(folder or constants.HF_HUB_CACHE).expanduser().absolute()
    paths = {file: _obtain(model, file, cache, patience) for file in model.files}
    named = {Path(file).parent for file in model.files if file.endswith(".index.json")}
    return [path for file, path in paths.items() if not (SHARD.search(file) and Path(file).parent in named)]


def place(name: str, folder: str | Path | None = None) -> Path:
    """Where the one of FILES is once it is fetched, whether it is there or not."""
    return (
        Path(folder or Path(torch.hub.get_dir()) / "checkpoints").expanduser().absolute() / FILES[name].name
    )


def _check_name(what: str, name: str) -> None:
    """ValueError for a file or a revision whose name could lead out of its folder."""
    odd = (
        ".." in name.split("/")
        or name.startswith("/")
        or not name.isprintable()
        or set(name) & set('\\:*?"<>|')
    )
    if odd or len(name) > MAX_NAME:
        raise ValueError(
            f"no {what} on the hub is called {brief(name)}: it has no '..' or backslash and does not begin "
            "with '/'"
        )


def _obtain_plain(name: str, path: Path, patience: float) -> Path:
    """OSError, in one line, where it cannot be had or has other bytes than it should; nothing is left behind
    then."""
    file = FILES[name]
    if not path.exists():
        try:
            with replacing(path) as temporary, temporary.open("wb") as out:
                _within(patience, lambda count: _receive(file.address, out, file.size, file.name, {}, count))
                out.flush()
                if (digest := sha256_of_file(temporary)) != file.sha256:
                    raise OSError(f"its SHA-256 has the hash {digest}, not {file.sha256}")
        except Exception as error:  # the client's own kinds among them
            raise OSError(f"{name} cannot be had from {file.address}: {one_line(error)}") from error
    if (digest := sha256_of_file(path)) != file.sha256:
        raise OSError(f"{path} has SHA-256 {digest}, not {file.sha256}: delete it, and fetch it again")
    return path


def _only_safetensors(model: Published, patience: float) -> str:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not marked so

    address, answer = f"{constants.ENDPOINT}/api/models/{model.repo}/revision/{model.revision}", BytesIO()
    with _in_one_line(model, "the files"):
        _within(patience, lambda count: _stream(address, answer, MAX_ANSWER, build_hf_headers(), count))
        try:
            found = [str(entry["rfilename"]) for entry in parse_json(answer.getvalue())["siblings"]]
        except (ValueError, KeyError, TypeError):
            raise OSError(
                f"the hub's answer does not say which files {model.repo} has: does HF_ENDPOINT point to a "
                "hub?"
            ) from None
    found = [file for file in found if file.endswith(".safetensors")]
    if len(found) != 1:
        raise ValueError(
            f"say which files of {model.repo} to fetch, files=[...]: it holds "
            f"{brief(found) if found else 'no safetensors file'}"
        )
    _check_name("file", found[0])
    return found[0]


def _obtain(model: Published, file: str, cache: Path, patience: float) -> Path:
    """The path of one file in the cache, where it is put if it is not there yet."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    found = try_to_load_from_cache(model.repo, file, cache_dir=cache, revision=model.revision)
    if isinstance(found, str):
        return Path(found)
    with _in_one_line(model, file):
        address = hf_hub_url(model.repo, file, revision=model.revision)
        remote = _within(patience, lambda count: get_hf_file_metadata(address))
        if (commit := remote.commit_hash) is None:
            raise OSError("the hub's answer names no commit: does HF_ENDPOINT point to a hub?")
        for what, name, length in (("commit", commit, "40"), (file, remote.etag or "", "40}|[0-9a-f]{64")):
            if not re.fullmatch(f"[0-9a-f]{{{length}}}", name):
                raise OSError(
                    f"the hub's answer names {what} by {brief(name)}, which is not a hash: does HF_ENDPOINT "
                    "point to a hub?"
                )
        if remote.size is None or remote.size < 0:
            raise OSError(
                f"the hub's answer does not say how large {file} is: does HF_ENDPOINT point to a hub?"
            )
        if len(remote.etag or "") == 40 and not file.endswith(
            (".json", ".txt")
        ):  # which the hub keeps in git, under another hash
            warnings.warn(
                f"the hub names no SHA-256 of {file} in {model.repo}: only its size is checked", stacklevel=2
            )
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
    """Put a file's content where the cache keeps it, under its hash, and a link to it. Of several processes
    one fetches, others wait."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm  # type: ignore[attr-defined]  # public, but not marked so

    blob = home / "blobs" / str(remote.etag)
    partial = blob.with_name(f"{blob.name}.partial")
    lock = home.parent / ".locks" / home.name / f"{blob.name}.lock"
    for folder in (blob.parent, lock.parent, pointer.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            come = partial.stat().st_size if partial.exists() else 0
            size = remote.size or 0
            if size - come > (free := shutil.disk_usage(home).free):
                raise OSError(
                    errno.ENOSPC,
                    f"{(size - come) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
                    str(home),
                )
            # Plain HTTP also where the hub offers Xet, which starts over after a lost connection. From the
            # hub's own address, as the signed one that it refers to expires; by its commit, as a branch may
            # move meanwhile.
            address = hf_hub_url(model.repo, file, revision=remote.commit_hash)
            with (
                partial.open("ab" if come <= size else "wb") as out,
                tqdm(total=size, initial=out.tell(), unit="B", unit_scale=True, desc=file) as bar,  # type: ignore[no-untyped-call]
            ):

                def receive(count: Count) -> None:
                    what, headers = f"{file} of {model.repo}", build_hf_headers()
                    _receive(address, out, size, what, headers, lambda came: (count(came), bar.update(came)))

                _within(patience, receive)
                out.flush()
                os.fsync(out.fileno())
            if len(blob.name) == 64 and (digest := sha256_of_file(partial)) != blob.name:
                partial.unlink()
                raise OSError(
                    f"{file} of {model.repo} came with SHA-256 {digest}, not {blob.name}, and was deleted: "
                    "fetch it again"
                )
            partial.replace(blob)
        pointer.unlink(missing_ok=True)  # one whose content is gone
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # where there are no links
            shutil.copyfile(blob, pointer)


def _within(patience: float, work: Callable[[Count], T]) -> T:
    """The result of some work on the network. OSError if it stalls: it runs in a thread, which is then
    abandoned."""
    came, left, done = [0], threading.Event(), Future[T]()

    def count(size: int) -> None:
        if left.is_set():
            raise OSError("nobody waits for it any more")
        came[0] += size

    def run() -> None:
        try:
            done.set_result(work(count))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            before = came[0]
            if wait([done], timeout=patience).done:
                return done.result()
            if came[0] - before < MIN_RECEIVED:
                raise OSError(
                    f"the server stalls: {came[0] - before:,} bytes came in {patience:g} seconds; try "
                    "again, or with more patience"
                )
    finally:
        left.set()


def _receive(
    address: str, out: BinaryIO, size: int, what: str, headers: Mapping[str, str], count: Count
) -> None:
    """Append to a file what it lacks of `size` bytes; after a lost connection, try again. OSError for an
    answer of another size."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # the client's own

    tries = TRIES
    while (come := out.tell()) < size:
        try:
            _stream(address, out, size, headers, count)
        except HfHubHTTPError:
            raise
        except HTTPError:
            tries = TRIES if out.tell() > come else tries - 1
            if tries < 1:
                raise
            time.sleep(PAUSE)
        else:
            if out.tell() < size:
                raise OSError(f"{what} should be of size {size} but has size {out.tell()}")


def _stream(address: str, out: BinaryIO, most: int, headers: Mapping[str, str], count: Count) -> None:
    """Append the rest of an answer's body to `out`. OSError if that makes more than `most` bytes."""
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]  # public, but not marked so

    come = out.tell()
    plain = {
        **headers,
        "Accept-Encoding": "identity",
    }  # a few bytes that are compressed may unpack to gigabytes
    ranged = {**plain, "Range": f"bytes={come}-"} if come else plain
    with get_session().stream("GET", address, headers=ranged, follow_redirects=True, timeout=10) as response:
        if response.status_code >= 400:
            response.close()  # an error's text may have no end
            hf_raise_for_status(response)
        if come and response.status_code == 200:  # all of it, where only the rest was asked for
            out.seek(0)
            out.truncate()
        if (encoding := response.headers.get("Content-Encoding", "").lower()) in COMPRESSED:
            raise OSError(f"the server sends it compressed ({encoding}), which it was asked not to do")
        for chunk in response.iter_raw():
            count(len(chunk))
            if out.tell() + len(chunk) > most:
                raise OSError(
                    f"the server sends more than the {most:,} bytes that were promised or make sense: does "
                    "it serve another file?"
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
            f"the hub keeps {what} closed to you ({status}): if its page asks for a licence to be accepted, "
            "do so, and log in with"
            " `hf auth login` or set HF_TOKEN; if it has no page, the name is wrong"
        )
        absent = f"the hub does not have {what} at revision {model.revision!r}: check the names"
        lines = {401: closed, 403: closed, 404: absent}
        raise OSError(lines.get(status, f"the hub answers {status} for {what}: try again later")) from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"HF_HUB_OFFLINE is set, and the cache lacks {what}") from error
    except HTTPError as error:
        reason = one_line(error)
        raise OSError(
            f"no connection to the hub for {what} ({reason}): try again, what has come so far is kept"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise OSError(
                f"cannot write {error.filename or 'the cache'} for {what}: {error.strerror}"
            ) from error
        text = first_line(error)
        raise OSError(text if model.repo in text else f"{what}: {text}") from error
    except ValueError as error:  # such as an address in it that is none
        raise OSError(
            f"the hub's answer for {what} cannot be read ({error}): does HF_ENDPOINT point to a hub?"
        ) from error
