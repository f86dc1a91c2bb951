"""Sound files with odd names: of the file, and of the tensors in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import models
from models import Model
from models.files.prefixes import shared_prefix
from models.layouts import native
from tests.models.files.tiny import same, tiny

# One part of a model in one file: family, layout, and the file that it is saved to.
ALONE = {
    "UNet": ("sd1", "diffusers", "unet/diffusion_pytorch_model.safetensors"),
    "SDXL's UNet": ("sdxl", "diffusers", "unet/diffusion_pytorch_model.safetensors"),
    "FLUX.1": ("flux-dev", "separate", "flux-dev.safetensors"),
    "SD 3": ("sd3.5-medium", "separate", "sd3.5-medium.safetensors"),
    "SD 3 of diffusers": ("sd3.5-medium", "diffusers", "transformer/diffusion_pytorch_model.safetensors"),
    "autoencoder": ("sd1", "diffusers", "vae/diffusion_pytorch_model.safetensors"),
}
PREFIXES: tuple[str, ...] = (
    "_orig_mod.",
    "module.",
    "module._orig_mod.",
    "diffusion_model.",
    "model.diffusion_model.model._orig_mod.",
    "unet.",
    "unet.module.",
)
PREFIXES += ("model.", "net.", "transformer.", "generator.network.", "_forward_module.model.")


@cache
def tensors(kind: str) -> dict[str, Tensor]:
    """Those of one part of a miniature, as they are saved."""
    family, layout, file = ALONE[kind]
    with TemporaryDirectory() as folder:
        models.save(tiny(family), Path(folder), layout)  # type: ignore[arg-type]  # one of its layouts
        return {key: value.clone() for key, value in load_file(Path(folder) / file).items()}


def alone(kind: str) -> tuple[Model, dict[str, Tensor]]:
    """A miniature and the tensors of one of its parts."""
    return tiny(ALONE[kind][0]), dict(tensors(kind))


def check_same(found: Model, original: Model) -> None:
    """The parts that were found are those of the model."""
    assert found.parts
    for name, part in found.parts.items():
        same(part.state_dict(), original.parts[name].state_dict())


def loaded(state: dict[str, Tensor], tmp_path: Path) -> Model:
    """What a file of these tensors is, every one of which the report accounts for once."""
    save_file(state, tmp_path / "odd.safetensors")
    model = models.load(tmp_path / "odd.safetensors")
    assert model.report is not None
    assert sorted([*model.report.consumed, *model.report.ignored]) == sorted(state)
    return model


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ALONE)
def test_what_stands_before_all_names(kind: str, prefix: str, tmp_path: Path) -> None:
    """The same part as without it."""
    original, state = alone(kind)
    found = loaded({prefix + key: value for key, value in state.items()}, tmp_path)
    check_same(found, original)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_wrapped_blocks(wrapper: str, tmp_path: Path) -> None:
    """As of blocks that are compiled, sharded or checkpointed one by one."""
    original, state = alone("FLUX.1")
    wrapped = {key.replace("_blocks.0.", f"_blocks.0.{wrapper}."): value for key, value in state.items()}
    assert wrapped.keys() != state.keys()
    check_same(loaded(wrapped, tmp_path), original)


def test_a_file_of_all_parts_that_was_compiled(tmp_path: Path) -> None:
    """Where some parts are wrapped, marks and averages beside them keep their meaning."""
    models.save(tiny("sdxl-v"), tmp_path / "ldm.safetensors", "ldm")
    state = load_file(tmp_path / "ldm.safetensors")
    network = "model.diffusion_model."
    state = {key.replace(network, f"{network}_orig_mod."): value for key, value in state.items()}
    found = loaded(state, tmp_path)
    assert found.prediction.name == "v"
    check_same(found, tiny("sdxl-v"))


@pytest.mark.parametrize("prefix", ["model.", "module.lightning.pipe."])
def test_what_stands_before_a_file_of_all_parts(prefix: str, tmp_path: Path) -> None:
    """The names of a trainer's module that holds the whole model, marks and tables of it too."""
    models.save(tiny("sdxl-v"), tmp_path / "ldm.safetensors", "ldm")
    found = loaded(
        {prefix + key: value for key, value in load_file(tmp_path / "ldm.safetensors").items()}, tmp_path
    )
    assert found.prediction.name == "v"
    check_same(found, tiny("sdxl-v"))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_parts_in_one_file_as_trainers_call_them(prefix: str, tmp_path: Path) -> None:
    """unet., vae. and text_encoder. before diffusers' names."""
    models.save(tiny("sd1"), tmp_path / "folder", "diffusers")
    files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    state: dict[str, Tensor] = {}
    for part, file in files.items():
        state |= {
            f"{prefix}{part}.{key}": value
            for key, value in load_file(tmp_path / "folder" / part / f"{file}.safetensors").items()
        }
    found = loaded(state, tmp_path)
    check_same(found, tiny("sd1"))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_our_own_files_of_a_wrapped_network(wrapper: str, tmp_path: Path) -> None:
    """What a training with a compiled network may have saved."""
    models.save(tiny("sd1"), tmp_path / "native.safetensors", "native")
    tensors, metadata = native.read(tmp_path / "native.safetensors")
    native.write(
        tmp_path / "odd.safetensors",
        {key.replace(".", f".{wrapper}", 1): value for key, value in tensors.items()},
        metadata,
    )
    found = models.load(tmp_path / "odd.safetensors")
    check_same(found, tiny("sd1"))
    assert found.report is not None
    assert f"network.{wrapper}conv_in.weight" in found.report.consumed


def test_twice_the_same_weights_are_refused(tmp_path: Path) -> None:
    """With and without a wrapper: which of them is meant is unknown."""
    _, state = alone("FLUX.1")
    save_file(
        state | {f"_orig_mod.{key}": value.clone() for key, value in state.items()},
        tmp_path / "odd.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"odd\.safetensors holds .* the same weights twice: keep one of them"
    ):
        models.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["a.b.c", "a.b.d"], "a.b."),
        (["a.b.c"], "a.b."),
        (["a.b.c", "a.bc.d"], "a."),
        (["a", "a.b"], ""),
        (["a.b", "c.b"], ""),
        (["a.b", "a.c.d"], "a."),
        ([], ""),
    ],
)
def test_what_all_names_share(keys: list[str], prefix: str) -> None:
    """Whole parts of names, of all of them, without their last."""
    assert shared_prefix(keys) == prefix


# Names of files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.ckpt", "model.pt", "model.bin", "model.gguf", "model", "model.v2", "ab12" * 16]
)
def test_safetensors_by_any_name(name: str, tmp_path: Path) -> None:
    """A file's first bytes say what it is."""
    original, state = alone("FLUX.1")
    (tmp_path / name).write_bytes(save(state))
    check_same(models.load(tmp_path / name), original)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_called_safetensors(zipped: bool, tmp_path: Path) -> None:
    """Read as every pickle is, without running code."""
    original, state = alone("FLUX.1")
    torch.save({"state_dict": state}, tmp_path / "model.safetensors", _use_new_zipfile_serialization=zipped)
    check_same(models.load(tmp_path / "model.safetensors"), original)


def test_a_folder_whose_bin_is_safetensors(tmp_path: Path) -> None:
    """As some converters leave it."""
    models.save(tiny("sd1"), tmp_path, "diffusers")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(
        tmp_path / "unet" / "diffusion_pytorch_model.bin"
    )
    check_same(models.load(tmp_path), tiny("sd1"))
