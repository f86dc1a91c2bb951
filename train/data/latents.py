"""Latents of images and contexts of captions, computed once, to train a text-to-image network on."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.messages import warn
from diffusion.settings import setting
from diffusion.spec import check_at_least_one
from models import VAE, Model, TextEncoder
from models.files.tensors import open_tensors
from models.files.writing import replacing
from samplers.generate import image_size
from samplers.pictures import MAX_PIXELS
from samplers.prompting import SCORE
from train.data.dataset import Batch
from train.data.pictures import CaptionedImages
from train.data.rows import write_header, write_rows
from train.world import World

FEW_STEPS = 4  # a family whose default is at most this is distilled


@dataclass(frozen=True)
class LatentParams:
    """How captioned images are encoded."""

    size: int | tuple[int, int] | None = setting(None, "pixels, or [height, width]; null: the model's own")
    chunks: int = setting(1, "pieces of 75 tokens read of a caption; the rest is cut, with a warning")
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the encoders: fp32 or bf16")
    batch_size: int = setting(4, "images at once")
    max_pixels: int = setting(MAX_PIXELS, "of one image; those with more are refused")
    folder: str | None = setting(None, "of the files, which runs may share; null: the run's own", text="path")

    def __post_init__(self) -> None:
        check_at_least_one(self, "size", "chunks", "batch_size", "max_pixels")


class LatentData:
    """A data set of captioned images, encoded by a model's own autoencoder and text encoder.

    A batch holds mean and standard deviation of the latents, from which training samples anew every time, as
    the models were trained; the context, and for SDXL the vector with the sizes of each image; and null.*,
    the family's null condition, which `generate` uses too (the encoded "" of SD 1 and 2; zeros for SDXL, with
    the sizes of the image).

    `prepare` computes it, or reads the file of an earlier run. The file's name is a hash of all that it
    depends on: weights and parameters of the encoders, images, captions, and settings. It takes 0.4 MB per
    image for SD 1, 1.2 MB for SDXL.

    ValueError for a model that cannot be trained so, or images or captions that cannot be used.
    """

    num_classes: int | None = None

    def __init__(self, images: CaptionedImages, model: Model, params: LatentParams, folder: Path) -> None:
        _check_trainable(model)
        self.images, self.params = images, params
        self.vae, self.text = model.require("vae"), model.require("text")
        height, width = params.size if isinstance(params.size, tuple) else (params.size, params.size)
        self.size = image_size(model, height, width)
        self.shape = self.vae.latent_shape(*self.size)
        self.fixed_settings = {
            "encoders": _fingerprint(model),
            "captioned": images.fingerprint(),
            "size": list(self.size),
            "chunks": params.chunks,
            "precision": params.precision,
        }
        key = hashlib.sha256(json.dumps(self.fixed_settings).encode()).hexdigest()
        self.file = Path(params.folder or folder) / f"latents-{key[:16]}.safetensors"
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if not self._rows:
            raise RuntimeError("these latents are not computed yet: call prepare first")
        index, rows = torch.as_tensor(indices), self._rows
        own = {name: value for name, value in rows.items() if not name.startswith("null.")}
        batch = {name: _to_float32(value[index]) for name, value in own.items()}
        for name in ("null.context", "null.mask"):
            if name in rows:
                batch[name] = _to_float32(rows[name]).expand(len(index), *rows[name].shape[1:])
        if "vector" in batch:
            pooled = rows["null.pooled"].float().expand(len(index), -1)
            batch["null.vector"] = torch.cat([pooled, batch["vector"][:, pooled.shape[1] :]], dim=1)
        return batch

    def prepare(self, where: World, progress: bool = True) -> None:
        """Read the latents from their file. If it is missing, one process computes them; the others wait."""
        where.on_leader(lambda: self._write(where.device, progress))
        for _ in range(300):  # other machines may see it a little later on a network file system
            if self.file.exists():
                break
            time.sleep(0.2)
        self._rows = {name: stored.mapped() for name, stored in open_tensors(self.file).tensors.items()}

    def _write(self, device: torch.device, progress: bool) -> None:
        if not self.file.exists():
            with replacing(self.file) as temporary:
                self._compute(temporary, device, progress)

    @torch.no_grad()
    def _compute(self, path: Path, device: torch.device, progress: bool) -> None:
        """Write all rows as they come, with copies of the encoders: the model's own remain unchanged."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.params.precision]
        vae = copy.deepcopy(self.vae).to(device, dtype).requires_grad_(False)
        text = copy.deepcopy(self.text).to(device, dtype).requires_grad_(False)
        starts: dict[str, int] = {}
        cut: list[int] = []
        with (
            open(path, "wb") as file,
            tqdm(total=len(self), desc="latents", unit="image", disable=not progress) as bar,
        ):
            for start in range(0, len(self), self.params.batch_size):
                indices = range(start, min(start + self.params.batch_size, len(self)))
                rows, too_long = self._encode(vae, text, indices, device)
                shared = {name for name in rows if name.startswith("null.")}
                if not starts:
                    like = {
                        name: value.new_empty(
                            (1 if name in shared else len(self), *value.shape[1:]), device="meta"
                        )
                        for name, value in rows.items()
                    }
                    starts = write_header(file, like, {"made from": json.dumps(self.fixed_settings)})
                for name, value in rows.items():
                    write_rows(file, starts[name], 0 if name in shared else start, value)
                cut += too_long
                bar.update(len(indices))
        if cut:
            more = f": latents.chunks={self.params.chunks + 1} reads more" if text.params.chunked else ""
            first = self.images.pictures.names[cut[0]]
            warn(f"{len(cut)} of {len(self)} captions are too long and were cut, first that of {first}{more}")

    def _encode(
        self, vae: VAE, text: TextEncoder, indices: range, device: torch.device
    ) -> tuple[dict[str, Tensor], list[int]]:
        """The rows of some images, the null condition, and the indices of captions that are too long."""
        pictures, sizes = zip(*(self.images.read(i, *self.size) for i in indices), strict=True)
        latents = vae.encode(torch.stack(pictures).to(device))
        numbers = {name: [{**each, "score": SCORE}[name] for each in sizes] for name in text.params.numbers}
        captions = [self.images.captions[i] for i in indices]
        condition, dropped = text.encode(captions, numbers=numbers, long="cut", chunks=self.params.chunks)
        null = text.null(len(indices), like=condition)
        rows = {"x0": latents.mean, "x0_std": latents.std, **condition.tensors}
        text_only = [name for name in ("context", "mask") if name in null.tensors]
        rows |= {f"null.{name}": null.tensors[name][:1] for name in text_only}
        if null.vector is not None:
            rows |= {"null.pooled": null.vector[:1, : text.params.pooled_dim]}
        return rows, [i for i, rest in zip(indices, dropped, strict=True) if rest]


def _to_float32(value: Tensor) -> Tensor:
    """Rows, which may be in half precision, as float32; masks stay masks."""
    return value.float() if value.is_floating_point() else value


def _check_trainable(model: Model) -> None:
    """ValueError unless images and captions are all that the network needs."""
    network: Any = model.network.params
    text = model.require("text")
    if model.image_channels:
        raise ValueError(
            f"this network sees {model.image_channels} channels besides x, for inpainting or editing: "
            "captioned images do not train it"
        )
    if model.distilled or model.embeds_guidance:
        raise ValueError(
            "this model is distilled, to few steps or to follow guidance, which more training would undo: "
            "train the model it was made from"
        )
    family = model.family
    if family and family.sampling["steps"] <= FEW_STEPS:
        base = family.architecture.name
        plain = "" if base == family.name else f", or with model.family={base} its network as a plain one"
        raise ValueError(
            f"{family.title} is distilled to few steps, which more training would undo: train the model it "
            f"was made from{plain}"
        )
    vector_dim = network.vector_dim if "vector" in network.takes else None
    if (network.context_dim, vector_dim) != (text.params.context_dim, text.params.vector_dim):
        raise ValueError(
            f"the text encoder makes contexts of {text.params.context_dim} and vectors of "
            f"{text.params.vector_dim}, the network takes {network.context_dim} and {vector_dim}: load parts "
            "that belong together"
        )


def _fingerprint(model: Model) -> str:
    """SHA-256 of weights and parameters of the autoencoder and the text encoder."""
    encoders = Model(None, model.schedule, model.prediction, vae=model.vae, text=model.text)
    parameters = json.dumps([model.spec["vae"], model.spec["text"]], sort_keys=True)
    return hashlib.sha256((encoders.fingerprint + parameters).encode()).hexdigest()
