"""`load`: any mix of files and folders to one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from diffusion.spec import check_names
from models.checkpoints import native
from models.checkpoints.describe import Findings, describe
from models.checkpoints.folder import components, open_component, scheduler_hints
from models.checkpoints.parts import LATENT_STATISTICS, Found, Part, find_parts
from models.checkpoints.table import gather
from models.checkpoints.tensors import TensorFile, open_tensors
from models.download import PUBLISHED
from models.model import Model, Report, build

DTypes = torch.dtype | Mapping[str, torch.dtype] | None
NAMES = ("backbone", "vae", "text", "preview")


def load(
    *paths: str | Path,
    ema: bool = True,
    dtype: DTypes = None,
    family: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> Model:
    """A model from files: one that holds all of it, a diffusers folder, a training run's folder, single parts, or any mix of them.

    What each holds is found out from its keys and shapes. Later paths replace the parts that earlier ones hold. Networks come in evaluation
    mode, on the CPU, their weights memory-mapped from the files where no conversion is needed. Nothing is downloaded.

    ema         take averaged weights where a file has them; False takes the raw ones
    dtype       of the weights: None as in the files, one for all, or by part: {"backbone": torch.bfloat16, "vae": torch.float32}
    family      a name in models.FAMILIES, where keys and shapes do not tell: "sdxl-turbo", "lcm-sdxl", ...
    prediction  "eps", "v", ...: what the network predicts, where the guess is wrong (SD 2; the report says what was guessed)
    variant     which weights of a diffusers folder: "fp16", "non_ema", ...; None takes the plain ones, or those that there are

    Raises FileNotFoundError, or ValueError in one line that names file and key, for what is damaged, foreign, incomplete or unknown.
    """
    if not paths:
        raise ValueError("load what? Give at least one file or folder")
    if isinstance(dtype, Mapping):
        check_names("part", dtype, NAMES)
    places = [Path(path) for path in paths]
    for path in places:
        if not path.exists():
            fetch = f"; models.load(*models.download({str(path)!r})) fetches the published model" if str(path) in PUBLISHED else ""
            raise FileNotFoundError(f"no such file or folder: {path}{fetch}")
    if any(native.is_native(path) for path in places):
        if len(places) > 1 or family or prediction or variant:
            raise ValueError(
                f"{next(filter(native.is_native, places))} describes a whole model itself: load it alone, with ema and dtype only"
            )
        return native.load(places[0], ema=ema, dtype=dtype)
    loading = _Loading(list(_opened(places, variant, ema)), {}, Findings(None, None, None, [], []))
    for path in places:
        loading.found.scheduler = scheduler_hints(path) or loading.found.scheduler
    for opened in loading.files:
        loading.add(opened)
    spec, towers = describe(loading.found, family, prediction)
    model = build(spec, device="meta")
    wanted = {"backbone": loading.found.backbone, "vae": loading.found.vae, "preview": loading.found.preview}
    modules = [(name, model.require(name), part) for name, part in wanted.items() if part]
    modules += [("text", model.require("text").towers[name], part) for name, part in towers.items()]
    for name, module, part in modules:
        fill(module, part, dtype.get(name) if isinstance(dtype, Mapping) else dtype)
    loading.leave_out([part for part in loading.found.towers if part not in towers.values()], "a text encoder of no use without the other")
    model.report = loading.report([part for _, _, part in modules], model, any(path.is_dir() for path in places))
    return model


def fill(module: nn.Module, part: Part, dtype: torch.dtype | None = None) -> None:
    """Give a network on the meta device its weights from a file. ValueError unless keys and shapes are exactly those of the layout."""
    state = module.state_dict()
    table = part.layout.table(state)
    known = {key for source in table.values() for key in source.keys}
    if unknown := [part.keys[key] for key in part.stored if key not in known]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"{part.file.path} holds {unknown[0]}{more}, for which its {part.kind} has no place")
    shapes = {name: value.shape for name, value in state.items()}
    module.load_state_dict(gather(table, shapes, part, dtype or _main_dtype(part)), assign=True)
    module.eval()


def _main_dtype(part: Part) -> torch.dtype:
    """That of most of a part's values, since a network computes in one; 8-bit floats are for storage only."""
    counts: Counter[torch.dtype] = Counter()
    for stored in part.stored.values():
        counts[stored.dtype] += torch.Size(stored.shape).numel()
    main = counts.most_common(1)[0][0]
    return torch.bfloat16 if main in (torch.float8_e4m3fn, torch.float8_e5m2) else main


def _opened(places: list[Path], variant: str | None, ema: bool) -> Iterator[Found]:
    for path in places:
        if path.is_dir():
            for folder in components(path):
                file, hints = open_component(folder, variant, ema)
                yield find_parts(file, hints, ema)
        else:
            yield find_parts(open_tensors(path), {}, ema)


class _Loading:
    """The parts that are taken of all that the files hold, and the account of every key."""

    def __init__(self, files: list[Found], ignored: dict[str, str], found: Findings) -> None:
        self.files, self.ignored, self.found = files, ignored, found

    def add(self, opened: Found) -> None:
        """Take a file's parts, in place of those of the same kind in files before it."""
        self.found.files.append(opened.file)
        self.ignored |= {self.name(opened.file, key): why for key, why in opened.ignored.items()}
        for part in opened.parts:
            replaced: list[Part] = []
            if part.kind == "text":
                replaced = [other for other in self.found.towers if other.params == part.params and other.file is not part.file]
                self.found.towers = [other for other in self.found.towers if other not in replaced] + [part]
            else:
                replaced = [other] if (other := getattr(self.found, part.kind)) else []
                setattr(self.found, part.kind, part)
            self.leave_out(replaced, f"replaced by what {part.file.path.name} holds")

    def leave_out(self, parts: list[Part], why: str) -> None:
        for part in parts:
            self.ignored |= {self.name(part.file, key): why for key in part.keys.values()}

    def name(self, file: TensorFile, key: str) -> str:
        """How the report calls a key: with its file's name where there are several."""
        several = len(self.files) > 1
        return f"{file.path.parent.name}/{file.path.name}: {key}" if several else key

    def report(self, taken: list[Part], model: Model, folder: bool) -> Report:
        consumed = [self.name(part.file, key) for part in taken for key in part.keys.values()]
        consumed += [self.name(file, key) for file in self.found.files for key in LATENT_STATISTICS if key in file.tensors]
        missing = tuple(name for name in ("backbone", "vae", "text") if name not in model.parts)
        layouts = {part.layout.name for part in taken}
        layout = "diffusers" if folder or layouts <= {"diffusers", "transformers"} else "ldm"
        return Report(tuple(consumed), self.ignored, missing, tuple(self.found.notes), layout)
