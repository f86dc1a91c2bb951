"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion.settings import setting
from train.data.latents import LatentParams
from train.loop import TrainParams
from train.pictures import PictureParams


@dataclass(frozen=True)
class RunSettings:
    """An experiment says what to train (data, model, objective); the rest has defaults."""

    run: str = setting(..., "the run's folder", text="path")
    data: str | dict[str, Any] = setting(
        ...,
        "name: digits or folder, ... (--help data); or a folder of captioned images, to fine-tune on",
        text="path",
        heading="What to train",
    )
    model: dict[str, Any] = setting(..., "network, schedule, prediction; or from: weights to train further")
    objective: dict[str, Any] = setting(..., "name: denoising or consistency, ... (--help objective)")
    weights: str | list[str] | None = setting(
        None,
        "to train further: a file, a diffusers folder, or a list of network, autoencoder and text encoder",
        kind="weights",
    )
    latents: LatentParams = setting(LatentParams, "of captioned images, encoded once by the model's encoders")
    train: TrainParams = setting(TrainParams, "", heading="How")
    resume: bool = setting(False, "go on from the folder's checkpoint, if any", heading="Where, and logging")
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps; null: a GPU where there is one")
    progress: bool = setting(True, "a bar with loss, speed and time left")
    evaluate: dict[str, Any] | None = setting(
        None,
        "_target_: something called with the averaged model that returns numbers to log, such as {_target_: "
        "eval.training.TrainingScores, n: 539, metric: [frechet], features: digits, reference: {...}}",
    )
    pictures: PictureParams = setting(PictureParams, "samples during training, in pictures/ of the folder")
    wandb: bool = setting(True, "log to Weights & Biases too: offline and silent unless you are logged in")
    wandb_project: str = setting("plain-diffusion", "its project there", text="text")
    tensorboard: bool = setting(False, "log to TensorBoard too, in tensorboard/ of the run's folder")
