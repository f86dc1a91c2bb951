"""This library's own files: what is written comes back bitwise, all or nothing, and a bad file says what is
wrong with it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import models
from diffusion import EDM, NONE, Condition, ConsistencyFunction, Denoiser, VarianceExploding, time_grid
from models import EMA, Model
from models.__main__ import main
from models.files.tensors import open_tensors
from models.layouts import native

UNET: dict[str, Any] = {
    "network": {
        "name": "unet",
        "in_channels": 1,
        "out_channels": 1,
        "channels": 16,
        "channel_mult": (1, 2),
        "blocks": 1,
        "attention": (0, 1),
        "head_dim": 8,
        "groups": 8,
        "num_classes": 10,
    },
    "schedule": {"name": "scaled_linear", "steps": 100},
    "prediction": "eps",
}
DIT: dict[str, Any] = {
    "network": {
        "name": "dit",
        "in_channels": 1,
        "image_size": 8,
        "hidden": 16,
        "depth": 1,
        "heads": 2,
        "num_classes": 10,
    },
    "schedule": {"name": "flow", "shift": 3.0},
    "prediction": "flow",
}
SPECS = {"unet": UNET, "dit": DIT, "consistency": {**UNET, "consistency": {"name": "cm", "ratio_min": 0.03}}}


def fresh(spec: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """A model with random weights: fresh ones hold zeros, which would hide a mix-up."""
    model = models.build(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 8)
    model.network.to(dtype)
    return model


def tensors(model: Model) -> dict[str, Tensor]:
    """What a file holds of a model."""
    return {f"network.{name}": value for name, value in model.network.state_dict().items()}


def output(model: Model) -> Tensor:
    """What the model's denoiser makes of a fixed input, x0 and eps."""
    level = model.schedule.level(0.5 * model.schedule.t_max)
    estimate = model.denoiser()(
        torch.linspace(-1, 1, 128).view(2, 1, 8, 8), level, Condition(label=torch.tensor([3, 10]))
    )
    return torch.cat([estimate.x0, estimate.eps]).detach()


def assert_same(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Bitwise, names and dtypes included."""
    assert state.keys() == other.keys()
    assert all(
        torch.equal(state[name], other[name]) and state[name].dtype == other[name].dtype for name in state
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file that holds a UNet."""
    path = tmp_path / "model.safetensors"
    models.save(fresh(UNET), path)
    return path


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Model, EMA]:
    """A training run's folder, with a bfloat16 model's raw weights, its average and an optimiser; with the
    model and average."""
    model = fresh(DIT, dtype=torch.bfloat16)
    ema = EMA(fresh(DIT, seed=1).network)
    everything = (
        tensors(model)
        | {f"ema.{name}": value for name, value in ema.average.items()}
        | {"optimizer.0.step": torch.ones(1)}
    )
    native.write(tmp_path / "run" / native.FILE_NAME, everything, {"model": model.spec})
    return tmp_path / "run", model, ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SPECS)
def test_round_trip_is_bitwise(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What is saved comes back with the same tensors, the same description, in evaluation mode; saved again,
    the same bytes."""
    model = fresh(SPECS[kind], dtype=dtype)
    models.save(model, tmp_path / "a.safetensors")
    loaded = models.load(tmp_path / "a.safetensors")
    assert_same(loaded.network.state_dict(), model.network.state_dict())
    assert json.dumps(loaded.spec) == json.dumps(model.spec)
    assert not loaded.network.training
    assert all(p.requires_grad for p in loaded.network.parameters())
    models.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("kind", SPECS)
def test_loaded_model_computes_the_same(kind: str, saved: Path) -> None:
    """Schedule, prediction and consistency function come back with the weights: x0 and eps are bitwise those
    of before."""
    model = fresh(SPECS[kind])
    models.save(model, saved)
    loaded = models.load(str(saved))
    assert torch.equal(output(loaded), output(model))
    assert isinstance(loaded.denoiser(), ConsistencyFunction if kind == "consistency" else Denoiser)


def test_a_model_keeps_the_grid_it_is_meant_for(saved: Path) -> None:
    """`model.grid` is time_grid with the settings of the description, through a file too; settings given take
    their place."""
    own: dict[str, Any] = {"spacing": "karras", "t_start": 90, "t_end": 2}
    models.save(fresh({**UNET, "grid": own}), saved)
    for model in (fresh({**UNET, "grid": own}), models.load(saved)):
        assert list(model.grid(7)) == list(time_grid(model.schedule, 7, **own))
        assert list(model.grid(7, spacing="trailing")) == list(
            time_grid(model.schedule, 7, spacing="trailing")
        )
    assert list(fresh(UNET).grid(7)) == list(time_grid(fresh(UNET).schedule, 7))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"grid": {"spacing": "karass"}}, "did you mean 'karras'"),
        ({"grid": {"t_strat": 90}}, "t_strat"),
        ({"grid": {"t_start": 1000}}, r"t must lie in \[-1, 99\].* not 1000"),
        ({"consistency": {"name": "cmm"}}, "did you mean 'cm'"),
    ],
)
def test_a_description_that_cannot_be_sampled_is_refused_when_built(
    part: dict[str, Any], message: str
) -> None:
    """Not only when the grid or the consistency function is first used, hours later."""
    with pytest.raises(ValueError, match=message):
        models.build({**UNET, **part})


def test_an_edm_model_is_preconditioned_as_edm() -> None:
    """c_in, c_noise, c_skip and c_out come with the prediction's name on EDM's schedule; elsewhere they would
    be wrong, and are refused."""
    spec = {**UNET, "schedule": {"name": "ve"}, "prediction": "edm"}
    model = fresh(spec)
    level, x, label = model.schedule.level(3.0), torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    expected = Denoiser(model.network, VarianceExploding(), EDM)(x, level, Condition(label=label))
    assert torch.equal(model.denoiser()(x, level, Condition(label=label)).x0, expected.x0)
    with pytest.raises(ValueError, match="needs schedule 've'"):
        models.build({**UNET, "prediction": "edm"})


def test_null_is_the_label_after_the_last() -> None:
    """What guidance replaces a label by is the class that means none."""
    null = fresh(UNET).null
    assert {name: value.tolist() for name, value in null.tensors.items()} == {"label": [10]}
    assert fresh({**UNET, "network": {**UNET["network"], "num_classes": None}}).null is NONE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": 3}, "network must be a mapping"),
        ({"schedule": None}, "a schedule must be a mapping"),
        ({"schedule": {"name": "flow", "shift": "3"}}, "shift of a schedule must be a number, not '3'"),
        (
            {"schedule": {"name": "linear", "steps": 2.5}},
            "steps of schedule 'linear' must be a whole number, not 2.5",
        ),
        ({"grid": 3}, "grid must be a mapping"),
        ({"grid": {"steps": 3}}, "steps is not an option of the grid"),
        ({"grid": {"terminal": "dta"}}, "terminal of the grid must be one of data, t_min, not 'dta'"),
        ({"family": "sdlx"}, "no family named 'sdlx'; did you mean 'sdxl'"),
        ({"shape": "big"}, "shape must be a list of 3 whole numbers"),
        *(
            ({"network": {**UNET["network"], name: value}}, message)
            for name, value, message in [
                ("num_classes", "abc", "unet.num_classes must be a whole number or null, not 'abc'"),
                ("attention", ["a"], "unet.attention must be a list of whole numbers"),
                ("groups", 0, "groups must be at least 1, not 0"),
                ("channels", -32, "channels must be at least 1, not -32"),
                ("channel_mult", [1, 0], r"channel_mult must be at least 1, not \(1, 0\)"),
                ("time_factor", float("nan"), "unet.time_factor must be a number"),
            ]
        ),
        *(
            ({"network": {**DIT["network"], name: 0}}, f"{name} must be at least 1, not 0")
            for name in ("patch_size", "heads", "hidden", "depth", "image_size")
        ),
    ],
)
def test_a_wrong_description_is_one_line(changes: dict[str, Any], message: str) -> None:
    """Wrong types and sizes are named before there is a network."""
    with pytest.raises(ValueError, match=message) as refusal:
        models.build({**UNET, **changes})
    assert "\n" not in str(refusal.value)


def test_a_key_of_no_known_part_is_refused(saved: Path) -> None:
    """Not skipped in silence: it may be what the caller thought was loaded."""
    everything, metadata = native.read(saved)
    native.write(saved, {**everything, "netwrk.conv_in.weight": torch.ones(1)}, metadata)
    with pytest.raises(
        ValueError, match=r"holds netwrk\.conv_in\.weight, which belongs to no part of a model"
    ):
        models.load(saved)


def test_report_accounts_for_every_key(saved: Path, trained: tuple[Path, Model, EMA]) -> None:
    """Consumed and ignored keys together are those of the file, none of them twice."""
    for path, ema in ((saved, True), (saved, False), (trained[0], True), (trained[0], False)):
        report = models.load(path, ema=ema).report
        assert report is not None
        assert sorted([*report.consumed, *report.ignored]) == sorted(native.read(path)[0])
        assert report.layout == "native"
    assert models.build(UNET).report is None


def test_average_is_taken_unless_raw_weights_are_asked_for(trained: tuple[Path, Model, EMA]) -> None:
    """A run's folder gives the average, in the network's dtype; `ema=False` gives the raw weights. The report
    tells which."""
    folder, model, ema = trained
    raw, average = models.load(folder, ema=False), models.load(folder)
    assert raw.report is not None
    assert average.report is not None
    assert_same(raw.network.state_dict(), model.network.state_dict())
    assert_same(
        dict(average.network.named_parameters()),
        {name: value.bfloat16() for name, value in ema.average.items()},
    )
    assert_same(dict(average.network.named_buffers()), dict(model.network.named_buffers()))
    assert set(raw.report.ignored) == {f"ema.{name}" for name in ema.average} | {"optimizer.0.step"}
    assert set(average.report.ignored) == {f"network.{name}" for name in ema.average} | {"optimizer.0.step"}


def test_file_without_average_gives_its_raw_weights(saved: Path) -> None:
    """Asking for the average of a file that has none is no error."""
    assert_same(
        models.load(saved, ema=True).network.state_dict(), models.load(saved, ema=False).network.state_dict()
    )


def test_no_socket_is_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither saving nor loading reaches for a network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    models.save(models.load(saved), saved)
    with pytest.raises(FileNotFoundError):
        models.load("runwayml/stable-diffusion-v1-5")


def test_saving_over_the_file_that_is_loaded(saved: Path) -> None:
    """A model may go back to the file it is mapped from, and that file's old bytes stay valid for it."""
    model = models.load(saved)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    models.save(model, saved)
    assert_same(model.network.state_dict(), before)
    assert_same(models.load(saved).network.state_dict(), before)


def _foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def _foreign_metadata(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt", "author": "somebody"})


def _changed(
    change: Callable[[dict[str, Tensor]], object], spec: Mapping[str, Any] = UNET
) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = tensors(fresh(UNET))
        change(state)
        native.write(path, state, {"model": spec})

    return write


def _described(**parts: Any) -> Callable[[Path], None]:
    return _changed(lambda state: None, {**UNET, **parts})


def _cut(where: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        models.save(fresh(UNET), path)
        data = path.read_bytes()
        path.write_bytes(data[: int(where * len(data))])

    return write


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda path: None, "no such file or folder: PATH"),
    "a folder without one": (
        Path.mkdir,
        "PATH holds no model, neither a training run's checkpoint nor diffusers' folders",
    ),
    "empty": (Path.touch, "PATH holds no weights: it is empty"),
    "text": (
        lambda path: path.write_text("not a model\n" * 100),
        "PATH is not a safetensors file: it begins with b'not a mo'",
    ),
    "a pickle": (
        lambda path: torch.save({"weight": torch.zeros(2)}, path),
        # read as what it is, whatever its name
        "PATH holds no known model: no known network has the keys weight",
    ),
    "foreign": (_foreign, "PATH holds no known model: no known network has the keys weight"),
    "foreign metadata": (
        _foreign_metadata,
        "PATH holds no known model: no known network has the keys weight",
    ),
    "no description": (
        lambda path: native.write(path, tensors(fresh(UNET)), {"model": 3}),
        "PATH holds no known model",
    ),
    "half a description": (
        lambda path: save_file({"weight": torch.zeros(2)}, path, {"model": '{"network": '}),
        "PATH is damaged or not one of our safetensors files",
    ),
    "not finite": (
        _changed(lambda state: state["network.down.1.conv.bias"].fill_(float("nan"))),
        "PATH is damaged: network.down.1.conv.bias holds values that are not finite",
    ),
    "other metadata": (
        lambda path: save_file(tensors(fresh(UNET)), path, {"model": json.dumps(UNET), "author": "somebody"}),
        "PATH is damaged or not one of our safetensors files",
    ),
    "wrong shape": (
        _changed(lambda state: state.update({"network.conv_in.weight": torch.zeros(16, 3, 3, 3)})),
        "PATH is of another architecture: network.conv_in.weight is (16, 3, 3, 3), not (16, 1, 3, 3)",
    ),
    "wrong shapes": (
        _changed(
            lambda state: None, {**UNET, "network": {**UNET["network"], "num_classes": 7, "in_channels": 2}}
        ),
        "PATH is of another architecture: network.label.table.weight is (11, 64), not (8, 64)",
    ),
    "missing key": (
        _changed(lambda state: state.pop("network.conv_in.weight")),
        "PATH lacks network.conv_in.weight",
    ),
    "missing keys": (
        _changed(lambda state: [state.pop(f"network.conv_in.{p}") for p in ("bias", "weight")]),
        "PATH lacks network.conv_in.weight and 1",
    ),
    "ghost key": (
        _changed(lambda state: state.update({"network.ghost": torch.zeros(2)})),
        "PATH holds network.ghost, which its backbone",
    ),
    "ghost average": (
        _changed(
            lambda state: state.update(
                {f"ema.{k.removeprefix('network.')}": v + 1 for k, v in state.items()}
                | {"ema.ghost": torch.ones(1)}
            )
        ),
        "PATH holds ema.ghost, which its backbone does not have",
    ),
    "half an average": (
        _changed(lambda state: state.update({"ema.conv_in.weight": state["network.conv_in.weight"] + 1})),
        "PATH averages only some of its weights: it lacks ema.time.fc1.weight",
    ),
    "network typo": (
        _described(network={**UNET["network"], "name": "unnet"}),
        "no network named 'unnet'; did you mean 'unet'?",
    ),
    "parameter typo": (
        _described(network={**UNET["network"], "chanels": 16}),
        "no unet parameter named 'chanels'; did you mean 'channels'?",
    ),
    "schedule typo": (
        _described(schedule={"name": "scaled_liner"}),
        "no schedule named 'scaled_liner'; did you mean 'scaled_linear'?",
    ),
    "prediction typo": (_described(prediction="esp"), "no prediction named 'esp'; did you mean 'eps'?"),
    "part typo": (
        _described(consistancy={"name": "cm"}),
        "no model part named 'consistancy'; did you mean 'consistency'?",
    ),
    "consistency typo": (
        _described(consistency={"name": "lmc"}),
        "no consistency parametrisation named 'lmc'; did you mean 'lcm'?",
    ),
    "option typo": (
        _described(schedule={"name": "linear", "stepz": 9}),
        "no option of schedule 'linear' named 'stepz'; did you mean 'steps'?",
    ),
    "no such option": (
        _described(schedule={"name": "flow", "steps": 9}),
        "no option of schedule 'flow' named 'steps'; known: none",
    ),
    "part missing": (
        _changed(lambda state: None, {"network": UNET["network"]}),
        "the model's description lacks 'schedule'",
    ),
}
BAD |= {
    f"cut at {at:g}": (_cut(at), f"PATH is damaged: {what}")
    for at, what in {
        0.00001: "its header should be 17,688 bytes long",
        0.001: "its header should be 17,688 bytes long",
        0.2: "network.up.4.res.skip.weight ends at byte 963,428, the file at 192,685",
        0.999: "network.up.4.res.skip.weight ends at byte 963,428, the file at 962,464",
    }.items()
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_one_clear_line(case: str, tmp_path: Path) -> None:
    """What cannot be loaded raises one line that names the file and what is wrong with it."""
    make, message = BAD[case]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        models.load(path)
    text = str(caught.value)
    assert message.replace("PATH", str(path)) in text
    assert str(path) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("stage", "error"),
    [("write", SafetensorError("disk full"))]  # the writer's own; the others are the system's
    + [
        (stage, error)
        for stage in ("write", "flush", "rename")
        for error in (OSError("disk full"), KeyboardInterrupt("stopped"))
    ],
)
def test_failed_write_leaves_the_old_file_whole(
    stage: str, error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stops a write, and wherever, the old file stays as it was and nothing else is left in the
    folder."""
    before = saved.read_bytes()

    def half_written(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise error

    def fail(*args: object) -> None:
        assert len(list(saved.parent.iterdir())) == 2  # the old file and the temporary one
        raise error

    if stage == "write":
        monkeypatch.setattr(native, "save_file", half_written)
    else:
        monkeypatch.setattr(os, {"flush": "fsync", "rename": "replace"}[stage], fail)
    with pytest.raises((OSError, KeyboardInterrupt), match=str(error)):
        models.save(fresh(UNET, seed=1), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_save_makes_the_folders_it_needs(tmp_path: Path) -> None:
    """A path in folders that do not exist yet is no error; one below a file is, and says so."""
    path = tmp_path / "a" / "b" / "model.safetensors"
    models.save(fresh(UNET), path)
    assert_same(models.load(path).network.state_dict(), fresh(UNET).network.state_dict())
    with pytest.raises(OSError, match=r"model\.safetensors"):
        models.save(fresh(UNET), path / "c.safetensors")


# Hostile descriptions ---------------------------------------------------------------------------------------

ODD = [
    "1000000",
    "4000000000000",
    "4e12",
    "1e308",
    "-1",
    "0",
    "NaN",
    "Infinity",
    "1e999",
    '"x"',
    "[]",
    "{}",
    "null",
    "true",
]
ODD += [
    "[" * 500 + "]" * 500,
    "[" * 50_000 + "]" * 50_000,
    "[" + "1," * 20_000 + "1]",
    "9" * 4000,
    '"' + "x" * 20_000 + '"',
]
HOSTILE: dict[str, dict[str, Any]] = {
    "unet": {
        **UNET,
        "network": {**UNET["network"], "time_factor": 1.0},
        "shape": [1, 8, 8],
        "grid": {"spacing": [99.0, 50.0, 10.0], "shift": 1.0},
    },
    "dit": {**DIT, "shape": [1, 8, 8], "sampling": {"sampler": "euler", "steps": 20, "guidance": 2.0}},
    "sd1": {},  # a miniature, of all kinds of parts
}


def leaves(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of everything in a description; of a list its first element."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else list(enumerate(value))[:1]
        if isinstance(value, list)
        else ()
    )
    return [place, *(each for key, item in inner for each in leaves(item, (*place, key)))]


def replaced(value: Any, place: tuple[Any, ...], text: str) -> str:
    """A description in JSON with some other JSON in that place."""
    if not place:
        return text
    if isinstance(value, dict):
        parts = {
            key: replaced(inner, place[1:], text) if key == place[0] else json.dumps(inner)
            for key, inner in value.items()
        }
        return "{" + ", ".join(f"{json.dumps(key)}: {part}" for key, part in parts.items()) + "}"
    return f"[{', '.join([replaced(value[0], place[1:], text), *map(json.dumps, value[1:])])}]"


def with_description(whole: Path, path: Path, description: str) -> None:
    """A file that says something else of its model than that one, with zeros for its weights, which take no
    place on the disk."""
    with open(whole, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header["__metadata__"]["model"] = description
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + whole.stat().st_size - 8 - length)


def refusal(path: Path) -> str | None:
    """What loading says of a file, None where it loads."""
    try:
        models.load(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", HOSTILE)
def test_an_odd_value_in_a_description_is_one_line(name: str, tmp_path: Path) -> None:
    """Whatever stands in any place of it: a model, or one line that names the file, at once."""
    path, whole = tmp_path / "model.safetensors", tmp_path / "whole.safetensors"
    model = fresh(HOSTILE[name]) if HOSTILE[name] else models.presets.miniature(name)
    model.preview = None
    models.save(model, whole)
    assert refusal(whole) is None
    spec = json.loads(open_tensors(whole).metadata["model"])
    places = leaves(spec)
    odd = ODD if HOSTILE[name] else ODD[1:2]  # a miniature takes a while to load
    for place in places:
        for text in odd:
            with_description(whole, path, replaced(spec, place, text))
            said = refusal(path)
            assert said is None or ("\n" not in said and str(path) in said and len(said) < 700), (
                place,
                text[:40],
                said,
            )


@pytest.mark.parametrize(
    ("place", "text", "message"),
    [
        (("network", "blocks"), "1000000", "network.blocks can be at most 4,096"),
        (
            ("network", "blocks"),
            "3000",
            "describes a model that cannot be built: it takes far more than the ",
        ),
        (("network", "channels"), "4000000000000", "network.channels can be at most 4,096"),
        (("network", "channels"), "4096", "it takes far more than the "),
        (("network", "num_classes"), "1000000000", "network.num_classes"),
        (("network", "time_factor"), "1e308", "time_factor must be a number, not 1e[+]308"),
        (("schedule", "steps"), "1000000000", "2 to 100,000 steps, not 1,000,000,000"),
        (("shape", 0), "-1", r"shape holds sizes from 1 to 4,096, not \[-1, 8, 8\]"),
        (("shape", 0), "3", "shape says that samples have 3 channels, and the network takes 1"),
        (("shape",), "[1, 100000, 8]", "shape holds sizes from 1 to 4,096"),
        (("prediction",), "1e999", "holds 1e999, which is not a finite number"),
        (("sampling",), '{"steps": 1000000000}', "sampling.steps must be 1 to 10,000"),
        (("sampling",), '{"guidance": "much"}', "sampling.guidance must be a number"),
        (("family",), "[]", "family must be a text"),
    ],
)
def test_absurd_numbers_are_named(place: tuple[Any, ...], text: str, message: str, tmp_path: Path) -> None:
    """By the setting and what it may be, before a network is built for them."""
    spec = {**HOSTILE["unet"], "sampling": {}, "family": "sd1"}
    models.save(fresh(spec), whole := tmp_path / "whole.safetensors")
    with_description(
        whole, path := tmp_path / "model.safetensors", replaced(json.loads(json.dumps(spec)), place, text)
    )
    with pytest.raises(ValueError, match=message) as refused:
        models.load(path)
    assert str(path) in str(refused.value)


def test_a_file_is_checked_by_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it is read: a bit that is not as training wrote it, which loading does not see, and numbers that
    are not finite."""
    model = fresh(DIT)
    values, said = model.state_dict(), native.metadata_of(model)
    native.write(tmp_path / native.FILE_NAME, values, {**said, "checksum": native.checksum(values, said)})
    first = next(iter(values))
    monkeypatch.setattr(sys, "argv", ["models", "check", str(tmp_path)])
    assert main() == 0
    assert f"{len(values)} tensors loaded (native layout)" in (shown := capsys.readouterr().out)
    assert "all weights are finite" in shown
    damaged = {**values, first: values[first] + 1e-3}
    native.write(tmp_path / native.FILE_NAME, damaged, {**said, "checksum": native.checksum(values, said)})
    models.load(tmp_path)
    with pytest.raises(
        SystemExit, match=rf"^error: {tmp_path} is damaged: its contents do not match its checksum$"
    ):
        main()
    lost = {**values, first: values[first] * torch.nan}
    native.write(tmp_path / "model.safetensors", lost, said)
    monkeypatch.setattr(sys, "argv", ["models", "check", str(tmp_path / "model.safetensors")])
    with pytest.raises(SystemExit, match=r"^error: .*not finite"):
        main()
