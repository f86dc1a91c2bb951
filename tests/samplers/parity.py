"""What the parity tests share: the schedules, where both sides start, and noise that both are given."""

from __future__ import annotations

import torch

from diffusion import DiscreteVP, RectifiedFlow, initial_noise

F64 = torch.float64
VP, STRAIGHT = DiscreteVP.scaled_linear(), RectifiedFlow()
NOISE = initial_noise([0, 1, 2], (2, 4, 4), F64)
Z = initial_noise([3, 4], NOISE.shape, F64)
