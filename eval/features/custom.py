"""Any network or function of one's own as an extractor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from eval.features.extractor import Extractor, Identity
from eval.features.weights import sha256_of_tensors


class Custom(Extractor):
    """{"features": width} of one's own network.

    fn        batch -> (N, width) floating point; a module is put into inference, and its tensors name the
              weights
    name      of the network, as results say it
    prepared  what `prepare` does, as results say it
    prepare   uint8 pictures (3, H, W), of any sizes and on the module's device -> what `fn` takes, a row (N,
              ...) for each
    weights   names the weights of a function that is no module, which has no tensors to show: a version, a
              hash
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
        self.register_buffer(
            "place", torch.empty(0, device=device), persistent=False
        )  # a function has no tensor that would say where it is
        if weights is None and not tensors:
            raise ValueError(
                f"{name} has no tensors that would name its weights: say weights='...', a version or a hash"
            )
        self.identity = Identity(name, weights or sha256_of_tensors(self.state_dict()), prepared)

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """As it was given."""
        return self._prepare(pictures)

    @torch.inference_mode()
    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """ValueError where the network gives anything but floating point of shape (N, width)."""
        rows = self.fn(x)
        expected = (len(x), self.widths["features"])
        if not isinstance(rows, Tensor) or not rows.is_floating_point() or tuple(rows.shape) != expected:
            found = (
                f"{rows.dtype} of shape {tuple(rows.shape)}"
                if isinstance(rows, Tensor)
                else f"a {type(rows).__name__}"
            )
            raise ValueError(
                f"{self.identity.network} must give floating point of shape {expected}, (pictures, width), "
                f"not {found}"
            )
        return {name: rows.float() for name in outputs}

    @property
    def device(self) -> torch.device:
        """Where this was moved to."""
        return self.place.device
