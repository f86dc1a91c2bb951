"""What tests beside diffusers' pipelines share."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch


@pytest.fixture
def quietly() -> Iterator[None]:
    """No gradients, and nothing of diffusers but errors."""
    diffusers.logging.set_verbosity_error()
    with torch.no_grad():
        yield
