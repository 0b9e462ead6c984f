"""Prints what the image installs before it has our sources: the dependencies in pyproject.toml.

    python3 requirements.py cpu|cuda

The image's layer of packages is then made again only when that file changes. It runs before
anything is installed, so it knows the standard library only.
"""

import sys
import tomllib
from pathlib import Path

EXTRAS = {"cpu": ("demo",), "cuda": ("demo", "gpu")}


def requirements(device: str, pyproject: str) -> list[str]:
    """One requirement a line, as pip reads them."""
    project = tomllib.loads(pyproject)["project"]
    extras = [project["optional-dependencies"][extra] for extra in EXTRAS[device]]
    return [*project["dependencies"], *(line for extra in extras for line in extra)]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], Path("pyproject.toml").read_text())))
