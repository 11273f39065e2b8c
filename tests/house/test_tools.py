"""The linters, as tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = {
    "ruff": ["ruff", "check", "--quiet", "."],
    "format": ["ruff", "format", "--check", "--quiet", "."],
    "mypy": ["mypy"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_tool(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *COMMANDS[name]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_c_sources_compile_without_a_warning() -> None:
    for source in sorted((ROOT / "native").glob("*.c")):
        command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "native")
        assert done.returncode == 0, done.stderr


def test_shell_scripts_parse() -> None:
    for script in (ROOT / "scripts" / "setup", ROOT / "scripts" / "demo", ROOT / ".ci" / "run"):
        subprocess.run(["bash", "-n", str(script)], check=True)
