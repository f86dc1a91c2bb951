"""`load`: any mix of files and folders to one model."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.messages import brief
from diffusion.spec import check_type
from models.checkpoints import native
from models.checkpoints.blank import BlankWithin
from models.checkpoints.clip_vocabulary import is_clip
from models.checkpoints.describe import describe
from models.checkpoints.findings import Findings, Pipeline
from models.checkpoints.folder import config_beside, open_components, unused
from models.checkpoints.parts import AVERAGED, LATENT_STATISTICS, Found, Part, find_parts
from models.checkpoints.stored import TensorFile
from models.checkpoints.table import Supplies, check_dtype, supplies
from models.checkpoints.tensors import open_tensors
from models.checkpoints.vocabulary import find_tokenizer, is_vocabulary
from models.download import PUBLISHED
from models.model import Model, Report, build
from models.packed import FLOAT8, Packed, PackedLinear, pack
from models.products import Linear
from models.streaming import Budget, layers

DTypes = torch.dtype | Mapping[str, torch.dtype] | None
NAMES = ("backbone", "vae", "text", "preview")


def load(
    *paths: str | Path,
    ema: bool = True,
    dtype: DTypes = None,
    family: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    zero_snr: bool | None = None,
    memory: str | int | None = None,
) -> Model:
    """A model from files: one that holds all of it, a diffusers folder, a training run's folder, single parts, or any mix of them.

    What each holds is found out from its keys and shapes. Later paths replace the parts that earlier ones hold. Networks come in evaluation
    mode, on the CPU, their weights memory-mapped from the files where no conversion is needed: of these only the ends of each tensor are
    looked at now (`Model.check_finite` reads all). Nothing is downloaded.

    ema         take averaged weights where a file has them; False takes the raw ones
    dtype       of the weights: None as in the files, one for all, or by part: {"backbone": torch.bfloat16, "vae": torch.float32}; packed
                weights (8-bit floats, GGUF's blocks) stay as they are, `Model.unpacked` unpacks them, and compute with it
    family      a name in models.FAMILIES, where keys and shapes do not tell: "sdxl-turbo", "lcm-sdxl", ...
    prediction  "eps", "v", ...: what the network predicts, where the guess is wrong (SD 2; the report says what was guessed)
    zero_snr    whether the schedule ends in pure noise (zero terminal SNR), where the files do not say it: fine-tuned v-models often do
    variant     which weights of a diffusers folder: "fp16", "non_ema", ...; None takes the plain ones, or those that there are

    memory      "6GB": what this process may take. Blocks of transformers for which there is no room are read from their files whenever it
                is their turn; a quarter of it is left for what the networks compute with. Images are the same; there are no gradients

    T5 needs its tokenizer, tokenizer.json or spiece.model: it is a path like the others, or lies beside T5's weights. A tower of CLIP with
    words of its own needs the folder of its tokenizer, which lies beside the tower's in diffusers' folders, or is a path like the others.

    Raises FileNotFoundError, or ValueError in one line that names file and key, for what is damaged, foreign, incomplete or unknown.
    """
    places, vocabularies = _checked(paths)
    check_dtype(dtype, NAMES)
    check_type("zero_snr", zero_snr, bool | None)
    files = {path: open_tensors(path) for path in places if not path.is_dir()}
    if own := [path for path in places if native.is_native(path, files.get(path))]:
        if len(places) > 1 or vocabularies or family or prediction or variant or zero_snr is not None:
            raise ValueError(f"{own[0]} describes a whole model itself: load it alone, with ema and dtype only")
        if memory is not None:
            raise ValueError(f"{own[0]} cannot be read block by block: save it with layout='separate' and load these files with memory=...")
        return native.load(own[0], ema=ema, dtype=dtype)
    loading = _Loading(list(_opened(places, files, variant, ema)))
    for path in places:
        loading.look_around(path, ema)
    for opened in loading.files:
        loading.add(opened)
    loading.found.vocabularies = vocabularies
    _check_preview([part for part in loading.found.single if part.kind == "preview"])
    spec, towers = describe(loading.found, family, prediction, zero_snr)
    try:
        with BlankWithin(shape for opened in loading.files for shape in opened.file.shapes.values()):
            model = build(spec, device="meta")
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, places))}: a model that cannot be built: {error}") from None
    _give_tokenizers(model, towers, loading.found)
    modules = [(part, model.require(part.kind).get_submodule(part.layout.inside)) for part in loading.found.single]
    modules += [(part, model.require("text").towers[name]) for name, part in towers.items()]
    _fill(modules, dtype, memory)
    for network in model.parts.values():
        network.eval()
    model.report = loading.report([part for part, _ in modules], model, any(path.is_dir() for path in places))
    return model


def _give_tokenizers(model: Model, towers: Mapping[str, Part], found: Findings) -> None:
    """The text towers' tokenizers. ValueError for one that is too large for its tower, and for one that was given and has none."""
    if model.text is not None:
        model.text.tokenizers = dict(found.tokenizers)
    if "t5" in towers:
        model.require("text").t5_tokenizer = find_tokenizer(towers["t5"], found.vocabularies, found.notes)
    for path in found.vocabularies:
        who = "text encoder of CLIP" if is_clip(path) else "T5"
        if not (towers.keys() - {"t5"} if is_clip(path) else towers.keys() & {"t5"}):
            raise ValueError(f"{path} is a tokenizer, and there is no {who} that would read it: leave it out, or load {who} too")
    if model.text is not None:
        try:
            model.text.check_vocabularies()
        except ValueError as error:
            raise ValueError(f"{', '.join(dict.fromkeys(str(part.file.path) for part in towers.values()))}: {error}") from None


def _checked(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Files and folders of weights, and tokenizers. ValueError or FileNotFoundError where there are none, or what is named is not there."""
    if not paths:
        raise ValueError("load what? Give at least one file or folder")
    for path in paths:
        if not isinstance(path, (str, Path)):
            raise ValueError(f"paths are given one by one, models.load(*paths), and not as {brief(path)}")
        if path == "":  # which would be the working folder
            raise ValueError("a path of weights is empty: give a file or folder")
    places = list(dict.fromkeys(map(Path, paths)))
    for path in places:
        if not path.exists():
            known = PUBLISHED.get(str(path))
            how = f", family={known.family!r}" if known and known.family else ""
            fetch = f"; models.load(*models.download({str(path)!r}){how}) fetches the published model" if known else ""
            raise FileNotFoundError(f"no such file or folder: {path}{fetch}")
    weights, vocabularies = [path for path in places if not is_vocabulary(path)], [path for path in places if is_vocabulary(path)]
    if not weights:
        raise ValueError(f"{vocabularies[0]} is a tokenizer: load it with the weights of the text encoder that reads it")
    return weights, vocabularies


def _fill(modules: Sequence[tuple[Part, nn.Module]], dtype: DTypes, memory: str | int | None) -> None:
    """Give networks on the meta device their weights."""
    wanted = [dtype.get(part.kind) if isinstance(dtype, Mapping) else dtype for part, _ in modules]
    found = [(module, prepare(module, part, each)) for (part, module), each in zip(modules, wanted, strict=True)]
    budget = None if memory is None else Budget(memory, found)
    for module, supply in found:
        fill(module, supply) if budget is None else budget.fill(module, supply)


def prepare(module: nn.Module, part: Part, dtype: torch.dtype | None) -> Supplies:
    """Where every tensor of a network on the meta device is to be had. ValueError unless keys and shapes are exactly those of the layout.

    Linear layers whose weights are packed in the file become packed ones.
    """
    state = module.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    found: dict[str, Any] = {**supplies(part.layout.table(state), shapes, part, dtype or _main_dtype(part))}
    for name, supply in list(found.items()):
        layer, _, tensor = name.rpartition(".")
        if tensor == "weight" and isinstance(module.get_submodule(layer), Linear) and (packed := supply.packed()):
            del found[name]
            blank = {inner: torch.empty(each.shape, dtype=each.dtype, device="meta") for inner, each in packed.items()}
            pack(module, layer, Packed(str(supply.pieces[0].packing), blank["packed"], blank.get("scale")))
            found |= {f"{layer}.{inner}": each for inner, each in packed.items()}
    return found


def fill(module: nn.Module, supplies: Supplies) -> None:
    """Give a network on the meta device its weights."""
    module.load_state_dict({name: supply.take() for name, supply in supplies.items()}, assign=True)


def _main_dtype(part: Part) -> torch.dtype:
    """That of most of a part's values, since a network computes in one; bfloat16 where these are packed or 8-bit floats.

    What converters leave unpacked in a file of packed weights they write in whichever type their readers have for it.
    """
    counts: Counter[torch.dtype] = Counter()
    for stored in part.stored.values():
        small = stored.packing is not None or stored.dtype in FLOAT8
        counts[torch.float8_e4m3fn if small else stored.dtype] += math.prod(stored.shape)
    main = counts.most_common(1)[0][0]
    return torch.bfloat16 if main in FLOAT8 else main


def _packed(model: Model) -> Iterator[str]:
    """For the report, which weights stay packed, and how."""
    for name, part in model.parts.items():
        counts = Counter(layer.packing for _, layer in layers(part) if isinstance(layer, PackedLinear))
        if counts:
            kinds = ", ".join(f"{count} in {packing}" for packing, count in sorted(counts.items()))
            yield f"weights of the {name} stay packed as in the file ({kinds})"


def _opened(places: list[Path], files: Mapping[Path, TensorFile], variant: str | None, ema: bool) -> Iterator[Found]:
    for path in places:
        for file, hints in [(files[path], config_beside(path))] if path in files else open_components(path, variant, ema):
            yield find_parts(file, hints, ema)


def _check_preview(parts: list[Part]) -> None:
    """ValueError for one half of TAESD alone."""
    halves = {part.layout.inside: part for part in parts}
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if half in halves and other not in halves:
            path = halves[half].file.path
            raise ValueError(f"{path} is {halves[half].layout.name} alone: load the file of the {other}, taesd_{other}, beside it")
    if len({part.params for part in parts}) > 1:
        raise ValueError(f"{parts[0].file.path} and {parts[1].file.path} are halves of different autoencoders")


def _same_place(a: str, b: str) -> bool:
    """Whether two layouts hold the same of a network: "" holds all of it."""
    return a == b or not (a and b)


class _Loading:
    """The parts that are taken of all that the files hold, and the account of every key."""

    def __init__(self, files: list[Found]) -> None:
        self.files, self.ignored, self.found = files, dict[str, str](), Findings()
        self.folder = os.path.commonpath([opened.file.path.absolute().parent for opened in files])

    def look_around(self, path: Path, ema: bool) -> None:
        """What lies in a folder beside the weights that are taken."""
        pipeline = Pipeline.of(path)
        if pipeline.scheduler or pipeline.index:
            self.found.pipelines.append(pipeline)
        self.ignored |= unused(path, ema)

    def look_above(self, part: Part) -> None:
        """What the pipeline says whose index names the part's folder, where that folder or its file was given in place of the whole."""
        home = Path(os.path.abspath(part.file.path)).parent
        pipeline = Pipeline.of(home.parent)
        if part.hints and home.name in pipeline.index and not any(each.holds(part) for each in self.found.pipelines):
            self.found.pipelines.append(pipeline)

    def add(self, opened: Found) -> None:
        """Take a file's parts, in place of those of the same kind in files before it."""
        self.found.files.append(opened.file)
        self.ignored |= {self.name(opened.file, key): why for key, why in opened.ignored.items()}
        for part in opened.parts:
            if part.kind == "backbone":
                self.found.networks[opened.file.path] = part.params
                self.look_above(part)
            if part.kind == "text":  # which of them it is depends on the others: `describe` tells
                self.found.towers.append(part)
                continue
            replaced = [
                other for other in self.found.single if other.kind == part.kind and _same_place(part.layout.inside, other.layout.inside)
            ]
            self.found.single = [other for other in self.found.single if other not in replaced] + [part]
            self.leave_out(replaced, f"replaced by what {part.file.path.name} holds")

    def leave_out(self, parts: list[Part], why: str) -> None:
        for part in parts:
            self.ignored |= {self.name(part.file, key): why for key in part.keys.values()}

    def name(self, file: TensorFile, key: str) -> str:
        """How the report calls a key: with its file's name where there are several, from the folder that they have in common."""
        return f"{os.path.relpath(file.path.absolute(), self.folder)}: {key}" if len(self.files) > 1 else key

    def report(self, taken: list[Part], model: Model, folder: bool) -> Report:
        for part, why in self.found.left_out:
            self.leave_out([part], why)
        self.found.notes += _packed(model)
        consumed = [self.name(part.file, key) for part in taken for key in part.keys.values()]
        used = set(consumed)
        scales = {self.name(each.file, scale): self.name(each.file, key) for each in self.files for scale, key in each.scales.items()}
        consumed += [scale for scale, key in scales.items() if key in used]
        self.ignored |= {scale: self.ignored[key] for scale, key in scales.items() if key in self.ignored}
        consumed += [self.name(file, key) for file in self.found.files for key in LATENT_STATISTICS if key in file.tensors]
        missing = tuple(name for name in ("backbone", "vae", "text") if name not in model.parts)
        layouts = {part.layout.name for part in taken}
        layout = "diffusers" if folder or layouts <= {"diffusers", "transformers"} else "ldm" if len(self.files) == 1 else "separate"
        if AVERAGED in self.ignored.values():
            self.found.notes.append("averaged weights (EMA) are taken; ema=False takes the raw ones")
        files = {kind: dict.fromkeys(str(part.file.path) for part in taken if part.kind == kind) for kind in model.parts}
        sources = {kind: " or ".join(paths) for kind, paths in files.items()}
        return Report(tuple(consumed), self.ignored, missing, tuple(self.found.notes), layout, sources)
