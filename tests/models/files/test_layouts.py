"""Every layout there and back, bit for bit: what we write is what peers read, and what they write is what we
read."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models import Model
from models.families import FAMILIES, vae_keys
from models.files.text import read_json
from models.layouts.parts import PREFIXES
from models.networks.clip import CLIP_G, CLIP_L
from tests.models.files.tiny import SOME, STRUCTURES, same, settings, tensors, tiny, used, whole

LAYOUTS = ("native", "ldm", "diffusers")


def report(model: Model) -> models.Report:
    assert model.report is not None
    return model.report


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The file or folder of a miniature in a layout, written once; no test changes it."""
    root = tmp_path_factory.mktemp("saved")

    def path(family: str, layout: str) -> Path:
        place = root / f"{family}-{layout}"
        place = place if layout == "diffusers" else place.with_suffix(f"{place.suffix}.safetensors")
        if not place.exists():
            models.save(tiny(family), place, layout)  # type: ignore[arg-type]  # one of LAYOUTS
        return place

    return path


Saved = Callable[[str, str], Path]


# There and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layout"),
    [("sd1", "native"), ("sdxl", "native"), *((family, layout) for family in SOME for layout in LAYOUTS[1:])],
)
def test_a_model_comes_back(family: str, layout: str, saved: Saved) -> None:
    """Tensors bit for bit, the family and all that follows from it, without being told; the report accounts
    for every key."""
    model, loaded = tiny(family), models.load(saved(family, layout))
    kept = {"native": lambda m: m.state_dict(), "ldm": whole, "diffusers": used}[layout]
    same(kept(loaded), kept(model))
    ours, theirs = settings(model), settings(loaded)
    if layout == "diffusers" and family.startswith("sd2"):
        reader = ours["text"]["readers"]["clip_h"]
        network = {**reader["network"], "layers": 2, "projection": None}
        ours["text"] = {**ours["text"], "readers": {"clip_h": {**reader, "network": network, "skip": 0}}}
    assert json.loads(json.dumps(theirs)) == json.loads(json.dumps(ours))
    assert report(loaded).layout == layout
    assert report(loaded).missing == ()
    assert not any(part.training for part in loaded.parts.values())
    everything = [value for part in loaded.parts.values() for value in (*part.parameters(), *part.buffers())]
    assert {value.device.type for value in everything} == {"cpu"}
    names = [*report(loaded).consumed, *report(loaded).ignored]
    assert len(set(names)) == len(names) == len(tensors(saved(family, layout)))


@pytest.mark.parametrize("family", [*STRUCTURES, "playground-v2.5"])
def test_layouts_turn_into_each_other_and_back(family: str, saved: Saved, tmp_path: Path) -> None:
    """ldm -> ours -> ldm is the same tensors, and diffusers likewise; ldm -> diffusers -> ldm too where
    nothing is left out."""
    models.save(models.load(saved(family, "ldm")), tmp_path / "a.safetensors", "ldm")
    same(load_file(tmp_path / "a.safetensors"), load_file(saved(family, "ldm")))
    models.save(models.load(saved(family, "diffusers")), tmp_path / "a", "diffusers")
    same(tensors(tmp_path / "a"), tensors(saved(family, "diffusers")))
    models.save(models.load(saved(family, "diffusers")), tmp_path / "b.safetensors", "ldm")
    ours, theirs = load_file(tmp_path / "b.safetensors"), load_file(saved(family, "ldm"))
    # which folders of SD 2 do not keep, and readers of the file count on
    last = "cond_stage_model.model.transformer.resblocks.2."
    assert ours.keys() == theirs.keys() - {"cond_stage_model.model.text_projection"}
    same(
        {key: value for key, value in ours.items() if last not in key},
        {key: theirs[key] for key in ours if last not in key},
    )
    assert all(not value.any() for key, value in ours.items() if last in key)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_saving_in_another_dtype(family: str, layout: str, tmp_path: Path) -> None:
    """`dtype` casts what is written; read back it stays so, and is cast on demand, for all or by part."""
    path = tmp_path / ("f" if layout == "diffusers" else "f.safetensors")
    models.save(tiny(family), path, layout, dtype=torch.float16)  # type: ignore[arg-type]  # one of LAYOUTS
    half = {key: value.half() for key, value in used(tiny(family)).items()}
    same(used(models.load(path)), half)
    same(used(models.load(path, dtype=torch.float32)), {key: value.float() for key, value in half.items()})
    mixed = used(models.load(path, dtype={"vae": torch.float32, "text": torch.bfloat16}))
    dtypes = {"vae": torch.float32, "text": torch.bfloat16, "network": torch.float16}
    same(mixed, {key: value.to(dtypes[key.split(".")[0]]) for key, value in half.items()})


@pytest.mark.parametrize(("family", "channels"), [("sd1", 8), ("sdxl", 9), ("lcm", 9)])
def test_a_network_that_sees_an_image_comes_back(family: str, channels: int, tmp_path: Path) -> None:
    """Inpainting (9 channels) and editing by words (8)."""
    model = tiny(family, in_channels=channels)
    for layout, path in (("ldm", tmp_path / "a.safetensors"), ("diffusers", tmp_path / "a")):
        models.save(model, path, layout)  # type: ignore[arg-type]  # one of LAYOUTS
        loaded = models.load(path)
        same(whole(loaded), whole(model))
        assert loaded.image_channels == channels - 4
        assert loaded.spec["shape"][0] == 4
    pipeline = read_json(tmp_path / "a" / "model_index.json")["_class_name"]
    assert (
        pipeline == FAMILIES[family].architecture.pipelines[model.role]
    )  # and not the one that the family has for text alone


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_another_role_than_readers_take_is_refused(layout: Any, tmp_path: Path) -> None:
    """A network of one's own that follows edges has as many channels as pix2pix."""
    spec = tiny("sd1", in_channels=8).spec
    model = models.build(
        {**{key: value for key, value in spec.items() if key != "family"}, "role": "control"}
    )
    with pytest.raises(ValueError, match="this network for edit instead of control: use layout='native'"):
        models.save(model, tmp_path / "a.safetensors", layout)
    models.save(model, tmp_path / "a.safetensors")
    assert models.load(tmp_path / "a.safetensors").role == "control"


def test_loaded_weights_are_the_users_own(saved: Saved) -> None:
    """Writing to a model changes neither the file it is mapped from nor another model of the same file; it
    trains."""
    before = saved("sd1", "ldm").read_bytes()
    model, other = models.load(saved("sd1", "ldm")), models.load(saved("sd1", "ldm"))
    assert all(p.requires_grad for p in model.network.parameters())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    same(whole(other), whole(tiny("sd1")))
    assert saved("sd1", "ldm").read_bytes() == before


# Single files -----------------------------------------------------------------------------------------------


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[dict[str, Tensor]], Any],
    metadata: dict[str, str] | None = None,
) -> Path:
    """A copy of a file with its tensors changed."""
    state = load_file(source)
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, target, metadata)
    return target


def lightning(path: Path, state: dict[str, Tensor], zipped: bool = True, **more: Any) -> Path:
    """A .ckpt as the first Stable Diffusion's trainer wrote it: with callbacks keyed by their class, and
    losses of NumPy."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    parts = module.__name__.split(".")
    sys.modules |= {
        ".".join(parts[:i]): types.ModuleType(".".join(parts[:i])) for i in range(1, len(parts))
    } | {module.__name__: module}
    losses = {
        "best_model_score": np.float64(0.25),
        "best_model_path": "logs",
        "current_score": torch.tensor(0.25),
    }
    everything = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
    }
    everything |= {"callbacks": {callback: losses}, "optimizer_states": [], "lr_schedulers": [], **more}
    try:
        torch.save(everything, path, _use_new_zipfile_serialization=zipped)
    finally:
        for i in range(1, len(parts) + 1):
            del sys.modules[".".join(parts[:i])]
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles(zipped: bool, saved: Saved, tmp_path: Path) -> None:
    """A trainer's .ckpt, in torch's format and in the one before; loading runs no code and imports no
    trainer."""
    path = lightning(tmp_path / "model.ckpt", load_file(saved("sd1", "ldm")), zipped)
    same(whole(models.load(path)), whole(tiny("sd1")))
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".CKPT"])
def test_bare_pickles(suffix: str, saved: Saved, tmp_path: Path) -> None:
    """A state dict alone, of parameters that are no leaves and lie in memory in any order."""
    state = load_file(saved("sd1", "ldm"))
    for key, value in state.items():
        if value.ndim == 4:
            state[key] = value.contiguous(memory_format=torch.channels_last)
        elif value.ndim == 2:
            state[key] = torch.nn.Parameter(value.T.contiguous().T)
    torch.save(state, tmp_path / f"model{suffix}")
    same(whole(models.load(tmp_path / f"model{suffix}")), whole(tiny("sd1")))


def test_other_names_of_towers(saved: Saved, tmp_path: Path) -> None:
    """NovelAI's CLIP-L without text_model., and bigG's projection as a linear layer, as Playground's file has
    it."""

    def bare(state: dict[str, Tensor]) -> None:
        for key in list(state):
            state[key.replace(".text_model.", ".")] = state.pop(key)

    same(
        whole(models.load(rewritten(saved("sd1", "ldm"), tmp_path / "a.safetensors", bare))),
        whole(tiny("sd1")),
    )

    def linear(state: dict[str, Tensor]) -> None:
        state["conditioner.embedders.1.model.text_projection.weight"] = state.pop(
            "conditioner.embedders.1.model.text_projection"
        ).T

    same(
        whole(models.load(rewritten(saved("sdxl", "ldm"), tmp_path / "b.safetensors", linear))),
        whole(tiny("sdxl")),
    )


def test_extras_of_other_tools(saved: Saved, tmp_path: Path) -> None:
    """ComfyUI's projection of CLIP-L is kept, for it is a weight; counters, temperatures and tables are left
    out, with the reason."""

    def comfy(state: dict[str, Tensor]) -> None:
        state["conditioner.embedders.0.transformer.text_projection.weight"] = torch.eye(64)
        state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77.0)[
            None
        ]
        state["conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids"] = torch.arange(
            77
        )[None]
        state |= {"conditioner.embedders.0.logit_scale": torch.ones(())}
        state |= {"denoiser.sigmas": tiny("sdxl").schedule.ratio(torch.arange(1000)).float()}

    model = models.load(rewritten(saved("sdxl", "ldm"), tmp_path / "a.safetensors", comfy))
    state = whole(model)
    assert torch.equal(state.pop("text.towers.clip_l.projection.weight"), torch.eye(64))
    same(state, whole(tiny("sdxl")))
    assert len(report(model).ignored) == 4
    assert all(report(model).ignored.values())


def test_averages(saved: Saved, tmp_path: Path) -> None:
    """A file with all averages gives them unless the raw weights are asked for; two counters alone are no
    average."""
    raw = {key: value for key, value in load_file(saved("sd1", "ldm")).items() if key.startswith("model.")}

    def averaged(state: dict[str, Tensor]) -> None:
        state |= {
            f"model_ema.{key.removeprefix('model.').replace('.', '')}": value + 1
            for key, value in raw.items()
        }
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}

    path = rewritten(saved("sd1", "ldm"), tmp_path / "a.safetensors", averaged)
    loaded = models.load(path)
    same(
        dict(loaded.network.state_dict()),
        {name: value + 1 for name, value in tiny("sd1").network.state_dict().items()},
    )
    same(whole(models.load(path, ema=False)), whole(tiny("sd1")))
    for model in (loaded, models.load(path, ema=False)):
        assert sorted([*report(model).consumed, *report(model).ignored]) == sorted(load_file(path))

    def counted(state: dict[str, Tensor]) -> None:
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}

    model = models.load(rewritten(saved("sd1", "ldm"), tmp_path / "b.safetensors", counted))
    same(whole(model), whole(tiny("sd1")))
    assert report(model).ignored.keys() == {"model_ema.decay", "model_ema.num_updates"}


def test_old_names_of_the_autoencoder(saved: Saved, tmp_path: Path) -> None:
    """Before 0.18, diffusers called its attention query, key, value and proj_attn."""
    shutil.copytree(saved("sd1", "diffusers") / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if ".attentions." in key]:
            name = next((name for name in new if f".{name}." in key), None)
            if name:
                state[key.replace(f".{name}.", f".{new[name]}.")] = state.pop(key)

    rewritten(file, file, old)
    assert not any("to_q" in key for key in load_file(file))
    same(
        {
            f"vae.{key}": value
            for key, value in models.load(tmp_path / "vae").require("vae").state_dict().items()
        },
        vae_of("sd1"),
    )
    assert vae_keys.LEGACY != vae_keys.DIFFUSERS


def vae_of(family: str) -> dict[str, Tensor]:
    return {key: value for key, value in whole(tiny(family)).items() if key.startswith("vae.")}


# Folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(saved: Saved, tmp_path: Path) -> Path:
    """A diffusers folder of SD 1 to change."""
    return Path(shutil.copytree(saved("sd1", "diffusers"), tmp_path / "folder"))


def unet_file(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_the_plain_variant_comes_first(folder: Path) -> None:
    """Then any other, safetensors before pickles; one that is asked for is taken where a part has it."""
    plain = load_file(unet_file(folder))
    save_file(
        {key: value.half() for key, value in plain.items()},
        unet_file(folder).with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    torch.save({key: value + 1 for key, value in plain.items()}, unet_file(folder).with_suffix(".bin"))
    same(whole(models.load(folder)), whole(tiny("sd1")))
    half = models.load(folder, variant="fp16")
    assert {value.dtype for value in half.network.state_dict().values()} == {torch.float16}
    assert {value.dtype for value in half.require("vae").state_dict().values()} == {torch.float32}
    unet_file(folder).unlink()
    assert {value.dtype for value in models.load(folder).network.state_dict().values()} == {torch.float16}
    unet_file(folder).with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    same(
        dict(models.load(folder).network.state_dict()),
        {name: v + 1 for name, v in tiny("sd1").network.state_dict().items()},
    )
    with pytest.raises(
        FileNotFoundError, match=r"no weights of the variant 'fp61': there is diffusion_pytorch_model\.bin, "
    ):
        models.load(folder, variant="fp61")


def test_raw_weights_of_a_folder(folder: Path) -> None:
    """They lie beside the averages as the variant non_ema, of the UNet only."""
    raw = {key: value + 1 for key, value in load_file(unet_file(folder)).items()}
    save_file(raw, unet_file(folder).with_name("diffusion_pytorch_model.non_ema.safetensors"))
    expected = {name: value + 1 for name, value in tiny("sd1").network.state_dict().items()}
    same(whole(models.load(folder)), whole(tiny("sd1")))
    same(dict(models.load(folder, ema=False).network.state_dict()), expected)
    same(dict(models.load(folder, variant="non_ema").network.state_dict()), expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(kind: str, variant: str | None, folder: Path) -> None:
    """Several files and the index that says what lies where, in the plain variant and in another."""
    state = load_file(unet_file(folder))
    unet_file(folder).unlink()
    middle = len(state) // 2
    places: dict[str, str] = {}
    for i, keys in enumerate((list(state)[:middle], list(state)[middle:])):
        name = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}-0000{i + 1}-of-00002.{kind}"
        shard = {key: state[key] for key in keys}
        if kind == "bin":
            torch.save(shard, folder / "unet" / name)
        else:
            save_file(shard, folder / "unet" / name)
        places |= dict.fromkeys(keys, name)
    index = folder / "unet" / f"diffusion_pytorch_model.{kind}.index{f'.{variant}' if variant else ''}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    same(whole(models.load(folder)), whole(tiny("sd1")))
    same(whole(models.load(folder, variant=variant)), whole(tiny("sd1")))
    same(dict(models.load(index).network.state_dict()), dict(tiny("sd1").network.state_dict()))
    index.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"unet holds diffusion_pytorch_model.*-00001-of-00002.*, but not the index"
    ):
        models.load(folder)


def test_one_part_of_a_folder(folder: Path) -> None:
    """A sub-folder loads alone; what is not there is missing by name, and asking for it says so."""
    model = models.load(folder / "vae")
    assert report(model).missing == ("backbone", "text")
    with pytest.raises(ValueError, match="this model has no backbone"):
        _ = model.network
    assert list(models.load(folder / "text_encoder").parts) == ["text"]


def test_what_a_folder_holds_besides(folder: Path) -> None:
    """A safety checker is left out by name; so is what model_index.json does not name, and a named part that
    is not known is refused."""
    for name in ("safety_checker", "controlnet"):
        (folder / name).mkdir()
        save_file(
            {"controlnet_cond_embedding.conv_in.weight": torch.ones(1)}, folder / name / "model.safetensors"
        )
    (folder / "vae_1_0").mkdir()  # as beside SDXL's, an older one
    old = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(
        {key: value + 1 for key, value in old.items()},
        folder / "vae_1_0" / "diffusion_pytorch_model.safetensors",
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "controlnet": ["diffusers", "ControlNetModel"]})
    )
    with pytest.raises(
        ValueError, match=r"controlnet.model\.safetensors holds no known model: .* a ControlNet"
    ):
        models.load(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    model = models.load(folder)
    assert (
        report(model).ignored["vae_1_0/"]
        == report(model).ignored["controlnet/"]
        == "not named in model_index.json"
    )
    assert report(model).ignored["safety_checker/"] == "a filter for finished images"
    same(whole(model), whole(tiny("sd1")))


# Several files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STRUCTURES)
def test_parts_in_any_order(family: str, saved: Saved, tmp_path: Path) -> None:
    """Each part in a file of its own, in either layout, whichever comes first."""
    parts = [
        path for path in saved(family, "diffusers").rglob("*.safetensors") if path.parent.name != "preview"
    ]
    for order in (parts[1:] + parts[:1], parts[::-1]):
        model = models.load(*order, family="sdxl-refiner" if family == "sdxl-refiner" else None)
        same(used(model), used(tiny(family)))
    state = load_file(saved(family, "ldm"))
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
        groups.setdefault(prefix, {})[key] = value
    files = []
    for i, group in enumerate(groups.values()):
        files.append(tmp_path / f"{i}.safetensors")
        save_file(group, files[-1])
    same(whole(models.load(*files[::-1])), whole(tiny(family)))


def test_later_files_take_the_place_of_earlier_ones(saved: Saved, tmp_path: Path) -> None:
    """Part by part; every key of both is accounted for, with its file."""
    other = tiny("sd1", seed=1)
    models.save(other, tmp_path / "other", "diffusers")
    vae, text = (tmp_path / "other" / name for name in ("vae", "text_encoder"))
    first_vae = saved("sd1", "diffusers") / "vae" / "diffusion_pytorch_model.safetensors"
    model = models.load(saved("sd1", "ldm"), vae)
    state = {
        key: (other if key.startswith("vae.") else tiny("sd1")).state_dict()[key] for key in whole(other)
    }
    same(whole(model), state)
    same(whole(models.load(vae, saved("sd1", "ldm"))), whole(tiny("sd1")))
    same(whole(models.load(saved("sd1", "diffusers"), text, tmp_path / "other" / "unet", vae)), whole(other))
    again = models.load(saved("sd1", "diffusers"), tmp_path / "other")
    same(whole(again), whole(other))
    for loaded in (model, again):
        names = [*report(loaded).consumed, *report(loaded).ignored]
        assert len(names) == len(set(names))
    assert list(report(model).ignored.values()) == [
        "replaced by what diffusion_pytorch_model.safetensors holds"
    ] * len(load_file(first_vae))
    assert len(report(again).consumed) == len(report(again).ignored)


def test_a_tower_takes_the_place_of_its_like(saved: Saved, tmp_path: Path) -> None:
    """CLIP-L with a projection for one without; SDXL's other tower stays."""
    other = tiny("sdxl", seed=1)
    models.save(other, tmp_path / "other", "diffusers")
    file = tmp_path / "other" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"text_projection.weight": torch.eye(64)}, file)
    model = models.load(saved("sdxl", "ldm"), tmp_path / "other" / "text_encoder")
    towers = {key: value for key, value in whole(model).items() if key.startswith("text.")}
    assert torch.equal(towers.pop("text.towers.clip_l.projection.weight"), torch.eye(64))
    same(towers, {key: (other if "clip_l" in key else tiny("sdxl")).state_dict()[key] for key in towers})


# Previews ---------------------------------------------------------------------------------------------------


def preview_pair(folder: Path, model: Model) -> tuple[Path, Path]:
    """TAESD as it was published: two pickles, whose layers are numbered from 0."""
    paths = []
    for half in ("encoder", "decoder"):
        state = {}
        for name, value in model.require("preview").get_submodule(half).state_dict().items():
            for i in range(3):
                name = name.replace(f".conv{i + 1}.", f".conv.{2 * i}.")
            state[name] = value
        paths.append(folder / f"taesd_{half}.pth")
        torch.save(state, paths[-1])
    return paths[0], paths[1]


def test_previews_in_one_file_and_in_two(saved: Saved, tmp_path: Path) -> None:
    """diffusers' file, and the pair as published, in either order, alone or beside a model; later ones take
    the place of earlier ones."""
    model, other = tiny("sd1"), tiny("sd1", seed=1)
    expected = dict(model.require("preview").state_dict())
    encoder, decoder = preview_pair(tmp_path, model)
    models.save(
        models.Model(None, model.schedule, model.prediction, {"family": "sd1"}, preview=other.preview),
        tmp_path / "o",
        "diffusers",
    )
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    for paths in (
        [encoder, decoder],
        [decoder, encoder],
        [tmp_path / "o", encoder, decoder],
        [saved("sd1", "diffusers"), encoder, decoder],
    ):
        same(dict(models.load(*paths).require("preview").state_dict()), expected)
    same(
        dict(models.load(encoder, decoder, tmp_path / "o").require("preview").state_dict()),
        dict(other.require("preview").state_dict()),
    )
    with_model = models.load(saved("sd1", "ldm"), encoder, decoder)
    same(with_model.state_dict(), model.state_dict())
    assert len(report(with_model).consumed) == len(load_file(saved("sd1", "ldm"))) + 2 * 67


def test_half_a_preview_is_refused(saved: Saved, tmp_path: Path) -> None:
    """It names the other half."""
    encoder, decoder = preview_pair(tmp_path, tiny("sd1"))
    for half, other, path in (("encoder", "decoder", encoder), ("decoder", "encoder", decoder)):
        for paths in ([path], [saved("sd1", "ldm"), path], [saved("sd1", "diffusers"), path]):
            with pytest.raises(
                ValueError,
                match=f"{path.name} is only TAESD's {half}: load it with the file of the {other}, "
                f"taesd_{other}",
            ):
                models.load(*paths)


def test_towers_of_miniatures_differ() -> None:
    """Else a mix-up of SDXL's two could not be seen here."""
    assert CLIP_L.width != CLIP_G.width
