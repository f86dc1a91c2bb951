"""Damaged, hostile and foreign files: how to make them, and a program that loads each where memory is short
and there is no network.

python -m tests.models.files.damaged FOLDER     writes FOLDER/said.json: {case: [kind of error, message,
                                                seconds]}
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import models
from models import Model
from tests.models.files.published import manifests
from tests.models.files.tiny import tiny

Make = Callable[[Path], Any]
"""Writes what is to be loaded at or below a path, and may return another path than that to load."""

ONE = torch.zeros(1)
MANY = {str(i): ONE for i in range(1000)}
T5_DISTANCES = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
UNET_KEY = "model.diffusion_model.middle_block.0.in_layers.2.weight"


def raw(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[Any], first: Any, last: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def written(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


def one(shape: list[Any], first: Any = 0, last: Any = 16, dtype: Any = "F32", key: str = "weight") -> Make:
    """A file of one tensor with 16 bytes of data."""
    return written(raw({key: entry(shape, first, last, dtype)}, bytes(16)))


def single_file() -> dict[str, Tensor]:
    """The tensors of a model's single file: by name, so that a case can change some."""
    model, path = tiny("sd1"), Path(os.environ["DAMAGED_FOLDER"]) / "sd1.safetensors"
    if not path.exists():
        models.save(model, path, "ldm")
    return load_file(path)


def changed(change: Callable[[dict[str, Tensor]], object]) -> Make:
    def write(path: Path) -> None:
        state = single_file()
        change(state)
        save_file(state, path)

    return write


def with_value(key: str, value: float) -> Make:
    return changed(lambda state: state[key].view(-1)[-1:].fill_(value))


def cut(where: float) -> Make:
    def write(path: Path) -> None:
        content = save(single_file())
        path.write_bytes(content[: int(where * len(content))])

    return write


def pickled(content: Any, zipped: bool = True) -> Make:
    def write(path: Path) -> Path:
        torch.save(content, path.with_suffix(".ckpt"), _use_new_zipfile_serialization=zipped)
        return path.with_suffix(".ckpt")

    return write


class Hostile:
    """Unpickled as it asks to be, it writes a file."""

    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"echo ran > {self.proof}",)


def hostile(name: str, zipped: bool) -> Make:
    def write(path: Path) -> Path:
        content = {"state_dict": {"weight": torch.zeros(2), "more": Hostile(str(path.with_suffix(".ran")))}}
        target = path.with_suffix(name)
        torch.save(content, target, pickle_module=pickle, _use_new_zipfile_serialization=zipped)
        return target

    return write


def bare_pickle(path: Path) -> Path:
    path.with_suffix(".pt").write_bytes(pickle.dumps(Hostile(str(path.with_suffix(".ran")))))
    return path.with_suffix(".pt")


def zip_bomb(path: Path) -> Path:
    """A pickle of half a GiB of zeros in as many KiB."""
    target = path.with_suffix(".ckpt")
    with (
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("model/data.pkl", "w", force_zip64=True) as file,
    ):
        for _ in range(8):
            file.write(bytes(64 << 20))
    return target


def sharded(places: Mapping[str, str], *shards: str) -> Make:
    """An index beside shards of one tensor each, named after them."""

    def write(path: Path) -> Path:
        path.mkdir()
        for name in shards:
            save_file({name.split(".")[0]: torch.zeros(2)}, path / name)
        index = path / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        return index

    return write


PACKED = {
    "bitsandbytes' NF4": ("weight.quant_state.bitsandbytes__nf4", "weight.absmax", "weight.quant_map"),
    "bitsandbytes' FP4": ("weight.quant_state.bitsandbytes__fp4", "weight.absmax", "weight.quant_map"),
    "bitsandbytes' int8": ("SCB", "weight_format"),
    "GPTQ": ("g_idx", "qweight", "qzeros", "scales"),
    "AWQ or GPTQ": ("qweight", "qzeros", "scales"),
    "SVDQuant (nunchaku)": ("smooth_factor", "qweight", "lora_down", "lora_up", "wscales"),
    "quanto": ("weight._data", "weight._scale"),
    "torchao": ("weight_qdata", "weight_scale"),
    "NVFP4": ("weight_scale_2", "weight_scale"),
}
PACKED = {what: tuple(f"double_blocks.0.img_attn.qkv.{key}" for key in keys) for what, keys in PACKED.items()}


def packed(*keys: str) -> Make:
    """A FLUX.1 whose weights a packer has replaced by other tensors."""
    return lambda path: save_file(
        {"img_in.weight": torch.zeros(64, 64), **{key: torch.zeros(4, dtype=torch.uint8) for key in keys}},
        path,
    )


def of_keys(manifest: str) -> Make:
    """A file with the keys of a published one."""
    return lambda path: save_file(
        {key: torch.zeros([1] * len(shape)) for key, shape in manifests()[manifest].items()}, path
    )


def flow(family: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], part: str = "") -> Make:
    """A part of a flow in a file of its own, the backbone if no other is named, with its tensors changed."""

    def write(path: Path) -> None:
        folder = Path(os.environ["DAMAGED_FOLDER"]) / family
        if not folder.exists():
            models.save(tiny(family), folder, "separate")
        state = change(load_file(folder / f"{part or family}.safetensors"))
        save_file({key: value.contiguous() for key, value in state.items()}, path)

    return write


def without(state: dict[str, Tensor], *beginnings: str) -> dict[str, Tensor]:
    """All but the keys that begin so."""
    return {key: value for key, value in state.items() if not key.startswith(beginnings)}


def ungated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """T5's MLPs of version 1.0: one matrix to the inside, not two."""
    return {key.replace(".wi_0.", ".wi."): value for key, value in state.items() if ".wi_1." not in key}


def two_unets(state: dict[str, Tensor]) -> None:
    state |= {
        key.removeprefix("model.diffusion_model."): value.clone()
        for key, value in state.items()
        if key.startswith("model.")
    }


def half_a_tower(state: dict[str, Tensor]) -> None:
    for key in [key for key in state if "encoder.layers.1." in key]:
        del state[key]


def part_of_clip_l(path: Path) -> None:
    """Six of its twelve blocks, of full width; all zeros, on a disk that keeps none of them."""
    shapes = {
        key: shape
        for key, shape in manifests()["clip_l_text_transformers"].items()
        if not any(f".{i}." in key for i in range(6, 12))
    }
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = entry(list(shape), end, end + size, "F16")
        end += size
    path.write_bytes(raw(header))
    os.truncate(path, path.stat().st_size + end)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


HEADER = "PATH is damaged or not a safetensors file: its header cannot be read"
CASES: dict[str, tuple[Make, str]] = {
    # what is no file of weights
    "nothing": (lambda path: None, "no such file or folder: PATH"),
    "an empty file": (Path.touch, "PATH holds no weights: it is empty"),
    "a text": (written(b"once upon a time"), "PATH is not a safetensors file: it begins with b'once upo'"),
    "a web page": (
        written(b"<!DOCTYPE html><html><body>404</body></html>"),
        "PATH holds no weights: it is a web page",
    ),
    "another web page": (written(b"\n <html>Sign in</html>"), "PATH holds no weights: it is a web page"),
    "a pointer": (
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "PATH holds no weights: it is Git LFS's pointer",
    ),
    "an image": (
        lambda path: _named(path, ".png", b"\x89PNG"),
        "PATH is not a weights file: expected .safetensors, .sft, .ckpt, ",
    ),
    "an empty folder": (
        Path.mkdir,
        "PATH holds no model, neither a training run's checkpoint nor diffusers' folders: no sub-folder",
    ),
    "a folder of files": (
        lambda path: _folder(path, "sdxl.safetensors", ""),
        "PATH holds no model, neither a training run's checkpoint nor diffusers' folders: load the file "
        "itself: PATH/sdxl.safetensors",
    ),
    "a folder with an index alone": (
        lambda path: _folder(path, "model_index.json", "{}"),
        "PATH holds no model, neither a training run's checkpoint nor diffusers' folders: no sub-folder",
    ),
    # headers
    "a header that is cut": (
        written(b"\x10\x00\x00"),
        "PATH is damaged: its header should be 16 bytes long, and the file has 3",
    ),
    "a header that is too long": (
        written(raw(b"{}", length=5000)),
        "PATH is damaged: its header should be 5,000 bytes long",
    ),
    "a header longer than any": (
        written(raw(b"{}", length=2**63)),
        "PATH is not a safetensors file: it begins with b'\\x00",
    ),
    "a header that is no JSON": (written(raw(b"weights: none")), f"{HEADER} (Expecting value"),
    "a header that is no text": (written(raw(b"\xff\xfe\xfd{}")), f"{HEADER} ("),
    "a header that is a list": (written(raw(b"[1]")), f"{HEADER} (it is not a table of tensors)"),
    "a deep header": (written(raw(nested(100_000))), f"{HEADER} (maximum recursion depth exceeded"),
    "a number without end": (written(raw(b'{"weight": ' + b"9" * 100_000 + b"}")), f"{HEADER} ("),
    "a key with control characters twice": (
        written(raw(b'{"\\u001b[2J\\n": 1, "\\u001b[2J\\n": 2}')),
        f"{HEADER} (it holds [2J twice)",
    ),
    "a key twice": (written(raw(b'{"a": 1, "b": {}, "a": 2}')), f"{HEADER} (it holds a twice)"),
    "metadata of numbers": (
        written(raw({"__metadata__": {"a": 1}})),
        "PATH is damaged: __metadata__ must hold texts",
    ),
    "metadata of nothing": (
        written(raw({"__metadata__": None})),
        "PATH is damaged: __metadata__ must hold texts",
    ),
    "nothing but metadata": (
        written(raw({"__metadata__": {"format": "pt"}})),
        "PATH holds no known model: it holds no tensors",
    ),
    "an entry without a place": (
        written(raw({"weight": {"dtype": "F32", "shape": [4]}})),
        "PATH is damaged: weight lacks dtype, shape",
    ),
    "an entry of one number": (written(raw({"weight": 3})), "PATH is damaged: weight lacks dtype, shape"),
    "a name of two lines": (
        one([4], key="two\nlines"),
        r"PATH is damaged: 'two\nlines' is not a tensor's name",
    ),
    "a name without end": (one([4], key="a" * 5000), "PATH is damaged: 'aaaa"),
    "an unknown dtype": (
        one([4], dtype="Q4_K"),
        "PATH cannot be read: weight has the dtype 'Q4_K'; known are F64, F32",
    ),
    "a dtype without end": (
        one([4], dtype="\x1b" * 5000),
        r"PATH cannot be read: weight has the dtype '\x1b\x1b",
    ),
    "a dtype that is a list": (one([4], dtype=["F32"]), "PATH cannot be read: weight has the dtype ['F32']"),
    "a negative shape": (one([-4]), "PATH is damaged: weight has the impossible shape [-4]"),
    "a shape of fractions": (one([4.0]), "PATH is damaged: weight has the impossible shape [4.0]"),
    "a shape of truths": (one([True, 4]), "PATH is damaged: weight has the impossible shape [True, 4]"),
    "a shape of letters": (one("4"), "PATH is damaged: weight has the impossible shape ['4']"),  # type: ignore[arg-type]  # as a file may
    "a huge shape": (
        one([2**62, 2**62]),
        "PATH is damaged: weight has the impossible shape [4611686018427387904",
    ),
    "a huge shape of nothing": (
        one([2**47, 0], 0, 0),
        "PATH is damaged: weight ends at byte 91, the file at 107",
    ),
    "a shape of many dimensions": (
        one([1] * 60 + [4]),
        "PATH is damaged: weight has the impossible shape [1, 1",
    ),
    "a shape that fills less": (
        one([3]),
        "PATH is damaged: weight, F32 of shape [3], does not fill its 16 bytes",
    ),
    "a shape that fills more": (
        one([5]),
        "PATH is damaged: weight, F32 of shape [5], does not fill its 16 bytes",
    ),
    "a dtype that fills less": (
        one([4], dtype="F16"),
        "PATH is damaged: weight, F16 of shape [4], does not fill its 16 bytes",
    ),
    "a place beyond the file": (one([8], 0, 32), "PATH is damaged: weight ends at byte "),
    "a place before the file": (
        one([4], -16, 0),
        "PATH is damaged: weight has the impossible shape [4] or position [-16, 0]",
    ),
    "a place backwards": (
        one([4], 16, 0),
        "PATH is damaged: weight, F32 of shape [4], does not fill its -16 bytes",
    ),
    "data that nobody names": (one([2], 0, 8), "PATH is damaged: weight ends at byte "),
    "tensors that overlap": (
        written(raw({"a": entry([3], 0, 12), "b": entry([3], 4, 16)}, bytes(16))),
        "PATH is damaged: b overlaps a (it starts at byte 4 of the data, not 12)",
    ),
    "tensors with a gap": (
        written(raw({"a": entry([1], 0, 4), "b": entry([1], 12, 16)}, bytes(16))),
        "PATH is damaged: b leaves a gap after a (it starts at byte 12 of the data, not 4)",
    ),
    "a gap at the start": (one([3], 4, 16), "PATH is damaged: weight leaves a gap after the header"),
    "a hundred thousand tensors": (
        lambda path: path.write_bytes(
            raw({str(i): entry([], i, i + 1, "U8") for i in range(200_000)}, bytes(200_000))
        ),
        "PATH holds no model: no known one has as many as 200,000 tensors",
    ),
    # weights
    "a key that is not there": (changed(lambda state: state.pop(UNET_KEY)), f"PATH lacks {UNET_KEY}"),
    "the key that a size is read from": (
        changed(lambda state: state.pop("model.diffusion_model.input_blocks.1.0.out_layers.3.weight")),
        "PATH holds an incomplete UNet: it lacks model.diffusion_model.input_blocks.1.0.out_layers.3.weight",
    ),
    "a ghost": (
        changed(lambda state: state.update({"model.diffusion_model.ghost.weight": torch.zeros(1)})),
        "PATH holds model.diffusion_model.ghost.weight, which its UNet does not have",
    ),
    "a stranger": (
        changed(lambda state: state.update({"ghost.weight": torch.zeros(1), "ghost.bias": torch.zeros(1)})),
        "PATH holds ghost.bias and 1 more, which belongs to no part of a known model",
    ),
    "a tensor of another shape": (
        changed(lambda state: state.update({UNET_KEY: torch.zeros(64, 64, 1, 1)})),
        f"PATH is of another architecture: {UNET_KEY} is (64, 64, 1, 1), not (64, 64, 3, 3)",
    ),
    "an empty tensor": (
        changed(lambda state: state.update({UNET_KEY: torch.zeros(64, 0, 3, 3)})),
        f"PATH is damaged: {UNET_KEY} has no values",
    ),
    "a tensor of numbers": (
        changed(lambda state: state.update({UNET_KEY: state[UNET_KEY].int()})),
        f"PATH holds no weights: {UNET_KEY} is torch.int32",
    ),
    "not a number": (
        with_value(UNET_KEY, float("nan")),
        f"PATH is damaged: {UNET_KEY} holds values that are not finite",
    ),
    "not a number in a fused tensor": (
        with_value(
            "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight", float("nan")
        ),
        "PATH is damaged: model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight "
        "holds values that are not finite",
    ),
    "infinity": (
        with_value(UNET_KEY, float("inf")),
        f"PATH is damaged: {UNET_KEY} holds values that are not finite",
    ),
    "minus infinity": (
        with_value(UNET_KEY, float("-inf")),
        f"PATH is damaged: {UNET_KEY} holds values that are not finite",
    ),
    "two UNets": (
        changed(two_unets),
        "PATH holds input_blocks.0.0.bias and 207 more, which belongs to no part of a known model",
    ),
    "half a text encoder": (
        changed(half_a_tower),
        "PATH lacks cond_stage_model.transformer.text_model.encoder.layers.1.layer_norm1.weight and 15 more",
    ),
    "a part of CLIP-L": (
        part_of_clip_l,
        "PATH: this is a part of a text encoder: 6 of 12 blocks of width 768",
    ),
    # what is no model
    "a LoRA": (
        of_keys("sd15_lora_kohya_r16"),
        "is of a LoRA, which models.adapted(model, {file: 1.0}) applies",
    ),
    "a ControlNet": (
        of_keys("sd15_controlnet_diffusers"),
        "is of a ControlNet, not of a model",
    ),
    "another ControlNet": (
        of_keys("sd15_controlnet_ldm"),
        "is of a ControlNet, not of a model",
    ),
    "a LoRA of FLUX": (
        of_keys("flux1_lora_kohya_r16"),
        "is of a LoRA, which models.adapted(model, {file: 1.0}) applies",
    ),
    "FLUX Redux": (
        lambda path: save_file({f"redux_{name}.weight": torch.zeros(2, 2) for name in ("up", "down")}, path),
        "redux_down.weight is of FLUX.1 Redux (prompts from images), which is not supported",
    ),
    "Chroma": (
        flow(
            "flux-schnell",
            lambda state: (
                without(state, "vector_in.", "time_in.") | {"distilled_guidance_layer.in_proj.bias": ONE}
            ),
        ),
        "an incomplete Chroma transformer: it lacks distilled_guidance_layer.in_proj.weight",
    ),
    "FLUX.2": (
        flow(
            "flux-dev",
            lambda state: (
                without(state, "vector_in.", "txt_in.") | {"double_stream_modulation_img.lin.weight": ONE}
            ),
        ),
        "double_stream_modulation_img.lin.weight is of FLUX.2, which is not supported",
    ),
    # flows and T5
    "FLUX of another size": (of_keys("flux1_schnell_bfl"), "PATH: in_channels must be at least 1, not 0"),
    "SD 3 of another size": (of_keys("sd3_medium_mmdit_sai"), "PATH: heads must be at least 1, not 0"),
    "T5 of another size": (of_keys("t5_xxl_encoder_transformers"), "PATH: buckets=1 must divide by 4"),
    "FLUX without a tensor": (
        flow("flux-dev", lambda state: without(state, "single_blocks.1.linear2.bias")),
        "PATH lacks single_blocks.1.linear2.bias",
    ),
    "FLUX without half a layer": (
        flow("flux-dev", lambda state: without(state, "guidance_in.in_layer.weight")),
        "PATH holds an incomplete FLUX transformer: it lacks guidance_in.in_layer.weight",
    ),
    "FLUX without its first block": (
        flow("flux-dev", lambda state: without(state, "double_blocks.0.")),
        "PATH holds an incomplete FLUX transformer: it lacks double_blocks.0.img_attn.norm.key_norm.scale",
    ),
    "FLUX without a block in the middle": (
        flow("flux-dev", lambda state: without(state, "single_blocks.0.")),
        "PATH lacks single_blocks.0.modulation.lin.weight and 7 more",
    ),
    "FLUX without blocks of one stream": (
        flow("flux-dev", lambda state: without(state, "single_blocks.")),
        "PATH: depth_single must be at least 1, not 0",
    ),
    "FLUX with a tensor of another shape": (
        flow("flux-dev", lambda state: state | {"txt_in.bias": torch.zeros(65)}),
        "PATH is of another architecture: txt_in.bias is (65,), not (64,)",
    ),
    "FLUX with heads that do not turn": (
        flow(
            "flux-dev",
            lambda state: state | {key: torch.ones(30) for key in state if key.endswith("_norm.scale")},
        ),
        "PATH: axes are three even numbers, for 0, row and column, not (3, 13, 13)",
    ),
    "SD 3 without a tensor": (
        flow("sd3.5-medium", lambda state: without(state, "joint_blocks.0.x_block.attn2.proj.bias")),
        "PATH lacks joint_blocks.0.x_block.attn2.proj.bias",
    ),
    "SD 3 without its first block": (
        flow("sd3.5-large", lambda state: without(state, "joint_blocks.0.")),
        "PATH lacks joint_blocks.0.x_block.adaLN_modulation.1.weight and ",
    ),
    "SD 3 without its last block": (
        flow("sd3.5-medium", lambda state: without(state, "joint_blocks.2.")),
        "PATH holds joint_blocks.1.context_block.attn.proj.bias and 5 more, which its Stable Diffusion 3 "
        "transformer does not have",
    ),
    "SD 3 that attends twice later on": (
        flow(
            "sd3.5-medium",
            lambda state: {
                key.replace("0.x_block.attn2", "1.x_block.attn2"): value for key, value in state.items()
            },
        ),
        "PATH: blocks [1] of this network attend twice, which only its first blocks may do",
    ),
    "SD 3 with positions in no square": (
        flow("sd3", lambda state: state | {"pos_embed": state["pos_embed"][:, :1000]}),
        "PATH is of another architecture: pos_embed is (1, 1000, 128), not (1, 961, 128)",
    ),
    "T5 of the first version": (
        flow("flux-dev", ungated, "t5xxl"),
        "PATH: this T5 has MLPs without gates",
    ),
    "T5 without its distances": (
        flow("flux-dev", lambda state: without(state, T5_DISTANCES), "t5xxl"),
        f"PATH holds an incomplete T5 text encoder: it lacks {T5_DISTANCES}",
    ),
    "T5 without its embeddings": (
        flow("flux-dev", lambda state: without(state, "shared."), "t5xxl"),
        "PATH holds an incomplete T5 text encoder: it lacks shared.weight",
    ),
    "an autoencoder of a flow without a tensor": (
        flow("flux-dev", lambda state: without(state, "encoder.mid.block_1.conv2.bias"), "vae"),
        "PATH lacks encoder.mid.block_1.conv2.bias",
    ),
    "a textual inversion": (
        lambda path: save_file({"emb_params": torch.zeros(2, 768)}, path),
        "is of a textual inversion",
    ),
    "an old textual inversion": (
        pickled(
            {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "cat"}
        ),
        "string_to_param.* is of a textual inversion, not of a model",
    ),
    "a textual inversion of diffusers": (
        pickled({"<cat>": torch.zeros(768)}),
        "<cat> is of a textual inversion",
    ),
    # pickles
    "a header of 20 MB": (
        written(raw(b"{}" + b" " * 20_000_000)),
        "PATH is not a safetensors file: it begins with",
    ),
    "a header of a million lists": (written(raw(b"[" + b"[]," * 1_000_000 + b"1]")), "PATH "),
    "a pickle of one table many times": (
        pickled({"state_dict": {str(i): MANY for i in range(6000)}}),
        "PATH holds no model: no known one has more than 50,000 tensors",
    ),
    "a pickle of a number without an end": (
        pickled({"global_step": 10**400, "state_dict": {"a": ONE}}),
        "PATH holds no known model",
    ),
    "a configuration of a gigabyte": (
        lambda path: _large_configuration(path),
        "PATH/config.json has 1,073,741,824 bytes, more than",
    ),
    "a pickle by another name": (
        lambda path: torch.save({"weight": torch.zeros(2)}, path),
        "PATH holds no known model: no known network has the keys weight",
    ),
    "the same weights twice": (
        lambda path: save_file({"a.weight": torch.zeros(2), "_orig_mod.a.weight": torch.zeros(2)}, path),
        "the same weights twice: keep one of them",
    ),
    **{
        f"packed by {what}": (
            packed(*keys),
            f"PATH holds {keys[0]}: its weights are packed by {what}, which is not supported",
        )
        for what, keys in PACKED.items()
    },
    "a pickle that runs code": (
        hostile(".ckpt", True),
        "does not hold plain weights, and nothing in it was run (it asks for posix.system)",
    ),
    "an old pickle that runs code": (
        hostile(".pth", False),
        "PATH does not hold plain weights, and nothing in it was run (it asks for posix.system)",
    ),
    "a bare pickle that runs code": (bare_pickle, "does not hold plain weights, and nothing in it was run ("),
    "a pickle of a list": (pickled([torch.zeros(2)]), "PATH holds a list, not tensors by name"),
    "a pickle of no tensors": (
        pickled({"epoch": 3}),
        "PATH holds no known model: it holds no tensors",
    ),
    "a pickle of a list of weights": (
        pickled({"state_dict": [1]}),
        "PATH holds a list under state_dict, not tensors by name",
    ),
    "a pickle of numbered tensors": (
        pickled({0: torch.zeros(2)}),
        "PATH is damaged: 0 is not a tensor's name",
    ),
    "a pickle of sparse tensors": (
        pickled({"weight": torch.eye(3).to_sparse()}),
        "PATH holds weight, which is not a plain tensor",
    ),
    "a pickle of tensors without data": (
        pickled({"weight": torch.zeros(3, device="meta")}),
        "PATH holds weight, which is not a plain tensor",
    ),
    "a pickle that repeats a byte": (
        pickled({"weight": torch.zeros(1).expand(2**40)}),
        "PATH is damaged: weight of shape [1099511627776] has more values than are stored",
    ),
    "a compressed pickle": (zip_bomb, "PATH is damaged or not a weights file (it is compressed)"),
    "half a pickle": (lambda path: _cut_pickle(path, True), "PATH is damaged or not a weights file ("),
    "half an old pickle": (lambda path: _cut_pickle(path, False), "PATH is damaged or not a weights file ("),
    "an old pickle that claims a terabyte": (
        lambda path: _claims_a_terabyte(path),
        "PATH is damaged or not a weights file (",
    ),
    # shards
    "a shard that is not there": (
        sharded({"a": "a.safetensors", "b": "b.safetensors"}, "a.safetensors"),
        "PATH names the shard b.safetensors, which is missing (1 of 2 are there)",
    ),
    "a shard elsewhere": (
        sharded({"a": "../a.safetensors"}),
        "PATH names the shard '../a.safetensors', which is not a weights file",
    ),
    "a shard at the root": (
        sharded({"a": "/etc/passwd"}),
        "PATH names the shard '/etc/passwd', which is not a weights file",
    ),
    "a shard with no name": (
        sharded({"a": "\0.safetensors"}),
        r"PATH names the shard '\x00.safetensors', which is not a weights file",
    ),
    "a shard with a long name": (
        sharded({"a": "x" * 5000 + ".safetensors"}),
        "which is not a weights file beside it",
    ),
    "an index of itself": (
        sharded({"a": "diffusion_pytorch_model.safetensors.index.json"}),
        "PATH names the shard 'diffusion_pytorch_model.safetensors.index.json', which is not a weights file",
    ),
    "an index of far too many": (
        sharded({f"k{i}": f"s{i}.safetensors" for i in range(50_001)}),
        "no known one has as many as 50,001 tensors",
    ),
    "an index of keys with control characters": (
        sharded({"a\x1b[2J\n": "a.safetensors"}, "a.safetensors"),
        "is not a tensor's name",
    ),
    "an index of numbers": (sharded({"a": 3}), "PATH is damaged: it has no weight_map"),  # type: ignore[dict-item]  # as a file may
    "an index of keys that are not there": (
        sharded({"a": "a.safetensors", "c": "a.safetensors"}, "a.safetensors"),
        "PATH says that a.safetensors holds c, and it does not",
    ),
    "a shard with more than its index": (
        sharded({"b": "b.safetensors", "a": "b.safetensors"}, "a.safetensors", "b.safetensors"),
        "PATH says that b.safetensors holds a, and it does not",
    ),
    "an index that is no JSON": (
        lambda path: _named(path, ".safetensors.index.json", b"["),
        "PATH is damaged: Expecting value",
    ),
    "a deep index": (
        lambda path: _named(path, ".safetensors.index.json", nested(100_000)),
        "PATH is damaged: it is nested too deeply",
    ),
}
CASES |= {
    f"cut at {at:g}": (cut(at), "PATH is damaged: ")
    for at in (1e-6, 5e-6, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999, 0.9999999)
}


def _large_configuration(path: Path) -> Path:
    """Which takes no place on the disk."""
    folder = path.with_suffix("")
    folder.mkdir()
    save_file({"conv_in.weight": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    with open(folder / "config.json", "wb") as file:
        file.truncate(2**30)
    return folder


def _named(path: Path, suffix: str, content: bytes) -> Path:
    target = path.with_suffix(suffix)
    target.write_bytes(content)
    return target


def _folder(path: Path, name: str, text: str) -> None:
    path.mkdir()
    (path / name).write_text(text)


def _cut_pickle(path: Path, zipped: bool) -> Path:
    target = pickled(single_file(), zipped)(path)
    return _named(path, ".ckpt", target.read_bytes()[: target.stat().st_size // 2])


def _claims_a_terabyte(path: Path) -> Path:
    """The number of values of a storage, in the format before the zip."""
    target: Path = pickled({"weight": torch.zeros(77777)}, False)(path)
    content = target.read_bytes()
    number = b"J" + (77777).to_bytes(4, "little")  # in the place of the storage, and in that of the shape
    assert content.count(number) == 2
    return _named(path, ".ckpt", content.replace(number, b"\x8a\x05" + (2**38).to_bytes(5, "little")))


def fuzzed(path: Path, count: int, seed: int) -> list[str]:
    """Load a small file `count` times with bytes of its header flipped at random; what was neither a model
    nor one line of error."""
    model, rng = tiny("sd1"), random.Random(seed)
    models.save(Model(None, model.schedule, model.prediction, {"family": "sd1"}, vae=model.vae), path, "ldm")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content, odd = length.to_bytes(8, "little") + file.read(length), []
    for i in range(count):
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            flipped[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        with open(path, "r+b") as file:
            file.write(flipped)
        try:
            models.load(path)
        except (ValueError, OSError) as error:
            if "\n" in str(error) or str(path) not in str(error):
                odd.append(f"{i}: {error}")
        except BaseException as error:
            odd.append(f"{i}: {type(error).__name__}: {error}")
    return odd


def _refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("a socket was opened")


def _memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return 1024 * next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )


def main(folder: Path) -> None:
    os.environ["DAMAGED_FOLDER"] = str(folder)
    socket.socket.connect = socket.create_connection = socket.getaddrinfo = _refuse  # type: ignore[assignment,method-assign]
    paths = {}
    for i, (case, (make, _)) in enumerate(CASES.items()):
        place = folder / str(i)
        place.mkdir()
        made = make(place / "model.safetensors")
        paths[case] = made if isinstance(made, Path) else place / "model.safetensors"
    said: dict[str, Any] = {}
    for name in ("sd1.safetensors", "sd3/sd3.safetensors"):  # what loading imports is not what a file costs
        models.load(folder / name)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + (256 << 20), resource.RLIM_INFINITY))
    for case, path in paths.items():
        start = time.perf_counter()
        try:
            models.load(path)
            kind, message = "none", ""
        except BaseException as error:
            kind, message = type(error).__name__, str(error)
        said[case] = [kind, message.replace(str(path), "PATH"), time.perf_counter() - start]
    said["fuzz"] = fuzzed(folder / "fuzz.safetensors", 500, seed=0)
    said["ran"] = [str(path) for path in folder.rglob("*.ran")]
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
