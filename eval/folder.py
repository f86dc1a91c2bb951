"""Scoring a folder of images, whoever made them: what `python -m eval samples=FOLDER` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion.spec import check_names, check_type, make
from eval.digits.judge import DigitJudge, Figures
from models.files import write_json
from samplers.provenance import provenance
from train.data import ImageFolder, digits

KEYS = ("program", "samples", "out", "metric", "training", "reference")


def run(config: Mapping[str, Any]) -> dict[str, float]:
    """The figures asked for, of an image folder with a subfolder per class, printed by the caller and written as JSON."""
    check_names("setting", config, KEYS)
    check_type("samples", config["samples"], str)
    check_type("out", config["out"], str | None)
    check_type("metric", config["metric"], str | list[str])
    wanted = config["metric"] if isinstance(config["metric"], list) else [config["metric"]]
    check_names("metric", wanted, [name for name in Figures._fields if name != "kernel_error"])
    folder = Path(config["samples"])
    data = ImageFolder(folder, channels=1)
    if data.labels is None or any(name not in map(str, range(10)) for name in data.classes):
        raise ValueError(f"{folder} must hold a folder per digit, 0 to 9, as python -m samplers writes them")
    if data.shape != (1, 8, 8):
        raise ValueError(f"{folder} holds images of {data.shape[2]}x{data.shape[1]}; the digit judge knows 8x8")
    splits = {"digits": digits}
    judge = DigitJudge(make("data set", config["training"], splits), make("data set", config["reference"], splits))
    labels = torch.tensor([int(name) for name in data.classes])[data.labels]
    figures = judge.judge(data.__getitems__(range(len(data)))["x0"], labels, wanted)._asdict()
    result = {name: figures[name] for name in (*wanted, *(["kernel_error"] if "kernel" in wanted else []))}
    out = Path(config["out"] or folder.with_name(f"{folder.name}.scores.json"))
    write_json(out, {"n": len(data), "figures": result, "settings": dict(config), "provenance": provenance()})
    return {"n": float(len(data)), **result}
