"""Files of reference statistics: mean and covariance of a data set's features."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion.messages import one_line
from diffusion.spec import check_names, make_params
from eval.features.extractor import Identity
from eval.metrics.moments import Moments
from models.files.text import sha256_of_file
from models.files.writing import replacing
from train.data.npz import MAX_ARRAY, array_names, is_npy, one_line_errors, read_array

MAX_PICTURES = 2**53  # float64 counts no further
FORMAT = "reference statistics 1"
# The arrays of our outputs in files of pytorch-fid and ADM.
FOREIGN = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Statistics:
    """Moments of features, by the extractor's output.

    n         number of pictures; None if unknown: metrics that need it cannot be computed
    identity  of the extractor; None if unknown
    origin    where the pictures come from, for results; the path of a file that does not record it
    sha256    of the file; None without a file
    pictures  SHA-256 of the pictures in their order; None if unknown
    sizes     of the pictures, such as "640x480"; empty if unknown
    """

    moments: Mapping[str, Moments]
    n: int | None
    identity: Identity | None
    origin: str
    sha256: str | None = None
    pictures: str | None = None
    sizes: tuple[str, ...] = ()

    @property
    def known(self) -> str | None:
        """The hash that identifies these statistics: of their pictures, else of the file."""
        return self.pictures or self.sha256


@dataclass(frozen=True)
class _Metadata:
    """The metadata of a file that this library wrote."""

    n: int
    identity: Identity
    origin: str
    pictures: str | None = None
    sizes: tuple[str, ...] = ()


def read_statistics(path: str | Path) -> Statistics:
    """Read a file of this library (.safetensors), of pytorch-fid or of ADM (.npz).

    The last two record neither the extractor nor the number of pictures. FileNotFoundError; ValueError for a
    file that is damaged, or holds anything but means and covariances.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of reference statistics: {path}")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    check_names("kind of file with reference statistics", [path.suffix.lower()], readers)
    return readers[path.suffix.lower()](path)


def is_statistics(path: str | Path) -> bool:
    """Whether a path names a file of statistics: .safetensors, or .npz with mu and sigma."""
    path = Path(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        with one_line_errors(path):
            return not is_npy(path) and set(FOREIGN["pool"]) <= set(array_names(path))
    return path.suffix.lower() == ".safetensors"


def write_statistics(statistics: Statistics, path: str | Path) -> None:
    """Write a .safetensors file with the exact moments. ValueError if the extractor or n is unknown."""
    if statistics.identity is None or statistics.n is None:
        raise ValueError(
            f"statistics of {statistics.origin} do not say their extractor and number of pictures: compute "
            "them from the pictures"
        )
    if statistics.n < 2:
        raise ValueError(f"statistics need at least 2 pictures, and {statistics.origin} has {statistics.n}")
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"reference statistics are written as .safetensors, not as {Path(path).name}")
    tensors: dict[str, Tensor] = {}
    for output, moments in statistics.moments.items():
        if moments.n != statistics.n:
            raise ValueError(
                f"moments of {output} are of {moments.n} pictures, and the statistics of "
                f"{statistics.n}: they must be of one set"
            )
        state = moments.state_dict()
        tensors |= {f"{output}.{name}": state[name].contiguous().cpu() for name in ("mean", "scatter")}
    about = {each.name: getattr(statistics, each.name) for each in fields(_Metadata)}
    about["identity"] = statistics.identity.to_json()
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "statistics": json.dumps(about)})


def check_identity(statistics: Statistics, identity: Identity) -> None:
    """ValueError if the statistics are of another extractor. An unknown one passes: see `check_width`."""
    if statistics.identity is None:
        return
    for each in fields(Identity):
        made, now = (getattr(one, each.name) for one in (statistics.identity, identity))
        if made != now:
            raise ValueError(
                f"the statistics of {statistics.origin} were made with another extractor: {each.name} is "
                f"{made!r}, and here {now!r}; make them again with this one"
            )


def check_width(statistics: Statistics, output: str, width: int) -> None:
    """ValueError if the statistics lack this output or have another width."""
    if output not in statistics.moments:
        raise ValueError(
            f"{statistics.origin} has statistics of {', '.join(statistics.moments)}, not of {output!r}"
        )
    found = len(statistics.moments[output].mean)
    if found != width:
        unknown = "" if statistics.identity else " (extractor unknown)"
        raise ValueError(
            f"the statistics of {statistics.origin}{unknown} are of features of width {found}, and "
            f"{output!r} is {width} wide here: they were made with another extractor"
        )


def _read_npz(path: Path) -> Statistics:
    with one_line_errors(path):
        found = array_names(path)
        present = {output: names for output, names in FOREIGN.items() if set(names) <= set(found)}
        if "pool" not in present:
            what = ", ".join(found)[:200] or "nothing"
            raise ValueError(f"{path} holds {what}, not the reference statistics mu and sigma")
        arrays = {
            output: [_real(path, name, read_array(path, name)) for name in names]
            for output, names in present.items()
        }
    moments = {}
    for output, (mean, covariance) in arrays.items():
        _check_moments(path, *FOREIGN[output], mean, covariance)
        moments[output] = Moments.exactly(mean, covariance)
    return Statistics(moments, None, None, str(path), sha256_of_file(path))


def _real(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} of {path} must hold real numbers, not {array.dtype}")
    return torch.from_numpy(array if array.dtype in (np.float16, np.float32) else array.astype(np.float64))


def _read_safetensors(path: Path) -> Statistics:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is not a file of reference statistics: its format is "
                    f"{metadata.get('format')!r}, not {FORMAT!r}"
                )
            for name in file.keys():  # noqa: SIM118  (no mapping)
                if math.prod(shape := file.get_slice(name).get_shape()) * 8 > MAX_ARRAY:
                    raise ValueError(f"{path}: {name} has shape {tuple(shape)}, wider than any features")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {one_line(error)}") from None
    try:
        content = json.loads(metadata["statistics"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its description cannot be read ({one_line(error)})") from None
    described = make_params(f"the description in {path}", _Metadata, content)
    if not 2 <= described.n <= MAX_PICTURES:
        raise ValueError(
            f"{path} says that its statistics are of n={described.n} pictures: at least 2 are needed"
        )
    moments = {}
    for output in sorted(name.removesuffix(".mean") for name in tensors if name.endswith(".mean")):
        check_names(f"tensor in {path}", [f"{output}.scatter"], tensors)
        mean, scatter = tensors[f"{output}.mean"], tensors[f"{output}.scatter"]
        _check_moments(path, f"{output}.mean", f"{output}.scatter", mean, scatter)
        state = {"n": torch.tensor(described.n), "mean": mean.double(), "scatter": scatter.double()}
        moments[output] = Moments.from_state(state)
    if not moments:
        raise ValueError(f"{path} holds no moments: make the file again")
    known = {each.name: getattr(described, each.name) for each in fields(_Metadata)}
    return Statistics(moments, sha256=sha256_of_file(path), **known)


def _check_moments(path: Path, mean_name: str, name: str, mean: Tensor, matrix: Tensor) -> None:
    """ValueError unless these can be a mean and a multiple of a covariance, up to rounding."""
    if mean.ndim != 1 or len(mean) == 0 or matrix.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(matrix.shape)}"
        raise ValueError(f"{mean_name} and {name} of {path} must have shapes (D,) and (D, D), not {shapes}")
    if not (mean.is_floating_point() and matrix.is_floating_point()):
        raise ValueError(
            f"{mean_name} and {name} of {path} must hold real numbers, not {mean.dtype} and {matrix.dtype}"
        )
    rounding, matrix = max(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps), matrix.double()
    total = float(matrix.trace())  # at least the variance in any direction
    if not (mean.isfinite().all() and matrix.isfinite().all() and math.isfinite(total)):
        raise ValueError(
            f"{mean_name} or {name} of {path} holds values that are not finite: make the file again"
        )
    difference = float((matrix - matrix.T).abs().max())
    if difference > max(1e-6, rounding) * float(matrix.abs().max()):
        raise ValueError(
            f"{name} of {path} is not symmetric: it differs by up to {difference:.2g} across its diagonal"
        )
    if not matrix.any():  # all pictures are alike
        return
    shifted = (matrix + matrix.T) / 2
    shifted.diagonal().add_(16 * rounding * total)
    if total <= 0 or int(torch.linalg.cholesky_ex(shifted).info):
        raise ValueError(f"{name} of {path} is not a covariance: a variance is negative; make the file again")
