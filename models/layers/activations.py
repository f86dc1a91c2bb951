"""What a network keeps of its way forward, to compute gradients with on the way back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.layers.half import enough_precision


class Checkpointing(nn.Module):
    """Base of networks made of blocks, which call each by `run`.

    checkpointing  False; set it to True to train in less memory: every block's activations are computed again on the way back
                   (Chen et al. 2016), with the same gradients, for about a third more time
    """

    checkpointing = False

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(_run_in, enough_precision(self), block, *inputs, use_reentrant=False)
        return block(*inputs)


def _run_in(precision: AbstractContextManager[object], block: nn.Module, *inputs: Any) -> Any:
    with precision:  # on the way back nothing else enters it
        return block(*inputs)
