"""Prints what the image installs before it has our sources: the dependencies in pyproject.toml.

    python3 requirements.py cpu|cuda

The image's layer of packages is then made again only when that file changes.
"""

import sys
import tomllib

EXTRAS = {"cpu": ("demo",), "cuda": ("demo", "gpu")}

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
optional = project["optional-dependencies"]
extras = [line for extra in EXTRAS[sys.argv[1]] for line in optional[extra]]
print("\n".join([*project["dependencies"], *extras]))
