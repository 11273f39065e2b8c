"""An installation of its own on temporary directories, driven through the command line.

    with installation(tmp_path) as here:
        here.cli("run", "--rm", "busybox", "true").ok()

At the end engine, holder, keeper and command server are stopped, and nothing of theirs may remain.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.images import busybox_archive
from tests.helpers.waiting import until

SOURCE = Path(__file__).resolve().parents[2] / "src"
NATIVE = SOURCE / "bulkhead" / "_native" / "bulkhead-client"
TIMEOUT_S = 300.0
"""Only a hang takes so long."""


@dataclass
class Done:
    """How a command ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    def ok(self) -> "Done":
        """Itself; AssertionError with what it said if it failed."""
        assert self.code == 0, f"{self.argv}: exit code {self.code}\n{self.out}{self.err}"
        return self

    def failed(self, code: int, *texts: str) -> "Done":
        """Itself; AssertionError unless it failed so, saying every one of `texts`."""
        assert self.code == code, f"{self.argv}: exit code {self.code}\n{self.out}{self.err}"
        for text in texts:
            assert text in self.err, f"{self.argv}: {text!r} not in {self.err!r}"
        return self

    @property
    def line(self) -> str:
        """Its output without the last newline."""
        return self.out.rstrip("\n")


class Installation:
    """Two directories, and the ways to run commands on them."""

    def __init__(self, root: Path, run: Path) -> None:
        self.root = root
        self.run = run

    def environment(self, *, server: bool = False, **extra: str) -> dict[str, str]:
        """The environment of commands; without `server` each runs in a Python of its own."""
        return {
            **os.environ,
            "BULKHEAD_ROOT": str(self.root),
            "BULKHEAD_RUN": str(self.run),
            "BULKHEAD_COMMAND_SERVER": "1" if server else "0",
            "BULKHEAD_COMMAND_SERVER_WATCH": "0",  # whoever edits the checkout meanwhile
            "BULKHEAD_PYTHON": sys.executable,
            "PYTHONPATH": str(SOURCE),
            "DOCKER_CONFIG": str(self.run / "docker"),
            **extra,
        }

    def command(self, *argv: str, native: bool = False) -> list[str]:
        """What to execute."""
        return [str(NATIVE), *argv] if native else [sys.executable, "-m", "bulkhead", *argv]

    def cli(
        self,
        *argv: str,
        stdin: bytes | str = b"",
        native: bool = False,
        server: bool = False,
        cwd: Path | None = None,
        **extra: str,
    ) -> Done:
        """Run one command to its end."""
        done = subprocess.run(
            self.command(*argv, native=native),
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            env=self.environment(server=server, **extra),
            timeout=TIMEOUT_S,
            cwd=cwd,
        )
        return Done(
            argv, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode()
        )

    def popen(
        self, *argv: str, native: bool = False, server: bool = False
    ) -> "subprocess.Popen[bytes]":
        """Begin one command with pipes for its streams."""
        return subprocess.Popen(
            self.command(*argv, native=native),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(server=server),
        )

    def load_busybox(self, folder: Path, name: str = "busybox:latest") -> str:
        """Load a small image; its name."""
        archive = busybox_archive(folder / "busybox.tar", name)
        self.cli("load", "-i", str(archive)).ok()
        return name

    def stop(self) -> None:
        """Stop all that runs here; AssertionError if a process of it stays."""
        self.cli("system", "shutdown", "--force").ok()
        until(lambda: not self.processes(), f"processes of {self.run} end")

    def processes(self) -> list[str]:
        """Command lines of what still runs on these directories (zombies aside)."""
        return [" ".join(words) for words in self._commands().values()]

    def pids(self, word: str) -> list[int]:
        """Processes on these directories with `word` in their command lines."""
        return [pid for pid, words in self._commands().items() if word in words]

    def _commands(self) -> dict[int, list[str]]:
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                if any(str(self.run) in word for word in line.split("\0")):
                    found[int(entry.name)] = line.split("\0")
        return found


@contextlib.contextmanager
def installation(folder: Path) -> Iterator[Installation]:
    """An Installation below `folder`, stopped afterwards."""
    here = Installation(folder / "root", folder / "run")
    try:
        yield here
    finally:
        here.stop()
