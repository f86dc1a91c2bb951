"""Published weights by name, from a hub on this machine: the hub library, its protocol and its cache are the
real ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save

import models
from models import FAMILIES, Model
from models.__main__ import main
from models.download import download
from models.families import LINES, PUBLISHED, Published
from tests.hub import Handler, Hub
from tests.models.files.tiny import same, tiny, whole
from tests.models.text_peers import spiece

pytestmark = pytest.mark.loopback
ROOT = Path(__file__).parents[2]
UNET, VAE, PICKLE = (random.Random(seed).randbytes(300_000) for seed in range(3))
FILES = {
    "owner/tiny": {"unet/model.safetensors": UNET, "vae.safetensors": VAE, "config.json": b"{}"},
    "owner/one": {"vae.safetensors": VAE, "vae.ckpt": PICKLE},
    "owner/old": {"model.ckpt": PICKLE},
}
UNET_ONLY = ("owner/tiny", ["unet/model.safetensors"])  # the repository and file of most tests here


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub, an empty cache, and a published model "tiny" on it."""
    with Hub(FILES) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(sys.modules["models.download"], "PAUSE", 0.0)  # between its tries
        monkeypatch.setitem(
            PUBLISHED,
            "tiny",
            Published("owner/tiny", ("unet/model.safetensors", "vae.safetensors"), f"{0:040x}"),
        )
        yield hub


def get(name: str, files: list[str], **options: Any) -> bytes:
    """The content of the one file that comes of it."""
    (path,) = download(name, files=files, **options)
    return path.read_bytes()


def line(name: str, files: list[str], **options: Any) -> str:
    """The one line that it ends with."""
    with pytest.raises(OSError, match=r"^[^\n]+$") as caught:
        download(name, files=files, **options)
    return str(caught.value)


def in_cache(cache: Path) -> set[str]:
    """What the cache holds under its final name, and would be taken for whole."""
    files = {
        path
        for folder in ("blobs", "snapshots")
        for path in (cache / "models--owner--tiny" / folder).rglob("*")
        if not path.is_dir()
    }
    return {path.name for path in files if path.suffix != ".partial"}


def test_every_published_model_is_safetensors_of_one_commit() -> None:
    """Those of flows name a branch; what is not a safetensors file there is an index of shards or a
    tokenizer."""
    flows = {name for line in LINES if all(of.is_flow for of in line.FAMILIES) for name in line.PUBLISHED}
    for name, model in PUBLISHED.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.repo), name
        assert model.files, name
        flow = name in flows
        endings = (
            (".safetensors", ".safetensors.index.json", "tokenizer.json", "spiece.model")
            if flow
            else (".safetensors",)
        )
        assert all(file.endswith(endings) for file in model.files), name
        assert re.fullmatch(r"[0-9a-f]{40}", model.revision) or (flow and model.revision == "main"), name
        assert model.licence, name
        assert model.family in ("", *FAMILIES), name
    assert len({(model.repo, model.revision) for model in PUBLISHED.values()}) == len(PUBLISHED)


@pytest.mark.parametrize("name", ["flux-schnell", "flux-fill", "sd3-medium", "sd3.5-large-turbo", "chroma"])
def test_flows_load_as_they_are_fetched(name: str, hub: Hub, tmp_path: Path) -> None:
    """A miniature under the published names: every file is fetched once, and makes up the whole model, T5's
    shards by their index."""
    table = PUBLISHED[name]
    family = table.family or name.replace("sd3-medium", "sd3")
    model = tiny(FAMILIES[family].architecture.name)
    hub.push({table.repo: dict(published_files(model, table, tmp_path))})
    paths = download(name)
    assert not any("-of-" in path.name for path in paths)
    assert len(hub.downloads()) >= len(table.files) - 2  # those in git come from the hub itself
    loaded = models.load(*paths, family=table.family or None)
    without = "text.towers.t5." if name == "sd3-medium" else "none"
    same(whole(loaded), {key: value for key, value in whole(model).items() if not key.startswith(without)})
    assert loaded.spec["family"] == family
    assert loaded.report is not None
    assert loaded.report.missing == ()
    assert loaded.report.ignored == {}
    assert ("t5" in loaded.require("text").tokenizers) == (name != "sd3-medium")


def published_files(model: Model, table: Published, folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a table, as its publisher has them, of a miniature."""
    models.save(model, folder / "separate", "separate")
    names = {"ae": "vae", "model": "clip_l", "t5xxl_fp16": "t5xxl", "diffusion_pytorch_model": "vae"}
    t5 = load_file(folder / "separate" / "t5xxl.safetensors")
    shards = [dict(list(t5.items())[i::2]) for i in range(2)]
    for file in table.files:
        stem = Path(file).name.removesuffix(".safetensors")
        if file.endswith("tokenizer.json"):
            yield file, (folder / "separate" / "tokenizer.json").read_bytes()
        elif file.endswith("spiece.model"):
            yield file, spiece()
        elif file.endswith(".index.json"):
            places = {
                key: f"model-0000{i + 1}-of-00002.safetensors"
                for i, shard in enumerate(shards)
                for key in shard
            }
            yield file, json.dumps({"weight_map": places}).encode()
        elif "-of-" in file:
            yield file, save(shards[int(stem[10]) - 1])
        elif stem.startswith("sd3"):  # network and autoencoder
            models.save(replace(model, text=None, preview=None), folder / "single.safetensors", "ldm")
            yield file, (folder / "single.safetensors").read_bytes()
        else:
            own = names.get(stem, stem if stem.startswith("clip") else model.spec["family"])
            yield file, (folder / "separate" / f"{own}.safetensors").read_bytes()


def test_a_published_model_then_from_the_cache_with_no_hub(hub: Hub) -> None:
    paths = download("tiny")
    assert [path.read_bytes() for path in paths] == [UNET, VAE]
    assert [path.name for path in paths] == ["model.safetensors", "vae.safetensors"]
    hub.stop()
    assert download("tiny") == paths
    assert download("tiny", files=["vae.safetensors"]) == paths[1:]


@pytest.mark.parametrize("offline", [False, True])
def test_a_branch_then_from_the_cache_with_no_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    paths = download("owner/tiny", files=["vae.safetensors", "config.json"])
    assert [path.read_bytes() for path in paths] == [VAE, b"{}"]
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert download("owner/tiny", files=["vae.safetensors", "config.json"]) == paths
    assert len(hub.requests) == asked


def test_the_cache_is_the_hub_librarys_own(hub: Hub, cache: Path) -> None:
    """What is fetched here, others find without a socket, and the other way round."""
    (ours,) = download("owner/tiny", files=["unet/model.safetensors"])
    assert huggingface_hub.hf_hub_download(
        "owner/tiny", "unet/model.safetensors", local_files_only=True
    ) == str(ours)
    (cached,) = huggingface_hub.scan_cache_dir(cache).repos
    assert cached.size_on_disk == len(UNET)
    hub.lfs = False  # without the offer of Xet, which only the real hub can keep
    theirs = huggingface_hub.hf_hub_download("owner/tiny", "vae.safetensors")
    hub.stop()
    assert download("owner/tiny", files=["vae.safetensors"]) == [Path(theirs)]


def test_another_folder(hub: Hub, tmp_path: Path, cache: Path) -> None:
    (path,) = download("owner/tiny", files=["unet/model.safetensors"], folder=tmp_path / "mine")
    assert path.is_relative_to(tmp_path / "mine")
    assert not cache.exists()


def test_a_branch_stays_what_it_was_and_a_commit_is_that_commit(hub: Hub) -> None:
    assert get(*UNET_ONLY) == UNET
    new = hub.push({"owner/tiny": {"unet/model.safetensors": VAE}})
    assert get(*UNET_ONLY) == UNET
    assert get(*UNET_ONLY, revision=new) == VAE


def test_a_branch_that_moves_meanwhile(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the commit that was asked about, and nothing unchecked."""
    module = sys.modules["models.download"]
    fetch = module._receive

    def slow(*args: Any, **options: Any) -> None:
        hub.push({"owner/tiny": {"unet/model.safetensors": VAE}})
        fetch(*args, **options)

    monkeypatch.setattr(module, "_receive", slow)
    assert get(*UNET_ONLY) == UNET
    hub.stop()
    assert get(*UNET_ONLY) == UNET


def test_goes_on_after_a_lost_connection(hub: Hub) -> None:
    hub.cuts = [1000, 150_000]
    assert get(*UNET_ONLY) == UNET
    assert [request.range for request in hub.downloads()] == [None, "bytes=1000-", "bytes=151000-"]


@pytest.mark.parametrize("reset", [False, True])
def test_the_next_call_goes_on_where_the_connection_was_lost_for_good(
    hub: Hub, cache: Path, reset: bool
) -> None:
    hub.cuts, hub.reset = [200_000, *[0] * 5], reset
    assert re.search(
        r"^no connection to the hub for unet/model\.safetensors of owner/tiny \(.+\): try again",
        line(*UNET_ONLY),
    )
    assert in_cache(cache) == set()
    (partial,) = cache.rglob("*.partial")
    come = partial.stat().st_size
    assert 0 < come <= 200_000
    hub.cuts, hub.reset = [], False
    assert get(*UNET_ONLY) == UNET
    assert hub.downloads()[-1].range == f"bytes={come}-"
    assert not partial.exists()


def partial(hub: Hub, cache: Path, content: bytes) -> None:
    """Leave this behind, as of an earlier call that was cut short."""
    hub.cuts = [1000, *[0] * 5]
    line(*UNET_ONLY)
    (path,) = cache.rglob("*.partial")
    path.write_bytes(content)


def test_a_hub_that_serves_no_parts(hub: Hub, cache: Path) -> None:
    partial(hub, cache, UNET[:1234])
    hub.ranges = False
    assert get(*UNET_ONLY) == UNET


def test_all_has_come_but_the_check(hub: Hub, cache: Path) -> None:
    partial(hub, cache, UNET)
    asked = len(hub.downloads())
    assert get(*UNET_ONLY) == UNET
    assert len(hub.downloads()) == asked


def test_more_than_all_has_come(hub: Hub, cache: Path) -> None:
    partial(hub, cache, UNET + b"more")
    assert get(*UNET_ONLY) == UNET


@pytest.mark.parametrize("from_earlier", [False, True])
def test_wrong_content_is_deleted_and_named(hub: Hub, cache: Path, from_earlier: bool) -> None:
    """Of the right size. Also where only what came earlier is wrong."""
    wrong = bytes([UNET[0] ^ 1]) + UNET[1:]
    if from_earlier:
        partial(hub, cache, wrong[:1000])
    else:
        hub.false = {"unet/model.safetensors": wrong}
    found, expected = (hashlib.sha256(content).hexdigest() for content in (wrong, UNET))
    assert (
        f"unet/model.safetensors of owner/tiny has SHA-256 {found}, not {expected}, and was deleted"
        in line(*UNET_ONLY)
    )
    assert in_cache(cache) == set()
    assert not list(cache.rglob("*.partial"))
    hub.false = {}
    assert get(*UNET_ONLY) == UNET


def test_less_than_the_hub_said(hub: Hub, cache: Path) -> None:
    hub.false = {"unet/model.safetensors": UNET[:-1]}
    assert "unet/model.safetensors of owner/tiny should be of size 300000 but has size 299999" in line(
        *UNET_ONLY
    )
    assert in_cache(cache) == set()
    hub.false = {}
    assert get(*UNET_ONLY) == UNET


def test_not_a_hub(hub: Hub) -> None:
    hub.status = 200
    assert line(*UNET_ONLY).endswith(
        "of owner/tiny: the hub's answer names no commit: does HF_ENDPOINT point to a hub?"
    )


def test_without_a_hash_to_check_it_says_so(hub: Hub) -> None:
    hub.lfs = False
    with pytest.warns(
        UserWarning, match=r"no SHA-256 of unet/model\.safetensors in owner/tiny: only its size"
    ):
        assert get(*UNET_ONLY) == UNET
    assert get("owner/tiny", ["config.json"]) == b"{}"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", r"closed to you \(401\).*licence.*HF_TOKEN"),
        (401, "RepoNotFound", r"closed to you \(401\).*the name is wrong"),
        (403, "GatedRepo", r"closed to you \(403\).*licence"),
        (403, "", r"closed to you \(403\)"),
        (503, "", r"answers 503 .*try again later"),
    ],
)
def test_the_hub_refuses(hub: Hub, cache: Path, status: int, code: str, message: str) -> None:
    hub.status, hub.code = status, code
    said = line(*UNET_ONLY)
    assert re.search(message, said)
    assert "unet/model.safetensors of owner/tiny" in said
    assert in_cache(cache) == set()


def test_what_the_hub_has_not(hub: Hub) -> None:
    assert (
        line("owner/tiny", ["vae.bin"])
        == "the hub does not have vae.bin of owner/tiny at revision 'main': check the names"
    )
    assert "vae.safetensors of owner/tiny at revision 'fp16'" in line(
        "owner/tiny", ["vae.safetensors"], revision="fp16"
    )
    assert "the hub does not have vae.safetensors of owner/none" in line("owner/none", ["vae.safetensors"])
    assert "the hub does not have the files of owner/none" in line("owner/none", [])


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stop()
    assert re.search(
        r"no connection to the hub for unet/model.safetensors of owner/tiny \(.*refused.*\)", line(*UNET_ONLY)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        line(*UNET_ONLY) == "HF_HUB_OFFLINE is set, and the cache lacks unet/model.safetensors of owner/tiny"
    )


def test_unknown_names(hub: Hub) -> None:
    with pytest.raises(ValueError, match="no published model named 'sdx1'; did you mean 'sdxl'"):
        download("sdx1")
    for name, given in (
        ("file", {"files": ["../a"]}),
        ("revision", {"revision": "a/../../b"}),
        ("revision", {"revision": "/b"}),
    ):
        with pytest.raises(ValueError, match=rf"no {name} on the hub is called"):
            download("owner/tiny", **given)
    with pytest.raises(ValueError, match="files must be a list of texts"):
        download("owner/tiny", files="vae.safetensors")
    with pytest.raises(ValueError, match=r"^[^\n]*owner/tiny/vae[^\n]*$"):
        download("owner/tiny/vae", files=["a.safetensors"])
    assert hub.requests == []


def test_pickles_only_by_name(hub: Hub) -> None:
    (path,) = download("owner/one")
    assert path.read_bytes() == VAE
    with pytest.raises(
        ValueError,
        match=r"which files of owner/tiny .*: it holds \['unet/model.safetensors', 'vae.safetensors'\]$",
    ):
        download("owner/tiny")
    with pytest.raises(ValueError, match=r"which files of owner/old .*: it holds no safetensors file$"):
        download("owner/old")
    assert get("owner/old", ["model.ckpt"]) == PICKLE


def test_no_room(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is fetched where it can be seen coming, and else with what came kept."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(UNET) - 1))
        assert re.search(
            r"^cannot write /.* for unet/model.safetensors of owner/tiny: .* GB are needed, .* GB are free",
            line(*UNET_ONLY),
        )
    assert hub.downloads() == []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        said = line(*UNET_ONLY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("^cannot write the cache for unet/model.safetensors of owner/tiny: File too large", said)
    assert in_cache(cache) == set()
    assert get(*UNET_ONLY) == UNET
    assert hub.downloads()[-1].range == "bytes=200000-"


def test_a_folder_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert re.search(
        r"^cannot write /.*/file.* for unet/model.safetensors of owner/tiny: ",
        line(*UNET_ONLY, folder=tmp_path / "file"),
    )


def test_the_token_goes_to_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get(*UNET_ONLY)
    assert {request.token for request in hub.requests if request.place == "hub"} == {"Bearer hf_secret"}
    assert {request.token for request in hub.requests if request.place == "store"} == {None}


def test_the_command(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["models", "download", "tiny"])
    assert main() == 0
    assert capsys.readouterr().out.splitlines() == [str(path) for path in download("tiny")]
    monkeypatch.setattr(sys, "argv", ["models", "download", "owner/tiny", "vae.bin"])
    with pytest.raises(SystemExit, match=r"^error: the hub does not have vae\.bin of owner/tiny"):
        main()


def command(hub: Hub, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command as a process of its own, which takes hub and cache from the environment."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(cache.parent),
        "HF_HUB_CACHE": str(cache),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "models", "download", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait(until: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    """Until something is so, while all of these run."""
    while not until():
        assert all(process.poll() is None for process in processes)
        sleep(0.01)


def test_two_processes_at_once(hub: Hub, cache: Path) -> None:
    """One fetches, the other waits for it; the file is there for both, and was fetched once."""
    hub.gate.clear()
    both = [command(hub, cache, *UNET_ONLY[:1], *UNET_ONLY[1]) for _ in range(2)]
    wait(
        lambda: (
            sum(request.place == "hub" and request.method == "HEAD" for request in list(hub.requests)) == 2
        ),
        *both,
    )
    hub.gate.set()
    printed = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (path,) = printed
    assert Path(path.strip()).read_bytes() == UNET
    assert len(hub.downloads()) == 1


def test_a_killed_process(hub: Hub, cache: Path) -> None:
    """Leaves nothing that is taken for whole, and the next call goes on."""
    content = random.Random(0).randbytes(25 * 2**20)
    hub.push({"owner/tiny": {"unet/model.safetensors": content}})
    hub.gate.clear()
    hub.cuts = [22 * 2**20]
    process = command(hub, cache, "owner/tiny", "unet/model.safetensors")
    wait(lambda: any(path.stat().st_size > 20 * 2**20 for path in cache.rglob("*.partial")), process)
    process.kill()
    process.wait()
    hub.gate.set()
    assert in_cache(cache) == set()
    (partial,) = cache.rglob("*.partial")
    come = partial.stat().st_size
    assert get(*UNET_ONLY) == content
    assert hub.downloads()[-1].range == f"bytes={come}-"


# Hostile hubs -----------------------------------------------------------------------------------------------


def everything(folder: Path) -> set[Path]:
    """All files and links below it."""
    return {path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


@pytest.mark.parametrize(
    "name",
    [
        "../../../escaped",
        "/tmp/escaped",
        "a/b",
        "..",
        "",
        "0" * 39,
        "A" * 40,
        "g" * 64,
        "a" * 64 + "\\..",
        "x" * 500,
    ],
)
@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-ETag"])
def test_names_of_a_hub_that_are_no_hashes(header: str, name: str, hub: Hub, tmp_path: Path) -> None:
    """They name no place: nothing is written, neither in the cache nor elsewhere."""
    hub.odd = {header: name if header == "X-Repo-Commit" else f'"{name}"', "ETag": f'"{name}"'}
    if header == "X-Linked-ETag" and not name:
        hub.odd[header] = ""
    assert re.search("the hub's answer names .*, not by a hash|names no commit", line(*UNET_ONLY))
    assert everything(tmp_path) == set()


def test_the_second_answer_is_no_way_out_either(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub is asked for a file's hash once: another one later cannot move it."""
    asked: list[str] = []
    honest = Handler.refer

    def refer(self: Handler, commit: str, content: bytes) -> None:
        asked.append(self.command)
        hub.odd = (
            {"X-Linked-ETag": '"../../../../escaped"', "X-Repo-Commit": "../../escaped"}
            if len(asked) > 1
            else {}
        )
        honest(self, commit, content)

    monkeypatch.setattr(Handler, "refer", refer)
    assert get(*UNET_ONLY) == UNET
    assert asked == ["HEAD", "GET"]
    assert {path.relative_to(tmp_path).parts[0] for path in everything(tmp_path)} == {"cache"}
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../b", "a\\..\\b", "a\x1b\nb", "x" * 501])
def test_names_of_files_that_a_hub_lists(name: str, hub: Hub, tmp_path: Path) -> None:
    """Are checked as if they were typed."""
    name = f"{name}.safetensors"
    hub.push({"owner/odd": {name: VAE}})
    with pytest.raises(ValueError, match=r"^no file on the hub is called [^\n]+$"):
        download("owner/odd")
    assert everything(tmp_path) == set()
    hub.push({"owner/odd": {name: VAE, "b.safetensors": VAE}})
    with pytest.raises(
        ValueError, match=r"^say which files of owner/odd to download.* it holds .*b\.safetensors"
    ) as refused:
        download("owner/odd")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("size", ["", "-5", "many", "9" * 30])
def test_sizes_that_cannot_be(size: str, hub: Hub, cache: Path) -> None:
    """Nothing is fetched for them."""
    hub.odd = {"X-Linked-Size": size}
    assert re.search("does not state the size of|GB are needed", line(*UNET_ONLY))
    assert hub.downloads() == []


def test_a_stream_without_an_end_is_cut_at_the_promised_size(hub: Hub, cache: Path) -> None:
    """Not after the disk is full."""
    hub.pace = {"unet/model.safetensors": (100_000, 0.0)}
    assert "more than the 300,000 bytes that were expected" in line(*UNET_ONLY)
    assert sum(path.stat().st_size for path in everything(cache)) <= 300_000


def test_a_body_that_unpacks_to_far_more_is_not_unpacked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that compresses, though it is asked not to, is told from one that serves another file."""
    packed = gzip.compress(bytes(2**22))
    monkeypatch.setattr(
        Handler, "serve", lambda self, content: self.reply(200, {"Content-Encoding": "gzip"}, packed)
    )
    assert line(*UNET_ONLY).endswith(
        "of owner/tiny: the server sends compressed data (gzip), which was not requested"
    )


def test_an_answer_with_an_address_that_is_none(hub: Hub) -> None:
    """Where a hub refers to."""
    hub.odd = {"Location": "http://[::no/x"}
    assert re.search(r"answer for unet/model.safetensors of owner/tiny cannot be read", line(*UNET_ONLY))


def test_a_list_without_an_end_is_cut(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """At what the list of a repository's files may take."""
    monkeypatch.setattr(sys.modules["models.download"], "MAX_ANSWER", 2**20)
    hub.pace = {"siblings": (100_000, 0.0)}
    assert "more than the 1,048,576 bytes" in line("owner/one", [])


@pytest.mark.parametrize("what", ["unet/model.safetensors", "siblings"])
def test_a_trickle_is_given_up(what: str, hub: Hub) -> None:
    """A byte now and then keeps every connection alive for ever: patience is for the whole, not for one
    byte."""
    hub.pace = {what: (1, 0.05)}
    start = monotonic()
    assert re.search(
        r"of owner/tiny: the server stalls: \d+ bytes came in 0\.5 seconds",
        line("owner/tiny", UNET_ONLY[1] if "/" in what else [], patience=0.5),
    )
    assert monotonic() - start < 3


def test_no_answer_at_all_is_given_up(hub: Hub) -> None:
    """Not even the beginning of one."""
    hub.gate.clear()
    assert "the server stalls: 0 bytes came in 0.3 seconds" in line(*UNET_ONLY, patience=0.3)
    hub.gate.set()
    with pytest.raises(ValueError, match="patience, in seconds, must be above 0"):
        download(*UNET_ONLY[:1], patience=0)
