"""Data sets, objectives, the training loop, distillation, and `run`, the program as a function."""

import plain_diffusion

plain_diffusion.check("diffusion", "models", "samplers")

from train.loop import TrainParams, train
from train.run import run

__all__ = ["TrainParams", "run", "train"]
