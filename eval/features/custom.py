"""Your own network or function as an extractor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from eval.features.extractor import Extractor, Identity
from eval.features.weights import sha256_of_tensors


class Custom(Extractor):
    """{"features": width} of your own network.

    fn        batch -> (N, width) floating point; a module is put into evaluation mode
    name      of the network, in results
    prepared  what `prepare` does, in results
    prepare   uint8 pictures (3, H, W) of any sizes, on the module's device -> input of `fn`, (N, ...)
    weights   a version or a hash; None: the hash of the module's tensors
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        *,
        name: str,
        prepared: str,
        width: int,
        prepare: Callable[[Sequence[Tensor]], Tensor],
        weights: str | None = None,
    ) -> None:
        super().__init__()
        tensors = dict(fn.eval().state_dict()) if isinstance(fn, nn.Module) else {}
        device = next((tensor.device for tensor in tensors.values()), None)
        self.fn, self._prepare, self.widths = fn, prepare, {"features": width}
        self.place: Tensor
        # A function has no tensor that shows its device.
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)
        if weights is None and not tensors:
            raise ValueError(
                f"{name} has no tensors to identify its weights by: give weights='...', a version or a hash"
            )
        self.identity = Identity(name, weights or sha256_of_tensors(self.state_dict()), prepared)

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """By the function that was given."""
        return self._prepare(pictures)

    @torch.inference_mode()
    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """ValueError unless the network returns floating point of shape (N, width)."""
        rows = self.fn(x)
        expected = (len(x), self.widths["features"])
        if not isinstance(rows, Tensor) or not rows.is_floating_point() or tuple(rows.shape) != expected:
            found = f"a {type(rows).__name__}"
            if isinstance(rows, Tensor):
                found = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise ValueError(
                f"{self.identity.network} must give floating point of shape {expected}, (pictures, width), "
                f"not {found}"
            )
        return {name: rows.float() for name in outputs}

    @property
    def device(self) -> torch.device:
        """Where `to` moved this."""
        return self.place.device
