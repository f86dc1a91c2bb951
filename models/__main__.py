"""plain-diffusion models download NAME [FILE ...]: published weights from the hub into its cache; prints
their paths. plain-diffusion models check PATH [PATH ...]: reads all weights of a model, which loading need
not; prints its report. plain-diffusion models families: prints a table of the families that are known."""

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
    parser = argparse.ArgumentParser(prog="plain-diffusion models")
    parser.add_argument(
        "--version", action="version", version=f"plain-diffusion {plain_diffusion.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    known = "\n".join(f"  {name:20} {model.repo} ({model.licence})" for name, model in PUBLISHED.items())
    known += "\n" + "\n".join(f"  {name:20} {file.name} ({file.licence})" for name, file in FILES.items())
    command = commands.add_parser(
        "download",
        help="published weights from the hub into its cache",
        epilog=f"published models and their licences:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("name", help="of a published model, or owner/name of any repository on the hub")
    command.add_argument("files", nargs="*", metavar="file", help="only these of its files")
    command.add_argument("--revision", help="commit, tag or branch")
    command.add_argument("--folder", help="where the cache is, in place of the hub library's own")
    command.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        help="seconds after which a server that stalls is given up",
    )
    check = commands.add_parser(
        "check", help="whether all weights of a model are finite, and a training run's as they were written"
    )
    check.add_argument(
        "paths",
        nargs="+",
        metavar="path",
        help="what models.load takes: files, folders, a training run's folder",
    )
    commands.add_parser("families", help="a table of the families that are known")
    options = parser.parse_args()
    try:
        if options.command == "families":
            print(table())
            return 0
        if options.command == "check":
            print(checked(options.paths))
            return 0
        paths = download(
            options.name,
            files=options.files,
            revision=options.revision,
            folder=options.folder,
            patience=options.patience,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        return 130
    print(*paths, sep="\n")
    if options.name in PUBLISHED and (family := PUBLISHED[options.name].family):
        print(f"its keys do not tell all of it: load it with family={family}", file=sys.stderr)
    return 0


def checked(paths: Sequence[str]) -> str:
    """The report of a model whose files are sound, after reading all of them; ValueError or OSError for
    others."""
    from models.layouts import native  # which downloading has no use for
    from models.layouts.load import load

    model = load(*paths)
    for path in map(Path, paths if model.report and model.report.layout == "native" else ()):
        native.verify(path)
    model.check_finite()
    return f"{model.report}\n  all weights are finite"


if __name__ == "__main__":
    started()
    sys.exit(main())
