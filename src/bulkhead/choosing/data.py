"""The package's data files."""

import os
import tomllib
from typing import Any


def toml(name: str) -> dict[str, Any]:
    """The TOML file of this name, parsed."""
    with open(os.path.join(os.path.dirname(__file__), name), "rb") as file:
        return tomllib.load(file)
