"""`load`: any mix of files and folders to one model."""

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
from models.layouts.folder import config_beside, open_components, unused
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
    """A model from files: one that holds all of it, a diffusers folder, a training run's folder, single
    parts, or any mix of them.

    What each holds is found out from its keys and shapes. Later paths replace the parts that earlier ones
    hold. Networks come in evaluation mode, on the CPU, their weights memory-mapped from the files where no
    conversion is needed: of these only the ends of each tensor are looked at now (`Model.check_finite` reads
    all). Nothing is downloaded.

    ema         take averaged weights where a file has them; False takes the raw ones
    dtype       of the weights: None as in the files, one for all, or by part: {"backbone": torch.bfloat16,
                "vae": torch.float32}; packed weights (8-bit floats, GGUF's blocks) stay as they are,
                `Model.unpacked` unpacks them, and compute with it
    family      a name in models.FAMILIES, where keys and shapes do not tell: "sdxl-turbo", "lcm-sdxl", ...
    prediction  "eps", "v", ...: what the network predicts, where the guess is wrong (SD 2; the report says
                what was guessed)
    zero_snr    whether the schedule ends in pure noise (zero terminal SNR), where the files do not say it:
                fine-tuned v-models often do
    variant     which weights of a diffusers folder: "fp16", "non_ema", ...; None takes the plain ones, or
                those that there are
    network     the class of a network of one's own, for a file whose network is not in models.NETWORKS
    trust       import what such a file names ("mynet:Tiny"; also a schedule, a spacing, ...), which runs that
                code: for files of one's own
    memory      "6GB": what this process may take. Blocks of transformers for which there is no room are read
                from their files whenever it is their turn; a quarter of it is left for what the networks
                compute with. Images are the same; there are no gradients

    T5 needs its tokenizer, tokenizer.json or spiece.model: it is a path like the others, or lies beside T5's
    weights. A tower of CLIP with words of its own needs the folder of its tokenizer, which lies beside the
    tower's in diffusers' folders, or is a path like the others.

    Raises FileNotFoundError, or ValueError in one line that names file and key, for what is damaged, foreign,
    incomplete or unknown.
    """
    places, vocabularies = _checked(paths)
    check_dtype(dtype, ("backbone", *PARTS))
    check_type("zero_snr", zero_snr, bool | None)
    files = {path: open_tensors(path) for path in places if not path.is_dir()}
    if own := [path for path in places if native.is_native(path, files.get(path))]:
        if len(places) > 1 or vocabularies or family or prediction or variant or zero_snr is not None:
            raise ValueError(
                f"{own[0]} describes a whole model itself: load it alone, with ema and dtype only"
            )
        if memory is not None:
            raise ValueError(
                f"{own[0]} cannot be read block by block: save it with layout='separate' and load these "
                "files with memory=..."
            )
        return native.load(own[0], ema=ema, dtype=dtype, network=network, trust=trust)
    if network is not None or trust:
        raise ValueError(
            f"{places[0]} holds a network of a published kind: network and trust are for files with one of "
            "your own"
        )
    pipelines = [pipeline for pipeline in map(Pipeline.of, places) if pipeline.scheduler or pipeline.index]
    found = Findings(pipelines=pipelines, vocabularies=vocabularies)
    for path in places:
        for file, hints in (
            [(files[path], config_beside(path))] if path in files else open_components(path, variant, ema)
        ):
            found.add(find_parts(file, hints, ema))
    _check_preview([part for part in found.single if part.kind == "preview"])
    spec, towers = describe(found, family, prediction, zero_snr)
    try:
        with BlankWithin(shape for file in found.files for shape in file.shapes.values()):
            model = build(spec, device="meta")
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, places))}: a model that cannot be built: {error}") from None
    if model.text is not None:
        model.text.tokenizers = found.tokenizers
        try:
            model.text.check()
        except ValueError as error:
            raise ValueError(
                f"{', '.join(dict.fromkeys(str(part.file.path) for part in towers.values()))}: {error}"
            ) from None
    elif found.vocabularies:
        raise ValueError(
            f"{found.vocabularies[0]} is a tokenizer, and there is no text encoder that would read it: "
            "leave it out"
        )
    modules = [(part, model.require(part.kind).get_submodule(part.layout.inside)) for part in found.single]
    modules += [(part, model.require("text").towers[name]) for name, part in towers.items()]
    _fill(modules, dtype, memory)
    for part in model.parts.values():
        part.eval()
    model.report = _report(found, [part for part, _ in modules], model, places, ema)
    return model


def _checked(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """Files and folders of weights, and tokenizers. ValueError or FileNotFoundError where there are none, or
    what is named is not there."""
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
            fetch = (
                f"; models.load(*models.download({str(path)!r}){how}) fetches the published model"
                if known
                else ""
            )
            raise FileNotFoundError(f"no such file or folder: {path}{fetch}")
    weights, vocabularies = (
        [path for path in places if not _is_vocabulary(path)],
        [path for path in places if _is_vocabulary(path)],
    )
    if not weights:
        raise ValueError(
            f"{vocabularies[0]} is a tokenizer: load it with the weights of the text encoder that reads it"
        )
    return weights, vocabularies


def _is_vocabulary(path: Path) -> bool:
    """Whether a path is a tokenizer: by its name tokenizer.json, spiece.model or another .model, or a folder
    of one without weights."""
    if path.is_dir():
        return any((path / name).is_file() for name in (WHOLE, SPIECE, TABLE)) and not holds_weights(path)
    return path.name.endswith(WHOLE) or path.suffix == ".model"


def _fill(modules: Sequence[tuple[Part, nn.Module]], dtype: DTypes, memory: str | int | None) -> None:
    """Give networks on the meta device their weights."""
    wanted = [dtype.get(part.kind) if isinstance(dtype, Mapping) else dtype for part, _ in modules]
    found = [
        (module, _prepare(module, part, each)) for (part, module), each in zip(modules, wanted, strict=True)
    ]
    budget = None if memory is None else Budget(memory, found)
    for module, supply in found:
        if budget is None:
            module.load_state_dict({name: each.take() for name, each in supply.items()}, assign=True)
        else:
            budget.fill(module, supply)


def _prepare(module: nn.Module, part: Part, dtype: torch.dtype | None) -> Supplies:
    """A supply for every tensor of a network on the meta device. ValueError unless keys and shapes are
    exactly those of the layout.

    Linear layers whose weights are packed in the file become packed ones.
    """
    found = supplies(part, module.state_dict(), dtype or _main_dtype(part))
    for name, supply in list(found.items()):
        layer, _, tensor = name.rpartition(".")
        if (
            tensor == "weight"
            and isinstance(module.get_submodule(layer), nn.Linear)
            and (packed := supply.packed())
        ):
            del found[name]
            blank = {
                inner: torch.empty(each.shape, dtype=each.dtype, device="meta")
                for inner, each in packed.items()
            }
            pack(module, layer, Packed(str(supply.pieces[0].packing), blank["packed"], blank.get("scale")))
            found |= {f"{layer}.{inner}": each for inner, each in packed.items()}
    return found


def _main_dtype(part: Part) -> torch.dtype:
    """The dtype of most of a part's values, since a network computes in one; bfloat16 if most are packed or
    8-bit floats.

    Converters write what they leave unpacked in any dtype that their readers know, so that one says nothing.
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
        counts = Counter(layer.packing for _, layer in all_layers(part) if isinstance(layer, PackedLinear))
        if counts:
            kinds = ", ".join(f"{count} in {packing}" for packing, count in sorted(counts.items()))
            yield f"weights of the {name} stay packed as in the file ({kinds})"


def _check_preview(parts: list[Part]) -> None:
    """ValueError for one half of TAESD alone."""
    halves = {part.layout.inside: part for part in parts}
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if half in halves and other not in halves:
            path = halves[half].file.path
            raise ValueError(
                f"{path} is {halves[half].layout.name} alone: load the file of the {other}, taesd_{other}, "
                "beside it"
            )
    if len({part.params for part in parts}) > 1:
        raise ValueError(
            f"{parts[0].file.path} and {parts[1].file.path} are halves of different autoencoders"
        )


def _report(
    found: Findings, taken: Sequence[Part], model: Model, places: Sequence[Path], ema: bool
) -> Report:
    """What became of every key. If there are several files, each key comes after its file's path from the
    folder that they share."""
    folder = os.path.commonpath([file.path.absolute().parent for file in found.files])
    before = {
        file.path: f"{os.path.relpath(file.path.absolute(), folder)}: " if len(found.files) > 1 else ""
        for file in found.files
    }

    def keys(part: Part) -> Iterator[str]:
        return (before[part.file.path] + key for stored in part.stored.values() for key in stored.keys)

    consumed = [key for part in taken for key in keys(part)]
    ignored = {name: why for path in places for name, why in unused(path, ema).items()}
    ignored |= {before[file.path] + key: why for file in found.files for key, why in file.ignored.items()}
    ignored |= {key: why for part, why in found.left_out for key in keys(part)}
    notes = [*found.notes, *_packed(model)]
    if AVERAGED in ignored.values():
        notes.append("averaged weights (EMA) are taken; ema=False takes the raw ones")
    layouts = {part.layout.name for part in taken}
    in_folder = layouts <= {"diffusers", "transformers"} or any(path.is_dir() for path in places)
    layout = "diffusers" if in_folder else "ldm" if len(found.files) == 1 else "separate"
    missing = tuple(name for name in ("backbone", "vae", "text") if name not in model.parts)
    sources = {
        kind: " or ".join(dict.fromkeys(str(part.file.path) for part in taken if part.kind == kind))
        for kind in model.parts
    }
    return Report(tuple(consumed), ignored, missing, tuple(notes), layout, sources)
