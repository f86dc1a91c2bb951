"""The mathematics of diffusion: schedules, predictions, denoisers, guidance, grids, noise and oracles.

Time is oriented so that x0 is data and noise grows with t: x_t = alpha * x0 + sigma * eps. Needs torch and
numpy only.
"""

import plain_diffusion  # noqa: F401
from diffusion.condition import NONE, Condition
from diffusion.consistency import PARAMETRISATIONS, ConsistencyFunction, build_blend, cm, lcm
from diffusion.denoiser import Clipped, Denoiser, DenoiserLike, OnSchedule, Thresholded
from diffusion.grid import Grid, time_grid
from diffusion.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ComposedGuidance,
    Scale,
    ZeroInit,
    interval,
)
from diffusion.guidance_rules import APG, RULES, Rule, build_rule, extrapolate, rescaled, zero_star
from diffusion.inpainting import Inpainting
from diffusion.level import BatchLevel, Level, NoiseLevel
from diffusion.noise import BrownianPath, Noise, NoisePath, SeededNoise, initial_noise
from diffusion.prediction import (
    EDM,
    EPS,
    FLOW,
    PREDICTIONS,
    X0,
    Estimate,
    Prediction,
    V,
    build_prediction,
    edm,
)
from diffusion.process import Gaussian, decay, learned_std, marginal, posterior, tau, transition
from diffusion.schedule import (
    SCHEDULES,
    CosineVP,
    DiscreteVP,
    RectifiedFlow,
    Schedule,
    Shifted,
    VarianceExploding,
    build_schedule,
)
from diffusion.spacing import SPACINGS, flux_mu

__all__ = [
    "APG",
    "EDM",
    "EPS",
    "FLOW",
    "NONE",
    "PARAMETRISATIONS",
    "PREDICTIONS",
    "RULES",
    "SCHEDULES",
    "SPACINGS",
    "X0",
    "AutoGuidance",
    "BatchLevel",
    "BrownianPath",
    "ClassifierFreeGuidance",
    "Clipped",
    "ComposedGuidance",
    "Condition",
    "ConsistencyFunction",
    "CosineVP",
    "Denoiser",
    "DenoiserLike",
    "DiscreteVP",
    "Estimate",
    "Gaussian",
    "Grid",
    "Inpainting",
    "Level",
    "Noise",
    "NoiseLevel",
    "NoisePath",
    "OnSchedule",
    "Prediction",
    "RectifiedFlow",
    "Rule",
    "Scale",
    "Schedule",
    "SeededNoise",
    "Shifted",
    "Thresholded",
    "V",
    "VarianceExploding",
    "ZeroInit",
    "build_blend",
    "build_prediction",
    "build_rule",
    "build_schedule",
    "cm",
    "decay",
    "edm",
    "extrapolate",
    "flux_mu",
    "initial_noise",
    "interval",
    "lcm",
    "learned_std",
    "marginal",
    "posterior",
    "rescaled",
    "tau",
    "time_grid",
    "transition",
    "zero_star",
]
