"""Prints what an extra of pyproject.toml asks for, a requirement a line, for pip's ``-r``.

``python tools/requirements.py EXTRA`` needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
OWN = re.compile(r"snv2_kernels\[(?P<extras>[\w,-]+)\]")


def requirements(extra: str) -> list[str]:
    """Returns the requirements of an extra and of those of ours that it names."""
    found: list[str] = []
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    for requirement in project["optional-dependencies"][extra]:
        own = OWN.fullmatch(requirement)
        found += (
            [r for name in own["extras"].split(",") for r in requirements(name)]
            if own
            else [requirement]
        )
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print(*requirements(sys.argv[1]), sep="\n")
