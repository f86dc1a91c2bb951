"""What a family of published models is made of and how it is sampled, as data. Each line of families has a
file beside this one."""

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
"""What a network does with an image that it sees beside x: completes it where a mask says so, edits it, or
follows its edges or depths."""
Beside = Literal["latents", "unscaled", "masked", "mask", "mask_pixels"]
"""What it sees of that image: its latents, in the model's units or in the autoencoder's own; those of the
image made grey where to paint; a mask, 1 where to paint, at the latents' size, or with all its pixels, those
of a latent one beside the other."""
OWN_ROLES: dict[Role, tuple[Beside, ...]] = {
    "inpaint": ("mask", "masked"),
    "edit": ("unscaled",),
    "control": ("latents",),
}
"""Of networks of no published family."""

# the oldest diffusers that knows all that is written for it; its pipeline for inpainting wants one named
OLDEST = "0.27.0"
OLDEST_FLOW = "0.32.0"  # the oldest that knows all of FLUX.1 and Stable Diffusion 3.5
ONE = (
    "diffusion_pytorch_model.safetensors",
)  # the file of a part that is published alone, as diffusers names it
# Text encoders of miniatures: CLIP-L's, those of OpenCLIP, and T5's.
TINY_CLIP_L = CLIPTextParams(width=64, layers=3, heads=1)
TINY_CLIP = CLIPTextParams(width=128, layers=3, heads=2, activation="gelu", projection=128)
TINY_T5 = T5Params(vocab=256, width=224, layers=2, heads=4, head_dim=16, hidden=128)


@dataclass(frozen=True)
class Tower:
    """One text encoder of an architecture.

    name      "clip_l", "t5", ...: in the model, and in messages
    reader    how it is read, at its published size
    tiny      parameters of its network in a miniature
    prefix    what stands before its keys in single files
    folder    its place in a diffusers folder
    layout    of its keys in single files, where not the one that its kind has there
    file      the name of a file of its own, where not `name`
    optional  the architecture works without it: rows of zeros stand in the place of its own
    identity  diffusers' pipelines always project its pooled output: without a projection of its own it is
              written with the identity there
    unused    how many of its last blocks are never read: files may leave them out, and single files are
              written with them
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
    """What several families have in common: the same parts, so that files of one load as those of another.

    name       that of its plain family, which files are taken for where nothing says otherwise, and which
               stands first among its own
    kind       of its network, and how files hold it
    network    the network's parameters at the published size; tiny: in a miniature
    matches    whether a network with these parameters is of this architecture and of no other of its kind
    towers     its text encoders, in the order in which they are read
    join       how their states are joined, where not side by side: entries of TextParams
    as_found   how prompts are read after all, as files show: takes that, the text encoders found, and the
               network's parameters (None without one)
    autoencoder  the kind of it
    vae        its parameters at the published size, in the units of the latents; tiny_vae: what of them is
               another in a miniature
    roles      what is done with an image beside x, and what the network sees of it for that, in the order of
               its channels
    hint       a note for a network taken for the plain family: what its keys do not tell
    guess      the prediction where no file names it, with a note of how it was guessed; None for the family's
    told       parameters of readers that every layout's files show, so that they need not be the family's to
               be saved
    pipelines  diffusers' classes by role, under None that of a network that sees x alone
    index      further entries of model_index.json
    diffusers  the oldest version of diffusers that opens it
    vae_prefix what stands before the autoencoder's keys in single files
    marks_v    its single files say by an empty tensor that the network predicts v; without it, readers guess
    """

    name: str
    kind: Kind
    network: Any
    tiny: Any
    matches: Callable[[Any], bool]
    towers: tuple[Tower, ...]
    pipelines: Mapping[Role | None, str]
    join: Mapping[str, Any] = field(default_factory=dict)
    as_found: Callable[[TextParams, Mapping[str, Part], Any], TextParams] = lambda text, towers, network: text
    autoencoder: Kind = AUTOENCODER
    vae: Any = field(default_factory=VAEParams)
    tiny_vae: Mapping[str, Any] = field(
        default_factory=lambda: {"channels": 32, "channel_mult": (1, 1, 2, 2), "blocks": 1}
    )
    roles: Mapping[Role, tuple[Beside, ...]] = field(default_factory=dict)
    hint: str = ""
    guess: Callable[[Part, list[str]], str | None] = lambda part, notes: None
    index: Mapping[str, Any] = field(default_factory=dict)
    diffusers: str = OLDEST
    vae_prefix: str = "first_stage_model."
    marks_v: bool = False
    told: frozenset[str] = frozenset()

    @property
    def channels(self) -> dict[int, Role]:
        """The role of a network by the number of channels that it sees beside x."""
        of = {"mask": 1, "mask_pixels": self.vae.factor**2}
        return {
            sum(of.get(each, self.vae.latent_channels) for each in sees): role
            for role, sees in self.roles.items()
        }


@dataclass(frozen=True)
class Family:
    """One published family.

    name, title   for code and for people
    architecture  what it is built like
    licence       of its weights, in a line
    size          pixels of the shorter side that it was trained on
    schedule, grid, prediction, consistency  as in a model's description
    sampling      sampler, steps and guidance that it is meant for
    latents       their units, where they are not those of the architecture's autoencoder: parameters of it
    text          how its text encoders are read, where not as the architecture's: parameters of their
                  readers, by name
    table         the one of spacing "align_your_steps" that was fitted to it, if one is published
    schedulers    diffusers' schedulers with which this distilled network is published: a hint, no proof, as
                  ordinary ones are saved so too
    sample_size   of its UNet's configuration, which proves it together with such a scheduler
    guided        False for a network that was distilled to draw without guidance, and refuses it
    pipeline      diffusers' class for a network that sees x alone, where not the architecture's
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
        """Whether it predicts the velocity of a flow, on times of its own; the others are told rows of a
        table, or a noise level."""
        return self.prediction == "flow"

    @property
    def readers(self) -> dict[str, Reader]:
        """How its text encoders are read, by name."""
        return {
            tower.name: replace(tower.reader, **self.text.get(tower.name, {}))
            for tower in self.architecture.towers
        }

    def joined(self, readers: Mapping[str, Reader]) -> TextParams:
        """How it reads prompts with these of its text encoders."""
        usual, join = self.readers, dict(self.architecture.join)
        if absent := [usual[name] for name in join.get("behind", ()) if name not in readers]:
            join["behind"] = tuple(name for name in join["behind"] if name in readers)
            join |= {
                "zeros": sum(reader.rows for reader in absent),
                "width": max(reader.context_dim for reader in absent),
            }
        return TextParams({name: readers[name] for name in usual if name in readers}, **join)

    def text_params(self, networks: Mapping[str, Any]) -> TextParams:
        """How it reads prompts with text encoders of these networks' parameters, given by name."""
        return self.joined(
            {
                name: replace(reader, network=networks[name])
                for name, reader in self.readers.items()
                if name in networks
            }
        )

    @property
    def vae(self) -> Any:
        """The parameters of its autoencoder: the architecture's, in the units of its latents."""
        return replace(self.architecture.vae, **self.latents)

    def description(
        self,
        network: Any | None,
        vae: Any | None,
        text: TextParams | None,
        preview: TAESDParams | None = None,
    ) -> dict[str, Any]:
        """The description, as `build` takes it, of a model of this family with these parts."""
        spec: dict[str, Any] = {
            "family": self.name,
            "schedule": dict(self.schedule),
            "prediction": self.prediction,
        }
        spec |= {"grid": dict(self.grid), "sampling": dict(self.sampling)}
        if self.consistency:
            spec["consistency"] = dict(self.consistency)
            if (
                network and "guidance" not in network.takes
            ):  # merged from an adapter, it is not told the scale, and guided as usual, if at all
                spec["sampling"]["guidance"] = 1.0
        if network:
            factor = (vae or self.vae).factor
            channels = vae.latent_channels if vae else min(network.out_channels, network.in_channels)
            spec |= {"network": {"name": self.architecture.kind.name, **plain(network)}}
            spec |= {"shape": [channels, self.size // factor, self.size // factor]}
        if vae:
            spec["vae"] = {"name": self.architecture.autoencoder.name, **plain(vae)}
        return spec | {
            part: plain(params)
            for part, params in {"text": text, "preview": preview}.items()
            if params is not None
        }


@dataclass(frozen=True)
class Published:
    """Where a model is published, and under which licence.

    files     to download, in the order in which `load` takes them
    revision  a commit, so that the name means the same bytes next year; or a branch, which stands for what it
              was when first fetched
    family    what to tell `load`, where keys and shapes do not say it
    """

    repo: str
    files: tuple[str, ...] = ()
    revision: str = "main"
    licence: str = ""
    family: str = ""


def euler(steps: int, guidance: float) -> dict[str, Any]:
    """How flows are sampled."""
    return {"sampler": "euler", "steps": steps, "guidance": guidance}


def plain(params: Any) -> dict[str, Any]:
    """A parameter dataclass as a file's metadata holds it: lists, not tuples."""
    return dict(json.loads(json.dumps(asdict(params))))
