"""The three ways to say what to draw: a run, weights with a prompt, or an image that records its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from os.path import exists, expanduser
from pathlib import Path
from typing import Any

from diffusion.messages import brief, one_line
from diffusion.outside import trust
from diffusion.settings import of_kind, recorded
from diffusion.spec import check_at_least_one, check_names, check_type, make_params
from samplers import run, text_to_image
from samplers.pictures import open_picture, pixel_difference, read_settings
from samplers.results import Outcome, drop_nulls
from samplers.run import SampleParams
from samplers.text_to_image import TextToImageParams


@dataclass(frozen=True)
class Mode:
    """One way to draw: its name in messages, its parameters, and its function."""

    words: str
    params: type[Any]
    draw: Callable[..., Outcome]

    @property
    def names(self) -> list[str]:
        return [field.name for field in fields(self.params)]


MODES = {
    "run": Mode("run=FOLDER, a model trained here", SampleParams, run.draw),
    "weights": Mode("weights=FILE prompt=TEXT, a published model", TextToImageParams, text_to_image.draw),
}
# Limits for the settings in a picture, which anybody may have written; not for those of the command line.
MAX_REDRAW_BATCH = 1000  # images
MAX_REDRAW_PIXELS = 2**23  # of an image; its batch may have four times as many
MAX_STEPS = 1000
MAX_TEXT = 10_000  # characters of a prompt


@dataclass(frozen=True)
class Batch:
    """The batch of an image: its first seed, its number of images, and the classes that they take in turn."""

    seed: int
    n: int
    labels: int | str | tuple[int | str, ...] | None = None

    def __post_init__(self) -> None:
        check_at_least_one(self, "n")


def draw_config(config: Mapping[str, Any]) -> tuple[Outcome, str]:
    """Draws from a configuration; the results, and how a redrawn image compares with the old one, or ""."""
    trust(config)
    values = text_to_image.split_strengths(drop_nulls(config))
    if "from" in values:
        return _redraw(Path(values.pop("from")), values)
    chosen = [key for key in MODES if key in values]
    if len(chosen) != 1:
        ways = "; ".join(mode.words for mode in MODES.values())
        raise ValueError(f"say what to sample, by one of: {ways}; from=IMAGE, a picture drawn here")
    _check_mode(chosen[0], values)
    mode = MODES[chosen[0]]
    return mode.draw(make_params("", mode.params, values)), ""


def _check_mode(key: str, values: Mapping[str, Any]) -> None:
    """ValueError for a setting that only another mode has."""
    for name in values:
        for other in MODES.values():
            if name in other.names and name not in MODES[key].names:
                pair = f"{name} goes with {other.words}, and this is {key}=..."
                raise ValueError(f"{pair}: leave one of the two out")


def _redraw(path: Path, changes: dict[str, Any]) -> tuple[Outcome, str]:
    """Draws an image again in its batch and compares the two; with changed settings, draws it alone."""
    with _name_in_errors(path):
        says = read_settings(path)
        if all(key in says for key in MODES):
            raise ValueError(f"{path} names both run and weights, but an image is drawn with one of them")
        key = next((key for key in MODES if key in says), None)
        if key is None or "batch" not in says:
            raise ValueError(f"{path} does not record the settings of one image: give a picture in images/")
        mode, provenance = MODES[key], says.pop("provenance", {})
        check_type("provenance", provenance, dict[str, str])
        check_type("class", says.pop("class", ""), str)  # the name of the class, for people
        check_names("setting of an image", says, (*recorded(mode.params), "batch"))
        if "height" in mode.names:  # the model's default size may be larger
            says = dict(zip(("width", "height"), open_picture(path).size, strict=True)) | drop_nulls(says)
        batch = make_params("batch", Batch, says.pop("batch"))
        own = make_params("", mode.params, drop_nulls(says))
        if own.seed not in range(batch.seed, batch.seed + batch.n):
            raise ValueError(f"the seed {own.seed} is not in its batch, {batch.n} from {batch.seed} on")
        _check_label(own, batch)
        _check_work(path, own, changes)
        _check_mode(key, changes)
        changed = {name for name, value in changes.items() if value != says.get(name)}
        same = changed <= {*of_kind(mode.params, "place", "rounding", "weights")}
        values = says | ({**asdict(batch), "batch_size": batch.n} if same else {"n": 1})
        values |= {"sha256": _required_sha256(own.sha256, changes), **changes}
        params = make_params("", mode.params, drop_nulls(values))
        _check_files(path, params)
        _check_size(path, params, changes, batch.n if same else 1)
        _check_place(path, params, changes)
        if not same:
            return mode.draw(params), ""
        outcome = mode.draw(params, own.seed)
        return outcome, _compare(path, outcome.images[0], provenance)


@contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Errors about the settings in a picture name the picture, on one line."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        kinds = FileNotFoundError, OSError, FloatingPointError, ValueError
        kind = next(kind for kind in kinds if isinstance(error, kind))
        text = str(error) if str(path) in str(error) else f"{path} cannot be drawn again: {error}"
        raise kind(one_line(text)) from error


def _required_sha256(sha256: Mapping[str, str], changes: Mapping[str, Any]) -> dict[str, str]:
    """The recorded hashes to require: not those of changed pictures, nor of other weights in the files."""
    other = {name for name in ("image", "mask") if name in changes}
    if changes.keys() & {"ema", "variant"}:
        other |= {"run", "weights", "refiner"}
    return {name: value for name, value in sha256.items() if name not in other}


def _check_label(own: Any, batch: Batch) -> None:
    """ValueError if a picture of a run records another class than its place in the batch has."""
    labels = batch.labels if isinstance(batch.labels, tuple) else (batch.labels,)
    label = labels[(own.seed - batch.seed) % len(labels)] if labels else None
    if (recorded := getattr(own, "labels", None)) != label:
        raise ValueError(f"it says labels={brief(recorded)}, and its batch has {brief(label)} in that place")


def _check_work(path: Path, own: Any, changes: Mapping[str, Any]) -> None:
    """ValueError if the picture, not the user, asks for more work than the limits above."""
    spacing = own.grid.get("spacing")
    work = {"steps": (own.steps or 0, MAX_STEPS, "steps")}
    work |= {"grid": (len(spacing) if isinstance(spacing, list | tuple) else 0, MAX_STEPS, "times")}
    for name in ("prompt", "negative"):
        work |= {name: (len(getattr(own, name, None) or ""), MAX_TEXT, "characters")}
    for name, (amount, most, units) in work.items():
        if amount > most and name not in changes:
            limit = f"more than the {most:,} that a picture may ask for"
            raise ValueError(f"{path} has {name} of {amount:,} {units}, {limit}: give {name}=... yourself")


def _check_files(path: Path, params: Any) -> None:
    """FileNotFoundError if a file of the image is missing, ValueError for a pipe or device."""
    for name in of_kind(type(params), "weights", "picture"):
        files = getattr(params, name)
        for file in (files,) if isinstance(files, str) else files or ():
            if not file:
                raise ValueError(f"{path} does not name the file of {name}: give {name}=...")
            place, what = Path(expanduser(file)), f"{file:.200}, for {path},"
            if not exists(place):
                raise FileNotFoundError(f"{what} does not exist: say where it is by {name}=...")
            if not place.is_file() and not place.is_dir():
                raise ValueError(f"{what} is neither a file nor a folder: give another {name}=...")


def _check_size(path: Path, params: Any, changes: Mapping[str, Any], n: int) -> None:
    """ValueError if a picture records another size than it has, or too large a batch."""
    width, height = open_picture(path).size
    for name, side in (("height", height), ("width", width)):
        recorded = getattr(params, name, None)
        if name not in changes and recorded not in (None, side):
            raise ValueError(f"{path} says {name}={recorded}, but has {side}: another program changed it")
    size = f"{width}x{height}"
    own_size = hasattr(params, "height") and not {"height", "width"} <= changes.keys()
    if own_size and height * width > MAX_REDRAW_PIXELS:
        limit = f"more than the {MAX_REDRAW_PIXELS:,} that a picture may ask for"
        raise ValueError(f"{path} has {size} pixels, {limit}: give height=... and width=... yourself")
    if n > MAX_REDRAW_BATCH or n * height * width > max(4 * MAX_REDRAW_PIXELS, height * width):
        limit = f"more than {MAX_REDRAW_BATCH} or {4 * MAX_REDRAW_PIXELS:,} pixels"
        raise ValueError(
            f"{path} was drawn in a batch of {n} images of {size}, {limit}: n=1 draws it alone, which may "
            "differ by rounding"
        )


def _check_place(path: Path, params: Any, changes: Mapping[str, Any]) -> None:
    """ValueError unless the user, or the default, chooses the folder of the results: a picture must not."""
    place = path.resolve()
    if params.out and place.is_relative_to(Path(params.out, "images").resolve()):
        raise ValueError(f"{path} itself would be overwritten: give another out=...")
    default = isinstance(params, SampleParams) and not changes.keys() & {"out", "run"}
    if default and not place.is_relative_to(params.home.resolve()):
        raise ValueError(f"{path} is not in {params.home}, the samples of its run: give out=...")


def _compare(path: Path, image: Path, old: Mapping[str, str]) -> str:
    """Whether a redrawn image is the same, and if not, the possible reasons."""
    difference = pixel_difference(path, image)
    if difference == 0:
        return f"the same as {path}, to the last bit"
    new = read_settings(image)["provenance"]
    names = [name for name in new if old.get(name, new[name]) != new[name]]
    changes = [f"{name} {old[name]}, now {new[name]}" for name in names if name not in ("command", "model")]
    reason = "; ".join(changes) or "nothing that is recorded has changed"
    return one_line(f"not the same as {path}: it differs by up to {difference} of 255 ({reason})")
