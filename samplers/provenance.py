"""What a result's settings do not say: versions, the state of the source, the machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import plain_diffusion


def provenance() -> dict[str, str]:
    """Versions, git commit, command and device, as texts."""
    return {
        "plain-diffusion": plain_diffusion.__version__,
        "git": _git_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "command": " ".join(sys.argv),
    }


def _git_state() -> str:
    """The commit of the library's source, marked if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
