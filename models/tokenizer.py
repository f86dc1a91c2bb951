"""CLIP's tokens: byte-pair encoding with OpenAI's vocabulary, as open_clip brings it along (Radford et al. 2021, section 2.4).

Text is cleaned as it was when the towers were trained: mojibake and typographic variants are mended (ftfy), HTML entities
read, white space joined, capitals lowered. Pipelines built on transformers leave the first two out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

BOS, EOS = 49406, 49407  # begin and end of text, the last two of the vocabulary


def tokenize(text: str) -> list[int]:
    """Token ids of a text of any length, without BOS, EOS and padding. "<start_of_text>" and "<end_of_text>" in it are those tokens."""
    if not isinstance(text, str):
        raise ValueError(f"a prompt is a text, not {text!r}")
    return _bpe().encode(text)


def detokenize(ids: Sequence[int]) -> str:
    """The text of token ids: lower case, with a space after every word. ValueError for an id outside the vocabulary."""
    try:
        return _bpe().decode(ids).strip()
    except KeyError as error:
        raise ValueError(f"{error} is no token: ids are 0 to {EOS}") from None


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Every token's id, and the merges in their order, as vocab.json and merges.txt of published folders hold them."""
    bpe = _bpe()
    names = {BOS: "<|startoftext|>", EOS: "<|endoftext|>"}
    return {names.get(number, token): number for token, number in bpe.encoder.items()}, list(bpe.bpe_ranks)


@cache
def _bpe() -> Any:
    """open_clip's SimpleTokenizer, from its file alone: the package around it imports torchvision, which this has no need of."""
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ValueError("prompts need the vocabulary that open_clip brings along: pip install open-clip-torch")
    spec = spec_from_file_location("open_clip_tokenizer", Path(package.submodule_search_locations[0]) / "tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"open_clip's tokenizer does not load ({error}): pip install --force-reinstall open-clip-torch") from error
    return module.SimpleTokenizer()
