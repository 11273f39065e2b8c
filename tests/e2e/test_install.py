"""`pip install .` gives a working `bulkhead`, native programs included."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.installation import TIMEOUT_S, Installation
from tests.helpers.waiting import until

CHECKOUT = Path(__file__).resolve().parents[2]


def run(*argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=TIMEOUT_S, env={**kept, **environment}
    )


def test_pip_install(tmp_path: Path) -> None:
    """The build back end comes from the package index; the dependencies are those of the tests."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    leave = shutil.ignore_patterns("__pycache__", "bulkhead-*", "*.egg-info")
    shutil.copytree(CHECKOUT / "bin", source / "bin")
    for name in ("src", "native"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=leave)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    built = run(*pip, "wheel", "--no-deps", "--quiet", "--wheel-dir", str(wheels), str(source))
    if built.returncode and "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("the build back end cannot be fetched: no package index")
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.iterdir()
    venv = tmp_path / "venv"
    made = run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    assert made.returncode == 0, made.stderr
    python = str(venv / "bin" / "python")
    put = run(*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    assert put.returncode == 0, put.stderr
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = Path(run(python, "-c", asked).stdout.strip())
    (place / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert os.access(place / "bulkhead" / "_native" / "bulkhead-client", os.X_OK)
    here = Installation(tmp_path / "root", tmp_path / "run")
    environment = {
        "BULKHEAD_ROOT": str(here.root),
        "BULKHEAD_RUN": str(here.run),
        "BULKHEAD_COMMAND_SERVER": "0",
    }
    command = str(venv / "bin" / "bulkhead")
    shown = run(command, "--version", **environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("bulkhead version ")
    runtime = venv / "bin" / "bulkhead-runtime"
    assert runtime.read_bytes().startswith(b"\x7fELF")
    named = run(str(runtime), "--version")
    assert named.stdout.startswith("bulkhead-runtime version "), named.stderr
    where = run(python, "-c", "import bulkhead.cli.main as m; print(m.__file__)", **environment)
    assert where.stdout.startswith(str(venv))
    if os.geteuid() != 0:
        return
    try:
        listed = run(command, "ps", "-a", **environment)
        assert listed.stdout.startswith("CONTAINER ID"), listed.stderr
    finally:
        run(command, "system", "shutdown", "--force", **environment)
    until(lambda: not here.processes(), "the engine ends")
