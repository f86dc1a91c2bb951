"""`load`: makes one model of any mix of files and folders."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from diffusion.messages import brief
from diffusion.spec import check_type
from models.families import PUBLISHED
from models.files.blank import BlankWithin
from models.files.table import Part, Supplies, check_dtype, supplies
from models.files.tensors import holds_weights, open_tensors
from models.layers.packed import FLOAT8, Packed, PackedLinear, pack
from models.layers.streaming import Budget, all_layers
from models.layouts import native
from models.layouts.describe import describe
from models.layouts.findings import Findings, Pipeline
from models.layouts.folder import open_components, part_config, unused
from models.layouts.parts import AVERAGED, find_parts
from models.model import PARTS, Model, Report, build
from models.text.vocabulary import SPIECE, TABLE, WHOLE

DTypes = torch.dtype | Mapping[str, torch.dtype] | None


def load(
    *paths: str | Path,
    ema: bool = True,
    dtype: DTypes = None,
    family: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    zero_snr: bool | None = None,
    memory: str | int | None = None,
    network: type[nn.Module] | None = None,
    trust: bool = False,
) -> Model:
    """A model from a file, a diffusers folder, a training run's folder, single parts, or any mix of them.

    Keys and shapes show what each file holds. Parts from later paths replace those from earlier ones.
    Networks are in evaluation mode and on the CPU. Weights are memory-mapped unless they are converted; only
    the ends of mapped tensors are checked (`Model.check_finite` reads all). Nothing is downloaded.

    ema         load averaged weights if a file has them; False loads the raw ones
    dtype       of the weights: None as in the files, one for all, or by part: {"backbone": torch.bfloat16,
                "vae": torch.float32}. Packed weights (8-bit floats, GGUF's blocks) stay packed and compute in
                it; `Model.unpacked` unpacks them
    family      a name in models.FAMILIES, if keys and shapes do not show it: "sdxl-turbo", "lcm-sdxl", ...
    prediction  "eps", "v", ...: what the network predicts, if the guess in the report is wrong (SD 2)
    zero_snr    whether the schedule ends in pure noise (zero terminal SNR), if the files do not say so:
                fine-tuned v-models often do
    variant     weights of a diffusers folder: "fp16", "non_ema", ...; None loads the plain ones, else any
    network     the class of your own network, for a file whose network is not in models.NETWORKS
    trust       import what such a file names ("mynet:Tiny"; also a schedule, a spacing, ...), which runs that
                code: only for your own files
    memory      "6GB": the memory that this process may use. Blocks of transformers that do not fit are read
                from their files whenever they are used; a quarter is left for activations. Images are the
                same; there are no gradients

    T5 needs its tokenizer, tokenizer.json or spiece.model, as a path like the others or next to T5's weights.
    A CLIP tower with its own vocabulary needs the folder of its tokenizer, as a path or as in diffusers'
    folders.

    Raises FileNotFoundError, or ValueError in one line that names file and key, for damaged, foreign,
    incomplete or unknown files.
    """
    sources, vocabularies = _check_paths(paths)
    check_dtype(dtype, ("backbone", *PARTS))
    check_type("zero_snr", zero_snr, bool | None)
    files = {path: open_tensors(path) for path in sources if not path.is_dir()}
    if own := [path for path in sources if native.is_native(path, files.get(path))]:
        if len(sources) > 1 or vocabularies or family or prediction or variant or zero_snr is not None:
            raise ValueError(f"{own[0]} describes a whole model: load it alone, with ema and dtype only")
        if memory is not None:
            remedy = "save it with layout='separate' and load these files with memory=..."
            raise ValueError(f"{own[0]} cannot be read block by block: {remedy}")
        return native.load(own[0], ema=ema, dtype=dtype, network=network, trust=trust)
    if network is not None or trust:
        published = f"{sources[0]} holds a published kind of network"
        raise ValueError(f"{published}: network and trust are for files with your own")
    pipelines = [pipeline for pipeline in map(Pipeline.read, sources) if pipeline.scheduler or pipeline.index]
    found = Findings(pipelines=pipelines, vocabularies=vocabularies)
    for path in sources:
        single = [(files[path], part_config(path))] if path in files else None
        for file, hints in single or open_components(path, variant, ema):
            found.add(find_parts(file, hints, ema))
    _check_preview([part for part in found.single if part.kind == "preview"])
    spec, towers = describe(found, family, prediction, zero_snr)
    try:
        with BlankWithin(shape for file in found.files for shape in file.shapes.values()):
            model = build(spec, device="meta")
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, sources))}: a model that cannot be built: {error}") from None
    if model.text is not None:
        model.text.tokenizers = found.tokenizers
        try:
            model.text.check()
        except ValueError as error:
            files_of_towers = dict.fromkeys(str(part.file.path) for part in towers.values())
            raise ValueError(f"{', '.join(files_of_towers)}: {error}") from None
    elif found.vocabularies:
        path = found.vocabularies[0]
        raise ValueError(f"{path} is a tokenizer, and no text encoder reads it: leave it out")
    modules = [(part, model.require(part.kind).get_submodule(part.layout.submodule)) for part in found.single]
    modules += [(part, model.require("text").towers[name]) for name, part in towers.items()]
    _fill(modules, dtype, memory)
    for part in model.parts.values():
        part.eval()
    model.report = _report(found, [part for part, _ in modules], model, sources, ema)
    return model


def _check_paths(names: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Paths of weights, and of tokenizers. ValueError or FileNotFoundError if one is missing."""
    if not names:
        raise ValueError("nothing to load: give at least one file or folder")
    for name in names:
        if not isinstance(name, (str, Path)):
            raise ValueError(f"give paths one by one, models.load(*paths), not as {brief(name)}")
        if name == "":  # Path would take it for the working folder
            raise ValueError("a path of weights is empty: give a file or folder")
    paths = list(dict.fromkeys(map(Path, names)))
    for path in paths:
        if not path.exists():
            hint = ""
            if known := PUBLISHED.get(str(path)):
                family = f", family={known.family!r}" if known.family else ""
                hint = f"; models.load(*models.download({str(path)!r}){family}) fetches the published model"
            raise FileNotFoundError(f"no such file or folder: {path}{hint}")
    vocabularies = [path for path in paths if _is_vocabulary(path)]
    weights = [path for path in paths if path not in vocabularies]
    if not weights:
        remedy = "load it with the weights of the text encoder that reads it"
        raise ValueError(f"{vocabularies[0]} is a tokenizer: {remedy}")
    return weights, vocabularies


def _is_vocabulary(path: Path) -> bool:
    """Whether a path is a tokenizer: tokenizer.json, spiece.model, or a folder with one and no weights."""
    if path.is_dir():
        return any((path / name).is_file() for name in (WHOLE, SPIECE, TABLE)) and not holds_weights(path)
    return path.name.endswith(WHOLE) or path.suffix == ".model"


def _fill(modules: Sequence[tuple[Part, nn.Module]], dtype: DTypes, memory: str | int | None) -> None:
    """Load the weights of networks on the meta device."""
    prepared: list[tuple[nn.Module, Supplies]] = []
    for part, module in modules:
        own = dtype.get(part.kind) if isinstance(dtype, Mapping) else dtype
        prepared.append((module, _prepare(module, part, own)))
    budget = None if memory is None else Budget(memory, prepared)
    for module, supply in prepared:
        if budget is None:
            module.load_state_dict({name: each.take() for name, each in supply.items()}, assign=True)
        else:
            budget.fill(module, supply)


def _prepare(module: nn.Module, part: Part, dtype: torch.dtype | None) -> Supplies:
    """A supply for every tensor of a network. ValueError unless keys and shapes are those of the layout.

    Linear layers whose weights are packed in the file become packed ones.
    """
    prepared = supplies(part, module.state_dict(), dtype or _main_dtype(part))
    for name, supply in list(prepared.items()):
        layer, _, tensor = name.rpartition(".")
        linear = tensor == "weight" and isinstance(module.get_submodule(layer), nn.Linear)
        if linear and (packed := supply.packed()):
            del prepared[name]
            blank = {
                key: torch.empty(each.shape, dtype=each.dtype, device="meta") for key, each in packed.items()
            }
            pack(module, layer, Packed(str(supply.pieces[0].packing), blank["packed"], blank.get("scale")))
            prepared |= {f"{layer}.{key}": each for key, each in packed.items()}
    return prepared


def _main_dtype(part: Part) -> torch.dtype:
    """The dtype of most of a part's values, for all of it; bfloat16 if most are packed or 8-bit floats.

    In files with packed weights, the dtype of the others depends on the converter, and says nothing.
    """
    counts: Counter[torch.dtype] = Counter()
    for stored in part.stored.values():
        small = stored.packing is not None or stored.dtype in FLOAT8
        counts[torch.float8_e4m3fn if small else stored.dtype] += math.prod(stored.shape)
    main = counts.most_common(1)[0][0]
    return torch.bfloat16 if main in FLOAT8 else main


def _note_packed(model: Model) -> Iterator[str]:
    """Notes on weights that stay packed."""
    for name, part in model.parts.items():
        counts = Counter(layer.packing for _, layer in all_layers(part) if isinstance(layer, PackedLinear))
        if counts:
            kinds = ", ".join(f"{count} in {packing}" for packing, count in sorted(counts.items()))
            yield f"weights of the {name} stay packed as in the file ({kinds})"


def _check_preview(parts: list[Part]) -> None:
    """ValueError for one half of TAESD alone."""
    halves = {part.layout.submodule: part for part in parts}
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if half in halves and other not in halves:
            path, name = halves[half].file.path, halves[half].layout.name
            raise ValueError(f"{path} is only {name}: load it with the file of the {other}, taesd_{other}")
    if len({part.params for part in parts}) > 1:
        paths = " and ".join(str(part.file.path) for part in parts)
        raise ValueError(f"{paths} are halves of different autoencoders")


def _report(
    found: Findings, loaded: Sequence[Part], model: Model, paths: Sequence[Path], ema: bool
) -> Report:
    """The account of every key. With several files, keys follow their file's path from the common folder."""
    folder = os.path.commonpath([file.path.absolute().parent for file in found.files])
    several = len(found.files) > 1
    prefixes = {
        file.path: f"{os.path.relpath(file.path.absolute(), folder)}: " if several else ""
        for file in found.files
    }

    def keys(part: Part) -> Iterator[str]:
        return (prefixes[part.file.path] + key for stored in part.stored.values() for key in stored.keys)

    consumed = [key for part in loaded for key in keys(part)]
    ignored = {name: reason for path in paths for name, reason in unused(path, ema).items()}
    for file in found.files:
        ignored |= {prefixes[file.path] + key: reason for key, reason in file.ignored.items()}
    ignored |= {key: reason for part, reason in found.left_out for key in keys(part)}
    notes = [*found.notes, *_note_packed(model)]
    if AVERAGED in ignored.values():
        notes.append("averaged weights (EMA) are loaded; ema=False loads the raw ones")
    layouts = {part.layout.name for part in loaded}
    in_folder = layouts <= {"diffusers", "transformers"} or any(path.is_dir() for path in paths)
    layout = "diffusers" if in_folder else "separate" if several else "ldm"
    missing = tuple(name for name in ("backbone", "vae", "text") if name not in model.parts)
    sources = {
        kind: " or ".join(dict.fromkeys(str(part.file.path) for part in loaded if part.kind == kind))
        for kind in model.parts
    }
    return Report(tuple(consumed), ignored, missing, tuple(notes), layout, sources)
