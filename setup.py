"""Builds the programs of `native/` beside the package; everything else is in pyproject.toml."""

import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py


class BuildNative(build_py):
    """`build_py` that first runs `native/Makefile` into `src/bulkhead/_native`."""

    def run(self) -> None:
        """Compile, then build as usual; a failing compiler fails the build in its own words."""
        here = Path(__file__).parent
        subprocess.run(["make", "-s", "-C", str(here / "native")], check=True)
        super().run()


class BuildScripts(Distribution().get_command_class("build_scripts")):
    """`build_scripts` that installs the native client as `bulkhead-runtime`."""

    def run(self) -> None:
        """As usual; then the program takes the place of the script, which needs an interpreter."""
        super().run()
        native = Path(__file__).parent / "src/bulkhead/_native/bulkhead-runtime"
        shutil.copy(native, Path(self.build_dir) / "bulkhead-runtime")


setup(cmdclass={"build_py": BuildNative, "build_scripts": BuildScripts})
