"""Make constraints.txt from pip's reports, one per Python: python .ci/constraints.py 3.10=a.json 3.11=b.json
... > constraints.txt

Each report comes from that Python's own `pip install --dry-run --ignore-installed --report FILE '.[dev]'`.
Versions alone are kept, no addresses. The last Python's versions hold for all newer ones too.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HEADER = """\
# Every package of `pip install '.[dev]'`, pinned for each supported Python, so that a set-up made next year
# still works.
# Made by .ci/constraints.py; the library itself accepts what pyproject.toml says.
"""


def main(arguments: list[str]) -> None:
    pins: dict[str, dict[str, str]] = {}
    pythons = [argument.split("=")[0] for argument in arguments]
    for argument in arguments:
        python, path = argument.split("=")
        for item in json.loads(Path(path).read_text())["install"]:
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            if name != "plain-diffusion":
                pins.setdefault(name, {})[python] = item["metadata"]["version"]
    print(HEADER + "\n".join(line for name in sorted(pins) for line in lines(name, pins[name], pythons)))


def lines(name: str, versions: dict[str, str], pythons: list[str]) -> list[str]:
    """One line where all Pythons that need it agree, else one for each."""
    if len(set(versions.values())) == 1:
        return [f"{name}=={next(iter(versions.values()))}"]
    operator = dict.fromkeys(pythons, "==") | {pythons[-1]: ">="}
    return [
        f'{name}=={version} ; python_version {operator[python]} "{python}"'
        for python, version in versions.items()
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
