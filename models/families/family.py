"""Families of published models as data: their parts, and how they are sampled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from models.families.vae_keys import AUTOENCODER
from models.files.structure import Kind
from models.networks.clip import CLIPTextParams
from models.networks.t5 import T5Params
from models.networks.taesd import TAESDParams
from models.networks.vae import VAEParams
from models.text.reader import Reader
from models.text.recipes import TextParams

if TYPE_CHECKING:
    from models.files.table import Layout, Part

Role = Literal["inpaint", "edit", "control"]
"""What a network does with an image condition: paint within a mask, edit it, or follow its edges or depth."""
ImageInput = Literal["latents", "unscaled", "masked", "mask", "mask_pixels"]
"""Channels of an image condition:

    latents      of the image, in the model's units; unscaled: in the autoencoder's own
    masked       latents of the image, grey where to paint
    mask         1 where to paint, at the size of the latents; mask_pixels: all pixels of a latent as channels
"""
DEFAULT_ROLES: dict[Role, tuple[ImageInput, ...]] = {
    "inpaint": ("mask", "masked"),
    "edit": ("unscaled",),
    "control": ("latents",),
}
"""For networks of no published family."""

# The oldest diffusers that reads all that we write for it. Its pipeline for inpainting requires a version.
OLDEST = "0.27.0"
OLDEST_FLOW = "0.32.0"  # the oldest that reads FLUX.1 and Stable Diffusion 3.5
ONE = ("diffusion_pytorch_model.safetensors",)  # diffusers' file name of a part that is published alone
# Text encoders of miniatures: CLIP-L, OpenCLIP and T5.
TINY_CLIP_L = CLIPTextParams(width=64, layers=3, heads=1)
TINY_CLIP = CLIPTextParams(width=128, layers=3, heads=2, activation="gelu", projection=128)
TINY_T5 = T5Params(vocab=256, width=224, layers=2, heads=4, head_dim=16, hidden=128)


@dataclass(frozen=True)
class Tower:
    """One text encoder of an architecture.

    name      "clip_l", "t5", ..., in models and messages
    reader    how it is read, at its published size
    tiny      parameters of its network in a miniature
    prefix    of its keys in single files
    folder    its folder in diffusers' layout
    layout    of its keys in single files; None: that of its kind
    file      the name of its own file, if not `name`
    optional  the architecture works without it: its rows are zeros then
    identity  diffusers always projects its pooled output: without a projection, the identity is written
    unused    number of last blocks that are never read: files may lack them, and single files are written
              with them
    """

    name: str
    reader: Reader
    tiny: Any
    prefix: str
    folder: str = "text_encoder"
    layout: Layout | None = None
    file: str = ""
    optional: bool = False
    identity: bool = False
    unused: int = 0


@dataclass(frozen=True, eq=False)
class Architecture:
    """The parts that several families share, so that the files of one load as those of another.

    name         that of its plain family, the first of its families, which is assumed if nothing names
                 another
    kind         of its network, and how files hold it
    network      the network's parameters at the published size; tiny: in a miniature
    matches      whether a network with these parameters has this architecture, and no other of its kind
    towers       its text encoders, in the order in which they are read
    join         how their states are joined, if not side by side: fields of TextParams
    adapt_text   adapts TextParams to what files show: takes them, the text encoders found, and the network's
                 parameters (or None)
    autoencoder  the kind of its autoencoder
    vae          the autoencoder's parameters at the published size; tiny_vae: those that differ in a
                 miniature
    roles        what the network does with an image condition, and the order of its channels for that
    note         for users, if the plain family is assumed: what its keys do not show
    guess_prediction  the prediction if no file names it, with a note on how it was guessed; None: the
                      family's
    recorded     parameters of readers that the files of every layout show, and so may differ from the
                 family's
    pipelines    diffusers' classes by role; None: without an image condition
    index        further entries of model_index.json
    diffusers    the oldest version of diffusers that opens it
    vae_prefix   of the autoencoder's keys in single files
    marks_v      an empty tensor in its single files says that the network predicts v; else readers guess
    """

    name: str
    kind: Kind
    network: Any
    tiny: Any
    matches: Callable[[Any], bool]
    towers: tuple[Tower, ...]
    pipelines: Mapping[Role | None, str]
    join: Mapping[str, Any] = field(default_factory=dict)
    adapt_text: Callable[[TextParams, Mapping[str, Part], Any], TextParams] = lambda text, towers, network: (
        text
    )
    autoencoder: Kind = AUTOENCODER
    vae: Any = field(default_factory=VAEParams)
    tiny_vae: Mapping[str, Any] = field(
        default_factory=lambda: {"channels": 32, "channel_mult": (1, 1, 2, 2), "blocks": 1}
    )
    roles: Mapping[Role, tuple[ImageInput, ...]] = field(default_factory=dict)
    note: str = ""
    guess_prediction: Callable[[Part, list[str]], str | None] = lambda part, notes: None
    index: Mapping[str, Any] = field(default_factory=dict)
    diffusers: str = OLDEST
    vae_prefix: str = "first_stage_model."
    marks_v: bool = False
    recorded: frozenset[str] = frozenset()

    @property
    def channels(self) -> dict[int, Role]:
        """The role of a network by the number of channels of its image condition."""
        sizes, latents = {"mask": 1, "mask_pixels": self.vae.factor**2}, self.vae.latent_channels
        return {sum(sizes.get(each, latents) for each in image): role for role, image in self.roles.items()}


@dataclass(frozen=True)
class Family:
    """One published family.

    name, title   for code and for people
    licence       of its weights, in a line
    size          pixels of the shorter side in training
    schedule, grid, prediction, consistency  as in a model's description
    sampling      default sampler, steps and guidance
    latents       units of the latents that differ from the architecture's: parameters of the autoencoder
    text          parameters of the text readers that differ from the architecture's, by reader
    table         its published table for the spacing "align_your_steps"
    schedulers    diffusers' schedulers that this distilled network is published with: a hint, no proof
    sample_size   of its UNet's configuration; together with such a scheduler it is proof
    guided        False for a network that is distilled to work without guidance, and refuses it
    pipeline      diffusers' class without an image condition, if not the architecture's
    """

    name: str
    title: str
    architecture: Architecture
    licence: str
    size: int
    schedule: Mapping[str, Any]
    grid: Mapping[str, Any]
    sampling: Mapping[str, Any]
    prediction: str = "eps"
    consistency: Mapping[str, Any] | None = None
    latents: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    table: str | None = None
    schedulers: tuple[str, ...] = ()
    sample_size: int | None = None
    guided: bool = True
    pipeline: str | None = None

    def __str__(self) -> str:
        return self.title

    @property
    def is_flow(self) -> bool:
        """Whether it predicts the velocity of a flow."""
        return self.prediction == "flow"

    @property
    def readers(self) -> dict[str, Reader]:
        """The readers of its text encoders, by name."""
        towers = self.architecture.towers
        return {tower.name: replace(tower.reader, **self.text.get(tower.name, {})) for tower in towers}

    def join_readers(self, readers: Mapping[str, Reader]) -> TextParams:
        """How it reads prompts with these readers; those of optional text encoders may be missing."""
        default, join = self.readers, dict(self.architecture.join)
        if missing := [default[name] for name in join.get("behind", ()) if name not in readers]:
            join["behind"] = tuple(name for name in join["behind"] if name in readers)
            join["zeros"] = sum(reader.rows for reader in missing)
            join["width"] = max(reader.context_dim for reader in missing)
        return TextParams({name: readers[name] for name in default if name in readers}, **join)

    def text_params(self, networks: Mapping[str, Any]) -> TextParams:
        """How it reads prompts with text encoders of these parameters, by name."""
        readers = {name: reader for name, reader in self.readers.items() if name in networks}
        return self.join_readers(
            {name: replace(each, network=networks[name]) for name, each in readers.items()}
        )

    @property
    def vae(self) -> Any:
        """The architecture's autoencoder parameters, in the units of this family's latents."""
        return replace(self.architecture.vae, **self.latents)

    def description(
        self,
        network: Any | None,
        vae: Any | None,
        text: TextParams | None,
        preview: TAESDParams | None = None,
    ) -> dict[str, Any]:
        """The description, as `build` takes it, of a model of this family with these parts."""
        spec: dict[str, Any] = {"family": self.name}
        spec |= {"schedule": dict(self.schedule), "prediction": self.prediction}
        spec |= {"grid": dict(self.grid), "sampling": dict(self.sampling)}
        if self.consistency:
            spec["consistency"] = dict(self.consistency)
            if (
                network and "guidance" not in network.takes
            ):  # merged from an adapter: it does not take the scale
                spec["sampling"]["guidance"] = 1.0
        if network:
            factor = (vae or self.vae).factor
            channels = vae.latent_channels if vae else network.sample_channels
            spec |= {"network": {"name": self.architecture.kind.name, **to_plain(network)}}
            spec |= {"shape": [channels, self.size // factor, self.size // factor]}
        if vae:
            spec["vae"] = {"name": self.architecture.autoencoder.name, **to_plain(vae)}
        if text is not None:
            spec["text"] = to_plain(text)
        if preview is not None:
            spec["preview"] = to_plain(preview)
        return spec


@dataclass(frozen=True)
class Published:
    """Where a model is published, and under which licence.

    files     to download, in the order in which `load` takes them
    revision  a commit, so that the files never change; or a branch, as it was at the first download
    family    for `load`, if keys and shapes do not show it
    """

    repo: str
    files: tuple[str, ...] = ()
    revision: str = "main"
    licence: str = ""
    family: str = ""


def euler(steps: int, guidance: float) -> dict[str, Any]:
    """Sampling defaults of a flow."""
    return {"sampler": "euler", "steps": steps, "guidance": guidance}


def to_plain(params: Any) -> dict[str, Any]:
    """A parameter dataclass in plain values for files, with lists in place of tuples."""
    return dict(json.loads(json.dumps(asdict(params))))
