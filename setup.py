"""Builds the programs of `native/` beside the package; everything else is in pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildNative(build_py):
    """`build_py` that first runs `native/Makefile` into `src/bulkhead/_native`."""

    def run(self) -> None:
        """Compile, then build as usual; a failing compiler fails the build in its own words."""
        here = Path(__file__).parent
        subprocess.run(["make", "-s", "-C", str(here / "native")], check=True)
        super().run()


setup(cmdclass={"build_py": BuildNative})
