"""An engine with its Docker API socket, and docker's client pointed at it."""

import contextlib
import gc
import os
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.helpers import packages
from tests.helpers.engine_rig import Rig, engine
from tests.helpers.images import Blobs, build, busybox_tar, docker_archive
from tests.helpers.installation import TIMEOUT_S, Done
from tests.helpers.parity import plain_environment

CLI = "/usr/bin/docker"

_NEWER = {
    "compose": ("docker-compose", "trixie", "usr/libexec/docker/cli-plugins/docker-compose"),
    "docker": ("docker-cli", "sid", "usr/bin/docker"),
}


def newer(name: str) -> str:
    """A client of a newer Debian suite, unpacked; skips where it cannot be had."""
    package, suite, path = _NEWER[name]
    try:
        return str(packages.unpacked(package, suite=suite) / path)
    except packages.NoPackages as error:
        pytest.skip(f"no {package} of {suite}: {error}")


@dataclass
class Api:
    """A running engine seen through Docker's API."""

    rig: Rig
    folder: Path

    @property
    def path(self) -> Path:
        """The socket."""
        return self.rig.run / "docker.sock"

    @property
    def url(self) -> str:
        """For DOCKER_HOST."""
        return f"unix://{self.path}"

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a client."""
        config = self.folder / "client"
        config.mkdir(exist_ok=True)
        known = {"DOCKER_HOST": self.url, "DOCKER_CONFIG": str(config), "DOCKER_BUILDKIT": "0"}
        return plain_environment(**(known | more))

    def cli(self, *argv: str, stdin: bytes = b"", program: str = CLI) -> Done:
        """Run docker's client to its end."""
        done = subprocess.run(
            [program, *argv], input=stdin, capture_output=True, timeout=TIMEOUT_S,
            env=self.environment(), cwd=self.folder,
        )  # fmt: skip
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        return Done(argv, done.returncode, out, err)

    @contextlib.contextmanager
    def client(self, version: str = "auto") -> Iterator[Any]:
        """docker-py's client."""
        made = docker.DockerClient(base_url=self.url, version=version, timeout=int(TIMEOUT_S))
        try:
            yield made
        finally:
            made.close()
            with warnings.catch_warnings():
                # docker-py leaves the responses of its streams to the garbage collector.
                warnings.simplefilter("ignore")
                gc.collect()

    def descriptors(self) -> int:
        """How many the engine has open for clients: pipes, hang-up watches, connections."""
        assert self.rig.process is not None
        folder = f"/proc/{self.rig.process.pid}/fd"
        count = 0
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                link = os.readlink(f"{folder}/{name}")
                count += link.startswith("pipe:") or "eventpoll" in link
        connections = Path("/proc/net/unix").read_text().splitlines()
        return count + sum(line.endswith(f" {self.path}.new") for line in connections)


def archive(folder: Path) -> Path:
    """busybox as `docker save` writes it."""
    made = folder / "busybox.tar"
    if not made.exists():
        docker_archive(made, build(Blobs(), [busybox_tar()]), ["busybox:latest"])
    return made


@contextlib.contextmanager
def api(folder: Path) -> Iterator[Api]:
    """An engine with busybox below `folder`."""
    with engine(folder) as rig:
        made = Api(rig, folder)
        with made.client() as client, archive(folder).open("rb") as file:
            client.images.load(file)
        yield made
