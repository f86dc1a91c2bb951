"""plain-diffusion train | samplers | eval | models, also in a folder with modules of these names."""

from __future__ import annotations

import argparse
import runpy
import sys

from plain_diffusion import __version__
from plain_diffusion.packages import prefer_own
from plain_diffusion.starting import PROGRAMS, end_on_interrupt

DESCRIPTION = """\
Train, sample and score diffusion models.

  plain-diffusion train experiment=digits_unet run=runs/digits
      train a model, distil one or fine-tune a published one
  plain-diffusion samplers run=runs/digits
      generate images with it
  plain-diffusion samplers weights=sdxl.safetensors prompt="a corgi"
      generate images with published weights
  plain-diffusion eval samples=FOLDER reference=FOLDER metric=[fid,kid]
      score images, compare runs, measure speed
  plain-diffusion models download sd15
      download published weights, check files, list families

Each program has its own help: plain-diffusion train --help
Tab completion, in bash: eval "$(plain-diffusion -sc install=bash)\""""


def main() -> None:
    """Run the program named by the first argument with the other arguments, as `python -m` would."""
    parser = argparse.ArgumentParser(
        "plain-diffusion", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"plain-diffusion {__version__}")
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("arguments", nargs="*", metavar="argument", help="arguments of that program")
    end_on_interrupt()
    if sys.argv[1:2] == ["-sc"]:
        prefer_own()
        from configs.completion import complete

        complete(main)
        return
    program = parser.parse_args(sys.argv[1:2]).program
    prefer_own()
    del sys.argv[1]
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
