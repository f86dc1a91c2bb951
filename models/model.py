"""A model: network, schedule, prediction, autoencoder and text encoders, built from a description."""

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
    """Accounts for every key of the files that were loaded; an unknown key, or one that a part lacks, raises.

    consumed  loaded into the model
    ignored   left out, with the reason: of the training, known to be harmless, or replaced by another file
    missing   parts that no file holds ("vae", "text", ...); requiring them raises
    notes     what keys and shapes do not show, and how it was decided
    layout    of the files: "native", "ldm", "diffusers", ...; `save` can write it again
    files     by part, the file of its weights
    """

    consumed: tuple[str, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layout: str = "native"
    files: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = Counter(self.ignored.values())
        lines = [f"{len(self.consumed)} tensors loaded ({self.layout} layout), {len(self.ignored)} ignored"]
        lines += [f"  ignored {n}: {reason}" for reason, n in reasons.most_common()]
        lines += [f"  missing: {', '.join(self.missing)}"] * bool(self.missing)
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def __repr__(self) -> str:
        """At most six lines; print shows all."""
        lines = str(self).splitlines()
        if len(lines) > 6:
            lines = [*lines[:5], f"  ... {len(lines) - 5} more lines: print(model.report)"]
        return "\n".join(lines)


PARTS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "vae": (VAE, VAEParams),
    "text": (TextEncoder, TextParams),
    "preview": (TAESD, TAESDParams),
}
SETTINGS = ("shape", "classes", "drop", "grid", "consistency", "family", "role", "sampling")
REMEDY = "make it with models.build({...}), from a network in models.NETWORKS"
MAX_SIDE = 4096  # pixels or latents along a side of a sample, and its channels
MAX_SAMPLING_STEPS = 10_000
FOLDERS = {"backbone": "network"}  # the name in files of a part's tensors, if it is another name


@dataclass(repr=False)
class Model:
    """What `build` and `load` return. Missing parts are None; `network` and `require` raise and name them.

    backbone  the network that denoises
    vae, text, preview  autoencoder, text encoders, tiny autoencoder for previews
    report    accounts for the keys of the files; None for a fresh model
    spec      the description in plain values, which every saved file holds; its entries are:

    network, vae, text, preview  parameters of these parts
    schedule, prediction  of the network
    shape, classes, drop  [C, H, W] of a sample, names of classes, share of samples trained without a label
    grid, sampling  the time grid and the settings to sample with
    consistency  for a distilled model
    family    the published family
    role      what another network does with an image that it sees besides x
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
        """One line for the model, and one for each part: its class, size, dtype and device."""
        spec = self.spec
        what = f"Model of {self.family.title}" if self.family else "Model"
        schedule = spec["schedule"]["name"] if "schedule" in spec else type(self.schedule).__name__
        size = f", samples {'x'.join(map(str, spec['shape']))}" if "shape" in spec else ""
        lines = [f"{what}: predicts {self.prediction.name} on the schedule {schedule}{size}"]
        for name, part in self.parts.items():
            tensors = [*part.parameters(), *part.buffers()]
            size = f"{sum(tensor.numel() for tensor in tensors) / 1e6:,.4g} M parameters"
            kinds = {f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}" for tensor in tensors}
            lines.append(f"  {name:8} {type(part).__name__}, {size}, {', '.join(sorted(kinds))}")
        return "\n".join(lines)

    @property
    def network(self) -> nn.Module:
        """The backbone; ValueError if none was loaded."""
        return self.require("backbone")

    def require(self, part: str) -> Any:
        """A part by name; ValueError that says what is missing if the model does not have it."""
        if getattr(self, part) is None:
            contents = {"backbone": "a UNet", "vae": "an autoencoder", "text": "its text encoders"}
            notes = self.report.notes if self.report and part == "text" else ()
            why = "".join(f"; {note}" for note in notes if note.startswith(LEFT_OUT))
            has, needed = f"it has {', '.join(self.parts) or 'nothing'}{why}", contents.get(part, "TAESD")
            remedy = f"load it with a file that holds {needed}, models.load(file, other)"
            raise ValueError(f"this model has no {part} ({has}): {remedy}")
        return getattr(self, part)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that the model has, by name."""
        parts = {name: getattr(self, name) for name in ("backbone", *PARTS)}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move or cast all parts; returns the model. A part moves as any module: model.text.to("cuda")."""
        for part in self.parts.values():
            part.to(device=device, dtype=dtype)
        return self

    def unpacked(self, dtype: torch.dtype) -> Model:
        """A copy with packed weights (8-bit floats, GGUF's blocks) unpacked to dtype; it shares all others.

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
        """The denoiser of the backbone, or of a replacement for it (wrapped for parallel training)."""
        if self.prediction.input_scale is not None and not isinstance(self.schedule, VarianceExploding):
            raise ValueError(
                f"prediction {self.prediction.name!r} scales the input as EDM does, which needs schedule "
                "'ve': choose it, or 'v'"
            )
        return Denoiser(network or self.network, self.schedule, self.prediction)

    def denoiser(self) -> Denoiser | ConsistencyFunction:
        """The denoiser that solvers take; for a distilled model its consistency function."""
        plain = self.network_denoiser()
        return ConsistencyFunction(plain, build_blend(self.spec["consistency"])) if self.distilled else plain

    @property
    def image_channels(self) -> int:
        """Channels of the condition "image", seen besides x: for SD 5 (inpaint), 4 (edit) or 0."""
        params = getattr(self.backbone, "params", None)
        if not isinstance(params, NetworkParams):
            return 0
        return cast(Any, params).in_channels - params.sample_channels

    @property
    def family(self) -> Family | None:
        """The published family, None for other models."""
        return families().FAMILIES.get(self.spec.get("family", ""))

    @property
    def role(self) -> Role | None:
        """What the network does with an image that it sees besides x, None if it sees none.

        The family determines it; for other models "role" in the description, by default "inpaint". ValueError
        if the network sees a number of channels that no role of its family has.
        """
        if not (channels := self.image_channels):
            return None
        if self.family is None:
            return self.spec.get("role", "inpaint")
        if channels not in (roles := self.family.architecture.channels):
            known = " or ".join(f"{n} ({role})" for n, role in roles.items()) or "none"
            of = self.family.title
            raise ValueError(f"this network sees {channels} channels besides x: known for {of} are {known}")
        return roles[channels]

    @property
    def sees(self) -> tuple[ImageInput, ...]:
        """What the network sees besides x, in the order of its channels; () if nothing."""
        roles = self.family.architecture.roles if self.family else families().DEFAULT_ROLES
        return roles[self.role] if self.role else ()

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network (LCM, FLUX.1 [dev])."""
        return "guidance" in getattr(getattr(self.backbone, "params", None), "takes", ())

    @property
    def distilled(self) -> bool:
        """Whether the denoiser is a consistency function, for few steps of the sampler `consistency`."""
        return "consistency" in self.spec

    def grid(self, steps: int | None, /, size: tuple[int, int] | None = None, **settings: Any) -> Grid:
        """The time grid for this model: the one in its description, or one of these settings of `time_grid`.

        The model supplies what a spacing needs, unless the settings do: the table of align_your_steps for its
        family, and the line and number of tokens of mu_shift, for samples of `size` (H, W), by default the
        size of its training. ValueError for invalid settings, and for align_your_steps if no table is
        published for the family.
        """
        own = check_mapping("grid", self.spec.get("grid", {}))
        settings = settings or own
        spacing = settings.get("spacing")
        if spacing == "align_your_steps" and "table" not in settings:
            of = self.family
            if of is None or of.table is None:
                raise ValueError(
                    f"no table of align_your_steps is published for {of.title if of else 'this model'}: name "
                    f"one, table={' or '.join(ALIGN_YOUR_STEPS)}, or take another spacing"
                )
            settings = {**settings, "table": of.table}
        if spacing == "mu_shift":
            if "line" in own:
                settings = {"line": own["line"], **settings}
            patch, size = self._network_param("patch_size"), size or self.spec.get("shape", (0, 0, 0))[1:]
            if patch and all(size) and not settings.keys() & {"mu", "tokens"}:
                settings = {**settings, "tokens": math.prod(-(-length // patch) for length in size)}
        return time_grid(self.schedule, steps, **check_call("the grid", time_grid, 2, settings))

    def check(self) -> None:
        """ValueError if the description of denoiser, grid or role is wrong, before the model is used."""
        spacing = check_mapping("grid", self.spec.get("grid", {})).get("spacing", "")
        _ = self.denoiser(), self.grid(1 if isinstance(spacing, str) else None), self.role

    def check_description(self) -> None:
        """ValueError unless `build` makes this network, schedule and prediction from the description."""
        failed = "a file of this model could not be loaded again"
        try:
            rebuilt = build(self.spec, device="meta")
        except ValueError as error:
            raise ValueError(f"{failed} ({error}): {REMEDY}") from None
        own: Any = self.network
        other: Any = rebuilt.network
        if type(own) is not type(other):
            kinds = f"its network is a {type(own).__name__}, its description makes a {type(other).__name__}"
            raise ValueError(f"{failed}: {kinds}: {REMEDY}")

        def summary(model: Model) -> tuple[Any, ...]:
            schedule = model.schedule
            ends = [(t, schedule.level(t)) for t in (schedule.t_min, schedule.t_max)]
            return cast(Any, model.network).params, model.prediction.name, ends

        if summary(self) != summary(rebuilt):
            raise ValueError(f"a file of this model would load as the model of its description: {REMEDY}")
        ours, theirs = ({k: v.shape for k, v in each.state_dict().items()} for each in (own, other))
        if ours != theirs:
            odd = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
            raise ValueError(f"{failed}: its description makes another {odd}: {REMEDY}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all weights and vocabularies that images depend on, the same in every layout."""
        parts = {FOLDERS.get(name, name): part for name, part in self.parts.items() if name != "preview"}
        named = ((name, *each) for name, part in parts.items() for each in weight_readers(part))
        tensors = {f"{name}.{key}": read for name, key, read in named}
        hashes = sha256_of_tensors(dict(sorted(tensors.items())))
        lines = [f"{name} {digest}\n" for name, digest in hashes.items()]
        words = {} if self.text is None else self.text.learned_words
        lines += [f"text.{name} {json.dumps(own, sort_keys=True)}\n" for name, own in sorted(words.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def check_finite(self) -> None:
        """ValueError that names the first weight which is not finite, and its file. Reads all weights."""
        for name, part in self.parts.items():
            if weight := find_nonfinite(part):
                file = self.report.files.get(name) if self.report else None
                damaged = f"{file} is damaged: " if file else ""
                raise ValueError(
                    f"{damaged}the {name}'s weight {weight!r} holds values that are not finite: load it "
                    "again from an intact file"
                )

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of all parts, the backbone's as "network.*". ValueError if loaded with memory=...."""
        for part in self.parts.values():
            check_not_streamed(part)
        parts = {FOLDERS.get(name, name): part.state_dict() for name, part in self.parts.items()}
        return {f"{name}.{key}": value for name, state in parts.items() for key, value in state.items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the samples it was trained on. ValueError if unknown."""
        if "shape" not in self.spec:
            raise ValueError("this model does not say what size of sample it was trained on: give a shape")
        channels, height, width = self.spec["shape"]
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the network, None if it takes no label."""
        return self._network_param("num_classes")

    def _network_param(self, name: str) -> Any:
        """A parameter of the backbone, None without it."""
        return getattr(getattr(self.backbone, "params", None), name, None)

    @property
    def null(self) -> Condition:
        """The condition "no class" for guidance, (1,) on the network's device; empty without classes."""
        if self.num_classes is None:
            return NONE
        device = next(self.network.parameters()).device
        return Condition(label=torch.full((1,), self.num_classes, device=device))


def families() -> ModuleType:
    """models.families, imported at its first use, because it imports the names of all tensors in files."""
    return import_module("models.families")


def build(spec: Mapping[str, Any], device: torch.device | str | None = None) -> Model:
    """A model with fresh weights from its description. Unknown names raise and name the nearest known one.

    A network's time_factor that is None or left out is derived from the schedule, and added to the model's
    description. A network's name can be your own class, see `find_network`.

    device  of the network, default torch's own; "meta" makes it without weights, to load those of a file
    """
    spec = check_mapping("a model", spec)
    spec = {key: dict(value) if isinstance(value, Mapping) else value for key, value in spec.items()}
    check_names("model part", spec, ["network", *PARTS, "schedule", "prediction", *SETTINGS])
    required = [] if spec.keys() & PARTS.keys() else ["network"]
    if missing := [part for part in (*required, "schedule", "prediction") if part not in spec]:
        raise ValueError(f"the model's description lacks {missing[0]!r}")
    prediction = build_prediction(spec["prediction"])
    _check_settings(spec)
    schedule = build_schedule(spec["schedule"])
    if "network" in spec:
        spec["network"] = _describe_network(check_mapping("network", spec["network"]), schedule, prediction)
    with torch.device(device or torch.get_default_device()):
        network = build_network(spec["network"]) if "network" in spec else None
        parts: dict[str, Any] = {name: _build_part(name, spec[name]) for name in PARTS if name in spec}
    model = Model(network, schedule, prediction, spec, **parts)
    if "shape" in spec and network is not None:
        stated, channels = spec["shape"][0], cast(Any, network.params).sample_channels
        if stated != channels:
            raise ValueError(
                f"shape says that samples have {stated} channels, and the network takes {channels}"
            )
    if "classes" in spec and (count := len(spec["classes"])) != model.num_classes:
        raise ValueError(
            f"classes names {count} classes, and the network has num_classes={model.num_classes}"
        )
    if network is not None:
        model.check()
    return model


def _check_settings(spec: Mapping[str, Any]) -> None:
    """ValueError for impossible settings of samples and sampling, before they hang or fill the memory."""
    if "shape" in spec:
        check_type("shape", spec["shape"], tuple[int, int, int])
        if not all(1 <= size <= MAX_SIDE for size in spec["shape"]):
            raise ValueError(f"shape holds sizes from 1 to {MAX_SIDE:,}, not {brief(spec['shape'])}")
    if "family" in spec:
        check_type("family", spec["family"], str)
        check_names("family", [spec["family"]], families().FAMILIES)
    check_names("role", [spec.get("role", "inpaint")], get_args(families().Role))
    if "role" in spec and spec.get("family"):
        raise ValueError(f"leave role out: it is for your own networks, and {spec['family']} determines it")
    check_type("classes", classes := spec.get("classes", []), list[str])
    if twice := [name for name, n in Counter(classes).items() if n > 1]:
        raise ValueError(f"classes holds {brief(twice[0])} twice: each class must have its own name")
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
    """A network's description in plain values: its class by name, and its time_factor."""
    if isinstance(network.get("name"), type):
        network["name"] = outside.provide("network", network["name"])
    _, params = find_network(network.get("name"))
    if "time_factor" in {field.name for field in fields(params)} and network.get("time_factor") is None:
        network["time_factor"] = time_factor(schedule, prediction)
    return network


def find_network(name: Any) -> tuple[type[nn.Module], type[Any]]:
    """A network's class and its parameters' class, by a name in models.NETWORKS or `diffusion.outside`.

    A network from outside is built as Network(params), where `params` is annotated as a dataclass that
    derives from `NetworkParams`. ValueError for an unknown name and for another signature.
    """
    found: Any = lookup("network", name, families().NETWORKS)
    if isinstance(found, tuple):
        return found
    hints = get_type_hints(found.__init__) if isinstance(found, type) and issubclass(found, nn.Module) else {}
    params = next(iter(hints.values()), None)
    if not (isinstance(params, type) and is_dataclass(params) and issubclass(params, NetworkParams)):
        raise ValueError(
            f"the network {name!r} must be an nn.Module that is built from one dataclass, which derives from "
            "models.NetworkParams: def __init__(self, params: MyParams)"
        )
    return found, params


def time_factor(schedule: Schedule, prediction: Prediction) -> float:
    """The factor that scales a network's times to a range of 1000, which its time embedding expects.

    1 for the indices of a table. EDM's network sees log(sigma) / 4 instead of t.
    """
    if schedule.rows is not None:
        return 1.0
    if prediction.network_time is not None and isinstance(schedule, VarianceExploding):
        return float(f"{4000 / math.log(schedule.t_max / schedule.t_min):.4g}")
    return float(f"{1000 / (schedule.t_max - schedule.t_min):.4g}")


def build_network(spec: Mapping[str, Any]) -> nn.Module:
    """A network from {"name": "unet", **parameters}; parameters left out have their defaults."""
    values = check_mapping("network", spec)
    name = values.pop("name", None)
    kind, params_class = find_network(name)
    params = make_params(str(name), params_class, values)
    network = kind(params)
    if getattr(network, "params", None) != params:
        raise ValueError(f"the network {name!r} must keep its parameters: self.params = params")
    return network


def _build_part(name: str, spec: Mapping[str, Any]) -> nn.Module:
    """One of PARTS from its parameters; an autoencoder's "name" says which kind it is, by default "kl"."""
    values, (part, params) = check_mapping(name, spec), PARTS[name]
    if name == "vae":
        kind = lookup("autoencoder", values.pop("name", "kl"), families().AUTOENCODERS)
        part, params = kind.network, kind.params
    if name == "text":
        readers = check_mapping("text.readers", values.get("readers"))
        values["readers"] = {key: _build_reader(f"text.readers.{key}", each) for key, each in readers.items()}
    return part(make_params(name, params, values))


def _build_reader(name: str, spec: Any) -> Reader:
    """The reader of one text encoder, by its "kind"."""
    values = check_mapping(name, spec)
    return make_params(name, lookup(f"kind of {name}", values.get("kind"), families().READERS), values)
