"""Bundles of busybox, and bulkhead-runtime run on them as an engine would."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bulkhead import _native
from bulkhead.runtime.examples import example
from bulkhead.runtime.records import PLANNER
from tests.helpers.waiting import until

NATIVE = Path(str(_native.__file__)).parent / "bulkhead-runtime"

APPLETS = ("sh", "true", "echo", "cat", "id", "ls", "sleep", "head", "wc", "stat", "mount", "kill")
Change = Callable[[dict[str, Any]], None]


def make_root(place: Path) -> None:
    """A root file system of busybox, readable for all."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("no busybox on this host: apt-get install busybox-static")
    (place / "bin").mkdir(parents=True)
    shutil.copy(busybox, place / "bin/busybox")
    for name in APPLETS:
        (place / "bin" / name).symlink_to("busybox")
    (place / "etc").mkdir()
    (place / "etc/marker").write_text("of the root")


class Bundle:
    """One bundle and one runtime root; `run`, `create` and the like by the command line.

    By `python -m`, or (`native`) by the native client.
    """

    def __init__(self, folder: Path, *, native: bool = False) -> None:
        self.folder = folder
        self.native = native
        self.path = folder / "bundle"
        make_root(self.path / "rootfs")
        self.state = folder / "state"

    def configure(self, *args: str, change: Change | None = None) -> None:
        """Write config.json: the example with these arguments, and what `change` does to it."""
        spec = msgspec.json.decode(msgspec.json.encode(example()))
        spec["process"]["args"] = list(args)
        spec["process"]["terminal"] = False
        # The name of the folder is the scope by which residue is found.
        spec["linux"]["cgroupsPath"] = f"/bulkhead-{self.folder.name}-{os.getpid()}"
        # Descriptors' limits cannot be raised everywhere.
        del spec["process"]["rlimits"]
        if change is not None:
            change(spec)
        (self.path / "config.json").write_text(json.dumps(spec))

    def command(self, *words: str) -> list[str]:
        """The command line of one call."""
        program = [str(NATIVE)] if self.native else [sys.executable, "-m", "bulkhead.runtime"]
        return [*program, "--root", str(self.state), *words]

    def call(
        self, *words: str, code: int | None = 0, stdin: str | None = None, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end and look at its exit code."""
        done = subprocess.run(
            self.command(*words),
            input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, (words, done.stdout, done.stderr)
        return done

    def detached(self, *words: str) -> None:
        """Run a command whose process outlives it, which must not hold a pipe of ours."""
        done = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, words

    @contextlib.contextmanager
    def planner(self) -> Iterator[int]:
        """A planner for the root while this lasts; its process id."""
        folder = self.state / PLANNER
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {**os.environ, "BULKHEAD_RUNTIME_PLANNER_WATCH": "0"}
        command = [str(NATIVE), "planner", str(folder)]
        with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as process:
            socket_ = folder / str(os.stat("/proc/self/ns/mnt").st_ino)
            until(lambda: socket_.exists() or process.poll() is not None, "the planner's socket")
            # Commands that come as it ends start none themselves.
            os.environ["BULKHEAD_RUNTIME_PLANNER"] = "1"
            try:
                yield process.pid
            finally:
                del os.environ["BULKHEAD_RUNTIME_PLANNER"]
                process.terminate()
                process.wait()
                socket_.unlink(missing_ok=True)

    def create(self, name: str, *options: str) -> None:
        """`create` with the standard streams in files, as a shim has them."""
        folder = self.folder
        with open(folder / f"{name}.out", "wb") as out, open(folder / "said", "wb") as said:
            done = subprocess.run(
                self.command("create", "--bundle", str(self.path), *options, name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=said,
                timeout=120,
                check=False,
            )
        assert done.returncode == 0, (folder / "said").read_text()

    def output(self, name: str) -> str:
        """What a created container has printed."""
        return (self.folder / f"{name}.out").read_text()

    def status(self, name: str) -> str:
        """Its state's status."""
        status: str = json.loads(self.call("state", name).stdout)["status"]
        return status

    def pid(self, name: str) -> int:
        """Its first process."""
        pid: int = json.loads(self.call("state", name).stdout)["pid"]
        return pid


@contextlib.contextmanager
def console(path: Path) -> Iterator[Callable[[], int]]:
    """A console socket; what is yielded waits for the terminal's master."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(60)

        def receive() -> int:
            client, _ = server.accept()
            with client:
                _, fds, _, _ = socket.recv_fds(client, 64, 1)
            return fds[0]

        yield receive


def read_to_end(fd: int) -> bytes:
    """All that a terminal's master gives until its slave is closed."""
    data = b""
    while True:
        try:
            piece = os.read(fd, 4096)
        except OSError:
            return data
        if not piece:
            return data
        data += piece
