"""Solvers, one per file, and `sample`, which runs any of them by name."""

from samplers.consistency import consistency
from samplers.ddim import ddim
from samplers.ddpm import ddpm
from samplers.euler import euler
from samplers.sample import SAMPLERS, sample
from samplers.solver import Solver, Step

__all__ = ["SAMPLERS", "Solver", "Step", "consistency", "ddim", "ddpm", "euler", "sample"]
