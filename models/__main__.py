"""plain-diffusion models download | check | families: published weights, files, supported families."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import plain_diffusion
from models.download import FILES, PATIENCE, download
from models.families import PUBLISHED, table
from plain_diffusion.starting import started


def main() -> int:
    options = _parse_arguments()
    try:
        if options.command == "families":
            print(table())
        elif options.command == "check":
            print(check(options.paths))
        else:
            _download(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        return 130
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plain-diffusion models")
    version = f"plain-diffusion {plain_diffusion.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    lines = [f"  {name:20} {model.repo} ({model.licence})" for name, model in PUBLISHED.items()]
    lines += [f"  {name:20} {file.name} ({file.licence})" for name, file in FILES.items()]
    command = commands.add_parser(
        "download",
        help="download published weights into the hub's cache, and print their paths",
        epilog="\n".join(["published models and their licences:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("name", help="a published model, or owner/name of any repository on the hub")
    command.add_argument("files", nargs="*", metavar="file", help="only these of its files")
    command.add_argument("--revision", help="commit, tag or branch")
    command.add_argument("--folder", help="the cache, by default the hub library's own")
    stalled = "seconds after which a stalled server is given up"
    command.add_argument("--patience", type=float, default=PATIENCE, help=stalled)
    command = commands.add_parser(
        "check", help="read all weights of a model, check them, and print its report"
    )
    paths = "what models.load takes: files, folders, a training run's folder"
    command.add_argument("paths", nargs="+", metavar="path", help=paths)
    commands.add_parser("families", help="print a table of the supported families")
    return parser.parse_args()


def _download(options: argparse.Namespace) -> None:
    paths = download(
        options.name,
        files=options.files,
        revision=options.revision,
        folder=options.folder,
        patience=options.patience,
    )
    print(*paths, sep="\n")
    if options.name in PUBLISHED and (family := PUBLISHED[options.name].family):
        print(f"its keys do not show its family: load it with family={family}", file=sys.stderr)


def check(paths: Sequence[str]) -> str:
    """Read all weights of a model and return its report. ValueError or OSError if a file is damaged."""
    from models.layouts import native  # not needed for downloading
    from models.layouts.load import load

    model = load(*paths)
    for path in map(Path, paths if model.report and model.report.layout == "native" else ()):
        native.verify(path)
    model.check_finite()
    return f"{model.report}\n  all weights are finite"


if __name__ == "__main__":
    started()
    sys.exit(main())
