"""What a network keeps of its way forward, to compute gradients with on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointing(nn.Module):
    """Base of networks made of blocks, which call each by `run`.

    checkpointing  False; set it to True to train in less memory: every block's activations are computed again on the way back
                   (Chen et al. 2016), with the same gradients, for about a third more time
    """

    checkpointing = False

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
