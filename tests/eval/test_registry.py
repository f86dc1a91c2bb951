"""Extractors by name: what is refused before a network is built, and what the protocols say of papers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eval.features import registry
from eval.features.registry import DTYPES, EXTRACTORS, ExtractorParams, build, check_dtype


@pytest.mark.parametrize("name", ["clip", "cmmd", "dinov2", "digits"])
def test_a_dtype_that_would_be_ignored_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before anything is built; fp32 is taken."""
    monkeypatch.setitem(
        registry.EXTRACTORS, name, replace(EXTRACTORS[name], make=lambda *_: pytest.fail("it was built"))
    )
    with pytest.raises(ValueError, match=f"^{name} computes in fp32 only, not bfloat16: leave dtype out$"):
        build(name, ExtractorParams(), "clean", DTYPES["bf16"])
    check_dtype(name, torch.float32)


def test_inception_computes_in_all_dtypes() -> None:
    """In those there are names for, and in no other; an extractor that is not known is named."""
    for dtype in DTYPES.values():
        check_dtype("inception", dtype)
    with pytest.raises(
        ValueError, match="inception computes in fp32 and bf16 only, not float16: leave dtype out"
    ):
        check_dtype("inception", torch.float16)
    with pytest.raises(ValueError, match="no extractor named 'incepton'"):
        check_dtype("incepton", torch.float32)
