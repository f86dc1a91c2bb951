"""The three ways to choose what to sample: a run, weights with a prompt, or an image that records its
settings."""

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
    """One way to sample: its name in messages, its parameters, and the function that draws with them."""

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
# Limits for the settings in a picture, which anybody may have written. Settings given beside from= have no
# such limits.
MAX_AGAIN = 1000  # images in the batch of an image
MAX_DRAWN = 2**23  # pixels of an image; its batch may have four times as many
MAX_STEPS = 1000
MAX_TEXT = 10_000  # characters of a prompt


@dataclass(frozen=True)
class Batch:
    """The batch in which an image was drawn: its first seed, number of images, and the classes that they took
    in turn."""

    seed: int
    n: int
    labels: int | str | tuple[int | str, ...] | None = None

    def __post_init__(self) -> None:
        check_at_least_one(self, "n")


def draw_config(config: Mapping[str, Any]) -> tuple[Outcome, str]:
    """Draw as a configuration says (`plain-diffusion samplers --help`). The results, and how an image drawn
    again compares, or ""."""
    trust(config)
    values = drop_nulls(config)
    if "from" in values:
        return _again(Path(values.pop("from")), values)
    chosen = [key for key in MODES if key in values]
    if len(chosen) != 1:
        ways = [mode.words for mode in MODES.values()]
        raise ValueError(
            f"say what to sample, by one of: {'; '.join(ways)}; from=IMAGE, which says what it was drawn with"
        )
    _check_mode(chosen[0], values)
    mode = MODES[chosen[0]]
    return mode.draw(make_params("", mode.params, values)), ""


def _check_mode(key: str, values: Mapping[str, Any]) -> None:
    """ValueError for settings that only the other mode has."""
    for name in values:
        if other := next(
            (other for other in MODES.values() if name in other.names and name not in MODES[key].names), None
        ):
            raise ValueError(
                f"{name} goes with {other.words}, and this is {MODES[key].words.split('=')[0]}=...: leave "
                "one of the two out"
            )


def _again(path: Path, changes: dict[str, Any]) -> tuple[Outcome, str]:
    """Draw an image again in its batch, and compare the two; or draw a single image with its settings where
    some are changed."""
    with _name_in_errors(path):
        says = read_settings(path)
        if all(key in says for key in MODES):
            raise ValueError(
                f"{path} says both run and weights, and an image is drawn with one of them: it is none of "
                "our pictures"
            )
        key = next((key for key in MODES if key in says), None)
        if key is None or "batch" not in says:
            raise ValueError(
                f"{path} is no single image that says what it was drawn with: give one of those in images/"
            )
        mode, provenance = MODES[key], says.pop("provenance", {})
        check_type("provenance", provenance, dict[str, str])
        check_type("class", says.pop("class", ""), str)  # the name of the class, for people
        check_names("setting of an image", says, (*recorded(mode.params), "batch"))
        if "height" in mode.names:  # the model's default size may be larger
            says = dict(zip(("width", "height"), open_picture(path).size, strict=True)) | drop_nulls(says)
        batch = make_params("batch", Batch, says.pop("batch"))
        own = make_params("", mode.params, drop_nulls(says))
        if own.seed not in range(batch.seed, batch.seed + batch.n):
            raise ValueError(
                f"the seed {own.seed} is none of its batch, which are {batch.n} from {batch.seed} on"
            )
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
        return outcome, _compared(path, outcome.images[0], provenance)


@contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Makes errors about the settings in a picture name the picture, on one line."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        kind = next(
            kind
            for kind in (FileNotFoundError, OSError, FloatingPointError, ValueError)
            if isinstance(error, kind)
        )
        text = str(error) if str(path) in str(error) else f"{path} cannot be drawn again: {error}"
        raise kind(one_line(text)) from error


def _required_sha256(sha256: Mapping[str, str], changes: Mapping[str, Any]) -> dict[str, str]:
    """The recorded hashes that files must still have: not those of changed pictures, nor of weights if others
    are chosen from the file."""
    other = {name for name in ("image", "mask") if name in changes}
    if changes.keys() & {"ema", "variant"}:
        other |= {"run", "weights", "refiner"}
    return {name: value for name, value in sha256.items() if name not in other}


def _check_label(own: Any, batch: Batch) -> None:
    """ValueError if a picture of a run records another class than its place in the batch has."""
    labels = (
        batch.labels if isinstance(batch.labels, tuple) else () if batch.labels is None else (batch.labels,)
    )
    here = labels[(own.seed - batch.seed) % len(labels)] if labels else None
    if (label := getattr(own, "labels", None)) != here:
        raise ValueError(f"it says labels={brief(label)}, and its batch has {brief(here)} in that place")


def _check_work(path: Path, own: Any, changes: Mapping[str, Any]) -> None:
    """ValueError if the picture, and not the user, asks for more work than the limits above."""
    spacing = own.grid.get("spacing")
    asked = {"steps": (own.steps or 0, MAX_STEPS, "steps")}
    asked |= {"grid": (len(spacing) if isinstance(spacing, list | tuple) else 0, MAX_STEPS, "times")}
    asked |= {
        name: (len(getattr(own, name, None) or ""), MAX_TEXT, "characters") for name in ("prompt", "negative")
    }
    for name, (many, most, units) in asked.items():
        if many > most and name not in changes:
            raise ValueError(
                f"{path} says {name} of {many:,} {units}, more than the {most:,} that a picture may ask "
                f"for: give {name}=... yourself"
            )


def _check_files(path: Path, params: Any) -> None:
    """FileNotFoundError for a missing file that the image was drawn with, ValueError for a pipe or device."""
    for name in of_kind(type(params), "weights", "picture"):
        files = getattr(params, name)
        for file in (files,) if isinstance(files, str) else files or ():
            if not file:
                raise ValueError(f"{path} names no file as {name}: {name}=... says where it lies")
            place = Path(expanduser(file))
            if not exists(place):
                raise FileNotFoundError(
                    f"{file:.200}, for {path}, is not there: {name}=... says where it lies"
                )
            if not place.is_file() and not place.is_dir():
                raise ValueError(
                    f"{file:.200}, for {path}, is neither a file nor a folder: {name}=... names another"
                )


def _check_size(path: Path, params: Any, changes: Mapping[str, Any], n: int) -> None:
    """ValueError if a picture records another size than it has, or too large a batch."""
    width, height = open_picture(path).size
    for name, side in (("height", height), ("width", width)):
        if name not in changes and getattr(params, name, None) not in (None, side):
            raise ValueError(
                f"{path} says {name}={getattr(params, name)}, and has {side}: it was written again by "
                "another program"
            )
    if height * width > MAX_DRAWN and hasattr(params, "height") and not {"height", "width"} <= changes.keys():
        raise ValueError(
            f"{path} has {width}x{height} pixels, more than the {MAX_DRAWN:,} that a picture may ask for: "
            "give height=... and "
            "width=... yourself"
        )
    if n > MAX_AGAIN or n * height * width > max(4 * MAX_DRAWN, height * width):
        raise ValueError(
            f"{path} was drawn in a batch of {n} images of {width}x{height}, and more than {MAX_AGAIN} or "
            f"{4 * MAX_DRAWN:,} pixels are not "
            "drawn together again: n=1 draws it alone, which may differ by rounding"
        )


def _check_place(path: Path, params: Any, changes: Mapping[str, Any]) -> None:
    """ValueError unless results go to a folder that the user names, or to the default one: a picture must not
    choose it."""
    if params.out and path.resolve().is_relative_to(Path(params.out, "images").resolve()):
        raise ValueError(f"{path} itself would be written again: out=... names another place")
    if (
        isinstance(params, SampleParams)
        and not changes.keys() & {"out", "run"}
        and not path.resolve().is_relative_to(params.home.resolve())
    ):
        raise ValueError(
            f"{path} does not lie in {params.home}, with the other samples of its run: out=... says where "
            "images go"
        )


def _compared(path: Path, image: Path, there: Mapping[str, str]) -> str:
    """Whether an image drawn again is the same, and if not, the possible reasons."""
    difference = pixel_difference(path, image)
    if difference == 0:
        return f"the same as {path}, to the last bit"
    here = read_settings(image)["provenance"]
    changed = [
        f"{name} {there[name]}, now {here[name]}"
        for name in here
        if name not in ("command", "model") and there.get(name, here[name]) != here[name]
    ]
    return one_line(
        f"not the same as {path}: it differs by up to {difference} of 255 "
        f"({'; '.join(changed) or 'nothing that is recorded has changed'})"
    )
