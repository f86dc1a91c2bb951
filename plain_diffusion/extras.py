"""Optional packages that one feature needs: `pip install 'plain-diffusion[gguf]'`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The extras in pyproject.toml, and what each is for.
EXTRAS = {
    "bench": "benchmarks beside other libraries",
    "digits": "handwritten digits",
    "gguf": "GGUF files",
    "plots": "plots and reports",
    "tensorboard": "logs for TensorBoard",
}


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import a package of an extra: `with extra("gguf"): import gguf`. ValueError names the missing extra."""
    try:
        yield
    except ImportError as error:
        need = f"{EXTRAS[name]} need a package that cannot be imported ({error})"
        raise ValueError(f"{need}: pip install 'plain-diffusion[{name}]'") from error
