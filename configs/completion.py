"""Tab completion of `plain-diffusion`, by Hydra: eval "$(plain-diffusion -sc install=bash)"."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import hydra

from configs import chosen_experiment, select
from plain_diffusion.starting import PROGRAMS


def complete(main: Callable[..., None]) -> None:
    """Answer `plain-diffusion -sc install=SHELL`, and query=SHELL: what the line in COMP_LINE can go on with.

    Hydra gets the last word, and of those before only the experiment, which decides what can be set: others,
    such as prompts, need not fit its grammar. `main` tells it where to look for YAML files: there are none.
    """
    sys.argv[0], program = "plain-diffusion", None  # which the shell's script is for
    if sys.argv[2:] in (["query=bash"], ["query=fish"]):
        command, program, *words = os.environ["COMP_LINE"].split(" ")
        if not words or program not in PROGRAMS or program == "models":
            print(*(name for name in PROGRAMS if name.startswith(program) and not words))
            return
        chosen = [chosen_experiment(program, word) for word in words[:-1] if word.startswith("experiment=")]
        os.environ["COMP_LINE"] = " ".join([command, *chosen, words[-1]])
        select(program)
    hydra.main(None, program, version_base="1.3")(main)()
