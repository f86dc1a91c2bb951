"""The three ways to say what to sample: a run, weights with a prompt, or an image that says what it was drawn with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from diffusion.spec import make_params
from samplers import run, text_to_image
from samplers.pictures import pixel_difference, read_settings
from samplers.results import Outcome, given
from samplers.run import SampleParams
from samplers.text_to_image import TextToImageParams


@dataclass(frozen=True)
class Mode:
    """One way, by the setting that names the model: what it is in words, its parameters, and what draws with them."""

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
# What may be said of an image that is to be the same again.
SAME = ("out", "device", "memory", "offload", "progress", "run", "weights", "refiner")
FILES = ("run", "weights", "refiner", "image", "mask")


def sampled(config: Mapping[str, Any]) -> tuple[Outcome, str]:
    """Sample as a configuration says (see configs/samplers); the results, and what is to be said of them ("": nothing)."""
    values = given(config)
    if "from" in values:
        return _again(Path(values.pop("from")), values)
    chosen = [key for key in MODES if key in values]
    if len(chosen) != 1:
        ways = [mode.words for mode in MODES.values()]
        raise ValueError(f"say what to sample, by one of: {'; '.join(ways)}; from=IMAGE, which says what it was drawn with")
    _check_mode(chosen[0], values)
    mode = MODES[chosen[0]]
    return mode.draw(make_params("", mode.params, values)), ""


def _check_mode(key: str, values: Mapping[str, Any]) -> None:
    """ValueError for settings that only the other mode knows."""
    for name in values:
        if other := next((other for other in MODES.values() if name in other.names and name not in MODES[key].names), None):
            raise ValueError(f"{name} goes with {other.words}, and this is {MODES[key].words.split('=')[0]}=...: leave one of the two out")


def _again(path: Path, changes: dict[str, Any]) -> tuple[Outcome, str]:
    """The image once more, in the batch it was drawn in, and how the two compare; or what its settings make where some are changed."""
    recorded = read_settings(path)
    key = next((key for key in MODES if key in recorded), None)
    if key is None or "batch" not in recorded:
        raise ValueError(f"{path} is no single image that says what it was drawn with: give one of those in images/")
    _check_mode(key, changes)
    mode, batch, same = MODES[key], recorded["batch"], changes.keys() <= set(SAME)
    values = {name: value for name, value in recorded.items() if name in mode.names}
    values |= {**batch, "batch_size": batch["n"]} if same else {"n": 1}
    params = make_params("", mode.params, given({**values, "sha256": _pinned(values.get("sha256", {}), changes), **changes}))
    _check_files(path, params)
    if not same:
        return mode.draw(params), ""
    if params.out and path.resolve().is_relative_to(Path(params.out, "images").resolve()):
        raise ValueError(f"{path} itself would be written again: out=... names another place")
    outcome = mode.draw(params, recorded["seed"])
    return outcome, _compared(path, outcome.images[0], recorded)


def _pinned(sha256: Mapping[str, str], changes: Mapping[str, Any]) -> dict[str, str]:
    """What the files have to hold: all but pictures that are others now, and weights where others are taken from the same file."""
    other = {name for name in ("image", "mask") if name in changes}
    if changes.keys() & {"ema", "variant"}:
        other |= {"run", "weights", "refiner"}
    return {name: value for name, value in sha256.items() if name not in other}


def _check_files(path: Path, params: Any) -> None:
    """FileNotFoundError for a file that an image was drawn with and that is not there any more."""
    for name in FILES:
        files = getattr(params, name, None) or ()
        for file in (files,) if isinstance(files, str) else files:
            if not Path(file).expanduser().exists():
                raise FileNotFoundError(f"{file}, for {path}, is not there: {name}=... says where it lies")


def _compared(path: Path, image: Path, recorded: Mapping[str, Any]) -> str:
    """Whether an image is the same again, and if not, why it may not be."""
    difference = pixel_difference(path, image)
    if difference == 0:
        return f"the same as {path}, to the last bit"
    there, here = recorded.get("provenance", {}), read_settings(image)["provenance"]
    changed = [
        f"{name} {there[name]}, now {here[name]}"
        for name in here
        if name not in ("command", "model") and there.get(name, here[name]) != here[name]
    ]
    return (
        f"not the same as {path}: it differs by up to {difference} of 255 ({'; '.join(changed) or 'nothing that is recorded has changed'})"
    )
