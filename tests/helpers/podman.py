"""Podman as a peer, on directories of its own."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.dockerd import remove_groups
from tests.helpers.installation import TIMEOUT_S

GROUP = f"/bh-podman-{os.getpid()}"


def run(*argv: str, code: int = 0) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S
    )
    assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class Podman:
    """podman on directories of its own."""

    RUN = (
        "--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000",
        f"--cgroup-parent={GROUP}",
    )  # fmt: skip

    def __init__(self, folder: Path, runtime: str) -> None:
        self.folder = folder
        self.options = [
            "podman", "--root", str(folder / "root"), "--runroot", str(folder / "run"),
            "--tmpdir", str(folder / "tmp"), "--storage-driver", "vfs", "--runtime", runtime,
            "--cgroup-manager", "cgroupfs", "--events-backend", "none",
        ]  # fmt: skip

    def __call__(self, *argv: str) -> str:
        return run(*self.options, *argv)

    def runs(self, name: str, *argv: str) -> str:
        """What a container of an image prints."""
        return self("run", "--rm", *self.RUN, name, *argv)


@contextlib.contextmanager
def podman(runtime: str) -> Iterator[Podman]:
    """Podman with that OCI runtime; afterwards nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="bh-", dir="/var/tmp") as short:  # it wants it short
        made = Podman(Path(short), runtime)
        yield made
        made("rm", "-a", "-f")
        made("rmi", "-a", "-f")
        remove_groups(GROUP)
