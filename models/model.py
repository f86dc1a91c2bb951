"""A model: a network with the schedule and the prediction it was trained for, what stands around it
(autoencoder, text encoder), and the description that all of it is built from."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints

import torch
from torch import Tensor, nn

from diffusion import (
    NONE,
    Condition,
    ConsistencyFunction,
    Denoiser,
    Grid,
    Prediction,
    Schedule,
    VarianceExploding,
    build_blend,
    build_prediction,
    build_schedule,
    outside,
    time_grid,
)
from diffusion.messages import brief
from diffusion.spacing import ALIGN_YOUR_STEPS
from diffusion.spec import check_call, check_mapping, check_names, check_type, lookup, make_params
from models.files.text import sha256_of_tensors
from models.layers.conditioning import NetworkParams
from models.layers.finite import find_nonfinite
from models.layers.packed import unpacked_state
from models.layers.streaming import check_not_streamed, weight_readers
from models.networks.taesd import TAESD, TAESDParams
from models.networks.vae import VAE, VAEParams
from models.text.encoder import LEFT_OUT, TextEncoder
from models.text.reader import Reader
from models.text.recipes import TextParams

if TYPE_CHECKING:
    from models.families import Family, ImageInput, Role


@dataclass(frozen=True, repr=False)
class Report:
    """Every key of the files that were loaded.

    consumed  taken into the model
    ignored   left out, with the reason: training's own, known to be harmless, or replaced by another file's
    missing   parts of such a model that no file held ("vae", "text", ...): asking for them raises
    notes     what keys and shapes do not say, and how it was settled
    layout    how the files were written: "native", "ldm", "diffusers", ...; `save` can write them so again
    files     by part, where its weights come from

    There is no other kind: a key that is unknown, and one that is missing from a part that is there, raise
    instead.
    """

    consumed: tuple[str, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layout: str = "native"
    files: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = Counter(self.ignored.values())
        lines = [f"{len(self.consumed)} tensors taken ({self.layout} layout), {len(self.ignored)} ignored"]
        lines += [f"  ignored {n}: {reason}" for reason, n in reasons.most_common()]
        lines += [f"  not there: {', '.join(self.missing)}"] * bool(self.missing)
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def __repr__(self) -> str:
        """At most six lines of it; print shows all."""
        lines = str(self).splitlines()
        return "\n".join(
            lines
            if len(lines) <= 6
            else [*lines[:5], f"  ... {len(lines) - 5} more lines: print(model.report)"]
        )


PARTS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "vae": (VAE, VAEParams),
    "text": (TextEncoder, TextParams),
    "preview": (TAESD, TAESDParams),
}
REMEDY = "make it with models.build({...}), of a network in models.NETWORKS"
MAX_SIDE = 4096  # pixels or latents along a side of a sample, and its channels
MAX_SAMPLING_STEPS = 10_000
FOLDERS = {
    "backbone": "network"
}  # under which name a part's tensors stand in a file, where it is not its own


@dataclass(repr=False)
class Model:
    """What `build` makes and `load` returns. Parts that are not there are None; `network` and `require` name
    what is missing.

    backbone  the network that denoises; vae, text, preview: autoencoder, text encoder, tiny autoencoder for
              previews
    report    what loading took from the files and what it left, None for a fresh model
    spec      its whole description in plain values: {"network": {"name": ..., ...}, "schedule": {"name": ...,
              ...}, "prediction": ...}, "shape": [C, H, W] of the samples it was trained on, "classes": their
              names by number, "drop": the share of them that was trained without its label, "grid": {...} it
              is best sampled on, "consistency": {...} for a distilled model, "vae", "text" and "preview" with
              the parameters of these parts, "family" and "sampling": {...} of a published one, "role" of a
              network of one's own that sees an image beside x; it goes into every file that is saved
    """

    backbone: nn.Module | None
    schedule: Schedule
    prediction: Prediction
    spec: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None
    vae: VAE | None = None
    text: TextEncoder | None = None
    preview: TAESD | None = None

    def __repr__(self) -> str:
        """A line of what it is, and one for each part: its class, size, dtype and device."""
        spec = self.spec
        what = f"Model of {self.family.title}" if self.family else "Model"
        schedule = spec["schedule"]["name"] if "schedule" in spec else type(self.schedule).__name__
        size = f", samples {'x'.join(map(str, spec['shape']))}" if "shape" in spec else ""
        lines = [f"{what}: predicts {self.prediction.name} on the schedule {schedule}{size}"]
        for name, part in self.parts.items():
            tensors = [*part.parameters(), *part.buffers()]
            count = sum(tensor.numel() for tensor in tensors)
            kinds = sorted(
                {f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}" for tensor in tensors}
            )
            lines.append(
                f"  {name:8} {type(part).__name__}, {count / 1e6:,.4g} M parameters, {', '.join(kinds)}"
            )
        return "\n".join(lines)

    @property
    def network(self) -> nn.Module:
        """The backbone; ValueError where none was loaded."""
        return self.require("backbone")

    def require(self, part: str) -> Any:
        """A part by name; ValueError that says what is missing where it is not there."""
        if getattr(self, part) is None:
            held = {
                "backbone": "a UNet",
                "vae": "an autoencoder",
                "text": "its text encoders",
                "preview": "TAESD",
            }[part]
            there = ", ".join(self.parts) or "nothing"
            notes = self.report.notes if self.report and part == "text" else ()
            why = "".join(f"; {note}" for note in notes if note.startswith(LEFT_OUT))
            raise ValueError(
                f"this model has no {part} (it has {there}{why}): load a file that holds {held} beside it, "
                "models.load(file, other)"
            )
        return getattr(self, part)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that are there, by name."""
        parts = {"backbone": self.backbone, "vae": self.vae, "text": self.text, "preview": self.preview}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move or cast all parts; the model itself. A part alone is moved as any module:
        model.text.to("cuda")."""
        for part in self.parts.values():
            part.to(device=device, dtype=dtype)
        return self

    def unpacked(self, dtype: torch.dtype) -> Model:
        """A copy whose packed weights (8-bit floats, GGUF's blocks) are plain ones of that dtype; all others
        are shared.

        ValueError for a model that was loaded with memory=....
        """
        for part in self.parts.values():
            check_not_streamed(part)
        copy = build(self.spec, device="meta")
        for name in copy.parts.keys() - self.parts.keys():
            setattr(copy, name, None)
        for name, part in self.parts.items():
            copy.require(name).load_state_dict(unpacked_state(part, dtype), assign=True)
            copy.require(name).train(part.training)
        if copy.text is not None and self.text is not None:
            copy.text.tokenizers = dict(self.text.tokenizers)
        return copy

    def network_denoiser(self, network: nn.Module | None = None) -> Denoiser:
        """The plain denoiser of the backbone, or of another network in its place (one wrapped for parallel
        training)."""
        if self.prediction.input_scale is not None and not isinstance(self.schedule, VarianceExploding):
            raise ValueError(
                f"prediction {self.prediction.name!r} scales the input as EDM does, which needs schedule "
                "'ve': choose it, or 'v'"
            )
        return Denoiser(network or self.network, self.schedule, self.prediction)

    def denoiser(self) -> Denoiser | ConsistencyFunction:
        """The model as solvers take it; for a distilled model its consistency function."""
        plain = self.network_denoiser()
        return ConsistencyFunction(plain, build_blend(self.spec["consistency"])) if self.distilled else plain

    @property
    def image_channels(self) -> int:
        """Channels that the network sees beside the sample's, under the condition "image": 5 for inpainting,
        4 for editing, else 0."""
        params = getattr(self.backbone, "params", None)
        return (
            cast(Any, params).in_channels - params.sample_channels if isinstance(params, NetworkParams) else 0
        )

    @property
    def family(self) -> Family | None:
        """The published family that it is of, None for a model of one's own."""
        return families().FAMILIES.get(self.spec.get("family", ""))

    @property
    def role(self) -> Role | None:
        """What the network does with an image that it sees beside x, None where it sees none.

        As the family has it; in a model of one's own as "role" in its description, by default "inpaint".
        ValueError for a network of a family that sees more or fewer channels than any of its roles has.
        """
        if not (channels := self.image_channels):
            return None
        if self.family is None:
            return self.spec.get("role", "inpaint")
        if channels not in (roles := self.family.architecture.channels):
            known = " or ".join(f"{n} ({role})" for n, role in roles.items()) or "none"
            raise ValueError(
                f"this network sees {channels} channels beside its sample: known for {self.family.title} "
                f"are {known}"
            )
        return roles[channels]

    @property
    def sees(self) -> tuple[ImageInput, ...]:
        """What the network sees of an image beside x, in the order of its channels; () where it sees x
        alone."""
        roles = self.family.architecture.roles if self.family else families().DEFAULT_ROLES
        return roles[self.role] if self.role else ()

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network was distilled to follow the scale of guidance, which it is told (LCM, FLUX.1
        [dev])."""
        return "guidance" in getattr(getattr(self.backbone, "params", None), "takes", ())

    @property
    def distilled(self) -> bool:
        """Whether the denoiser is a consistency function, which one or two steps of the `consistency` sampler
        suffice for."""
        return "consistency" in self.spec

    def grid(self, steps: int | None, /, size: tuple[int, int] | None = None, **settings: Any) -> Grid:
        """The time grid to sample this model on: its own, which is part of its description, or what the
        settings of `time_grid` say.

        What a spacing needs of the model comes from here, unless it is among the settings: the table of
        align_your_steps that was fitted to the family, mu_shift's line, and its number of tokens, for samples
        of `size` (H, W), by default the size it was trained on. ValueError for settings that make no grid,
        and for align_your_steps where no table is published for the family.
        """
        own = check_mapping("grid", self.spec.get("grid", {}))
        settings = settings or own
        if settings.get("spacing") == "align_your_steps" and "table" not in settings:
            of = self.family
            if of is None or of.table is None:
                raise ValueError(
                    f"no table of align_your_steps is published for {of.title if of else 'this model'}: "
                    "name one, "
                    f"table={' or '.join(ALIGN_YOUR_STEPS)}, or take another spacing"
                )
            settings = {**settings, "table": of.table}
        side, size = (
            getattr(getattr(self.backbone, "params", None), "patch_size", None),
            size or self.spec.get("shape", (0, 0, 0))[1:],
        )
        if settings.get("spacing") == "mu_shift" and "line" in own:
            settings = {"line": own["line"], **settings}
        if (
            settings.get("spacing") == "mu_shift"
            and not settings.keys() & {"mu", "tokens"}
            and side
            and all(size)
        ):
            settings = {**settings, "tokens": math.prod(-(-length // side) for length in size)}
        return time_grid(self.schedule, steps, **check_call("the grid", time_grid, 2, settings))

    def check(self) -> None:
        """ValueError where the description of denoiser, grid or role is wrong: now, and not when the model is
        first used."""
        spacing = check_mapping("grid", self.spec.get("grid", {})).get("spacing", "")
        (
            self.denoiser(),
            self.grid(1 if isinstance(spacing, str) else None),
            self.role,
        )  # each checks what it reads

    def check_description(self) -> None:
        """ValueError unless the description makes this network, schedule and prediction again: a file could
        not be loaded otherwise."""
        try:
            made = build(self.spec, device="meta")
        except ValueError as error:
            raise ValueError(f"a file of this model could not be loaded again ({error}): {REMEDY}") from None
        own: Any = self.network
        again: Any = made.network
        if type(own) is not type(again):
            kinds = (
                f"its network is a {type(own).__name__}, and its description makes a {type(again).__name__}"
            )
            raise ValueError(f"a file of this model could not be loaded again, for {kinds}: {REMEDY}")
        mine, theirs = (
            {name: value.shape for name, value in each.state_dict().items()} for each in (own, again)
        )
        same = own.params == again.params and self.prediction.name == made.prediction.name
        ends = [
            [(t, each.level(t)) for t in (each.t_min, each.t_max)] for each in (made.schedule, self.schedule)
        ]
        if not same or ends[0] != ends[1]:
            raise ValueError(
                f"a file of this model would load as another one, which its description makes: {REMEDY}"
            )
        if mine != theirs:
            odd = next(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
            raise ValueError(
                f"a file of this model could not be loaded again, for its description makes another {odd}: "
                f"{REMEDY}"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all weights and own words that images depend on: the same for every copy, wherever it
        lies and in every layout."""
        parts = {FOLDERS.get(name, name): part for name, part in self.parts.items() if name != "preview"}
        tensors = dict(
            sorted(
                (f"{name}.{key}", read) for name, part in parts.items() for key, read in weight_readers(part)
            )
        )
        lines = [f"{name} {digest}\n" for name, digest in sha256_of_tensors(tensors).items()]
        words = {} if self.text is None else self.text.learned_words
        lines += [f"text.{name} {json.dumps(own, sort_keys=True)}\n" for name, own in sorted(words.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def check_finite(self) -> None:
        """ValueError that names the first weight which is not finite, and its file. Reads all weights, which
        `load` need not."""
        for name, part in self.parts.items():
            if lost := find_nonfinite(part):
                file = self.report.files.get(name) if self.report else None
                of = f"{file} is damaged: " if file else ""
                raise ValueError(
                    f"{of}the {name}'s weight {lost!r} holds values that are not finite: load it again from "
                    "an intact file"
                )

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of all parts; those of the backbone under "network.". ValueError for a model that was
        loaded with memory=...."""
        for part in self.parts.values():
            check_not_streamed(part)
        parts = {FOLDERS.get(name, name): part for name, part in self.parts.items()}
        return {
            f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the samples it was trained on. ValueError where that is not known."""
        if "shape" not in self.spec:
            raise ValueError("this model does not say what size of sample it was trained on: give a shape")
        channels, height, width = self.spec["shape"]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        """How many classes the network knows, None for one that is told no label."""
        return getattr(getattr(self.backbone, "params", None), "num_classes", None)

    @property
    def null(self) -> Condition:
        """What stands for "no class", (1,) on the network's device, for guidance; empty for a network without
        classes."""
        if self.num_classes is None:
            return NONE
        return Condition(
            label=torch.full((1,), self.num_classes, device=next(self.network.parameters()).device)
        )


def families() -> ModuleType:
    """models.families, imported at its first use: it brings the names of all tensors in files along."""
    return import_module("models.families")


def build(spec: Mapping[str, Any], device: torch.device | str | None = None) -> Model:
    """A model with fresh weights from its description. Unknown names raise and name the nearest known one.

    A network's time_factor that is left out, or None, is derived from the schedule, and stands in the model's
    own description. The name of a network can be a class of one's own: see `find_network`.

    device  where the network is made, default torch's own; "meta" makes it without weights, for those of a
            file
    """
    spec = {
        key: dict(value) if isinstance(value, Mapping) else value
        for key, value in check_mapping("a model", spec).items()
    }
    known = [
        "network",
        *PARTS,
        "schedule",
        "prediction",
        "shape",
        "classes",
        "drop",
        "grid",
        "consistency",
        "family",
        "role",
        "sampling",
    ]
    check_names("model part", spec, known)
    needed = (
        ["schedule", "prediction"] if spec.keys() & PARTS.keys() else ["network", "schedule", "prediction"]
    )
    if missing := [part for part in needed if part not in spec]:
        raise ValueError(f"the model's description lacks {missing[0]!r}")
    prediction = build_prediction(spec["prediction"])
    _check_extras(spec)
    schedule = build_schedule(spec["schedule"])
    if "network" in spec:
        spec["network"] = _describe_network(check_mapping("network", spec["network"]), schedule, prediction)
    with torch.device(device or torch.get_default_device()):
        network = build_network(spec["network"]) if "network" in spec else None
        parts: dict[str, Any] = {name: _build_part(name, spec[name]) for name in PARTS if name in spec}
    if (
        "shape" in spec
        and network is not None
        and spec["shape"][0] != (channels := cast(Any, network.params).sample_channels)
    ):
        raise ValueError(
            f"shape says that samples have {spec['shape'][0]} channels, and the network takes {channels}"
        )
    if "classes" in spec and len(spec["classes"]) != (
        count := getattr(getattr(network, "params", None), "num_classes", None)
    ):
        raise ValueError(
            f"classes names {len(spec['classes'])} classes, and the network has num_classes={count}"
        )
    model = Model(network, schedule, prediction, spec, **parts)
    if network is not None:
        model.check()
    return model


def _check_extras(spec: Mapping[str, Any]) -> None:
    """ValueError where what a description says of samples and sampling cannot be: now, and not when it hangs
    or fills the memory."""
    if "shape" in spec:
        check_type("shape", spec["shape"], tuple[int, int, int])
        if not all(1 <= size <= MAX_SIDE for size in spec["shape"]):
            raise ValueError(f"shape holds sizes from 1 to {MAX_SIDE:,}, not {brief(spec['shape'])}")
    if "family" in spec:
        check_type("family", spec["family"], str)
        check_names("family", [spec["family"]], families().FAMILIES)
    check_names("role", [spec.get("role", "inpaint")], get_args(families().Role))
    if "role" in spec and spec.get("family"):
        raise ValueError(
            f"role is for networks of one's own, and what those of {spec['family']} do is known: leave role "
            "out"
        )
    check_type("classes", classes := spec.get("classes", []), list[str])
    if twice := [name for name, n in Counter(classes).items() if n > 1]:
        raise ValueError(f"classes holds {brief(twice[0])} twice: each class has a name of its own")
    check_type("drop", drop := spec.get("drop", 0.0), float)
    if not 0 <= drop <= 1:
        raise ValueError(f"drop is a share of the samples, within [0, 1], not {drop:g}")
    sampling = check_mapping("sampling", spec.get("sampling", {}))
    for name, kind in {"sampler": str, "steps": int, "guidance": float}.items():
        if name in sampling:
            check_type(f"sampling.{name}", sampling[name], kind)
    if not 1 <= sampling.get("steps", 1) <= MAX_SAMPLING_STEPS:
        raise ValueError(f"sampling.steps must be 1 to {MAX_SAMPLING_STEPS:,}, not {sampling['steps']:,}")


def _describe_network(network: dict[str, Any], schedule: Schedule, prediction: Prediction) -> dict[str, Any]:
    """A network's description in plain values: a class by its name, and the factor of the times that it
    sees."""
    if isinstance(network.get("name"), type):
        network["name"] = outside.provide("network", network["name"])
    _, params = find_network(network.get("name"))
    if "time_factor" in {field.name for field in fields(params)} and network.get("time_factor") is None:
        network["time_factor"] = time_factor(schedule, prediction)
    return network


def find_network(name: Any) -> tuple[type[nn.Module], type[Any]]:
    """The network of that name in models.NETWORKS, or from outside (see `diffusion.outside`), and the class
    of its parameters.

    One from outside is built as Network(params): the annotation of `params` is a dataclass that derives from
    `NetworkParams`. ValueError for a name that is unknown, and for a class that is built otherwise.
    """
    found: Any = lookup("network", name, families().NETWORKS)
    if isinstance(found, tuple):
        return found
    hints = get_type_hints(found.__init__) if isinstance(found, type) and issubclass(found, nn.Module) else {}
    params = next(iter(hints.values()), None)
    if not (isinstance(params, type) and is_dataclass(params) and issubclass(params, NetworkParams)):
        raise ValueError(
            f"the network {name!r} must be an nn.Module that is built from one dataclass, which derives "
            "from models.NetworkParams: "
            "def __init__(self, params: MyParams)"
        )
    return found, params


def time_factor(schedule: Schedule, prediction: Prediction) -> float:
    """What brings the times that a network sees to a range of 1000, which the frequencies of its time
    embedding are made for.

    1 for the indices of a table. EDM's network sees log(sigma) / 4 in place of t.
    """
    if schedule.rows is not None:
        return 1.0
    if prediction.network_time is not None and isinstance(schedule, VarianceExploding):
        return float(f"{4000 / math.log(schedule.t_max / schedule.t_min):.4g}")
    return float(f"{1000 / (schedule.t_max - schedule.t_min):.4g}")


def build_network(spec: Mapping[str, Any]) -> nn.Module:
    """A network from {"name": "unet" or "dit", **parameters}; what is left out has the parameter class's
    default."""
    values = check_mapping("network", spec)
    name = values.pop("name", None)
    network, kind = find_network(name)
    params = make_params(str(name), kind, values)
    built = network(params)
    if getattr(built, "params", None) != params:
        raise ValueError(f"the network {name!r} must keep its parameters: self.params = params")
    return built


def _build_part(name: str, spec: Mapping[str, Any]) -> nn.Module:
    """An autoencoder ("name" says of which kind, "kl" unless it does), the text encoders, or a tiny
    autoencoder, from its parameters."""
    values, (part, params) = check_mapping(name, spec), PARTS[name]
    if name == "vae":
        kind = lookup("autoencoder", values.pop("name", "kl"), families().AUTOENCODERS)
        part, params = kind.network, kind.params
    if name == "text":
        readers = check_mapping("text.readers", values.get("readers"))
        values["readers"] = {key: _build_reader(f"text.readers.{key}", each) for key, each in readers.items()}
    return part(make_params(name, params, values))


def _build_reader(name: str, spec: Any) -> Reader:
    """How one text encoder is read, by its "kind"."""
    values = check_mapping(name, spec)
    return make_params(name, lookup(f"kind of {name}", values.get("kind"), families().READERS), values)
