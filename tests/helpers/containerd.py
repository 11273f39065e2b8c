"""containerd on directories of its own, in namespaces of its own, so that nothing of it stays."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.dockerd import remove_groups
from tests.helpers.images import busybox_archive
from tests.helpers.installation import TIMEOUT_S, Done
from tests.helpers.waiting import until

_CONFIG = """
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = [{disabled}]
[grpc]
address = "{place}/sock"
[ttrpc]
address = "{place}/ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "docker.io/library/pause:latest"
stream_server_port = "0"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "bulkhead"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.bulkhead]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.bulkhead.options]
BinaryName = "{runtime}"
Root = "{place}/runc"
"""
_DISABLED = (
    *(f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")),
    "io.containerd.internal.v1.opt",
)
_INIT = """
trap 'kill -TERM $daemon' TERM
trap 'kill -TERM $daemon; wait $daemon; "$@" & daemon=$!' HUP
"$@" & daemon=$!
while kill -0 $daemon 2>/dev/null; do wait $daemon; done
"""


@dataclass
class Containerd:
    """A running daemon; `runtime` is the program that it takes for runc."""

    place: Path
    runtime: str
    process: subprocess.Popen[bytes]

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.place / "sock"

    def command(self, *argv: str) -> list[str]:
        """The command line of its client; `I` is the image."""
        words = ["docker.io/library/busybox:latest" if word == "I" else word for word in argv]
        if words[0] == "run":
            words[1:1] = ["--snapshotter", "native", "--runc-root", str(self.place / "runc")]
        return ["ctr", "--address", str(self.socket), *words]

    def __call__(self, *argv: str, terminal: bool = False) -> Done:
        """Run one command of its client to the end."""
        words = self.command(*argv)
        if terminal:
            words = ["script", "-qec", " ".join(f"'{word}'" for word in words), "/dev/null"]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        return Done(argv, done.returncode, out, err)

    def restart(self) -> None:
        """End the daemon and start it anew; containers go on."""
        self.socket.unlink()
        inner = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        os.kill(int(inner.split()[0]), 1)
        until(lambda: not self("version").code, "containerd answers again", 120)


@contextlib.contextmanager
def containerd(folder: Path, runtime: str) -> Iterator[Containerd]:
    """A daemon with busybox, and with the CRI plug-in, whose pods run `pause` of busybox."""
    lacking = [
        name for name in ("containerd", "ctr", "unshare", "script") if not shutil.which(name)
    ]
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)} (apt-get install containerd)")
    disabled = ", ".join(f'"{name}"' for name in _DISABLED)
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(place=folder, runtime=runtime, disabled=disabled))
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["sh", "-c", _INIT, "sh", "containerd", "--config", str(config)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    made = Containerd(folder, runtime, process)
    try:
        until(lambda: not made("version").code or process.poll() is not None, "containerd", 120)
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        for name, config_ in (
            ("busybox", {"Cmd": ["sh"]}),
            ("pause", {"Entrypoint": ["sleep", "1000000"], "Cmd": []}),
        ):
            archive = folder / f"{name}.tar"
            image = f"docker.io/library/{name}:latest"
            busybox_archive(archive, image, Env=["PATH=/bin"], **config_)
            load = ("image", "import", "--snapshotter", "native", str(archive))
            for namespace in ("default", "k8s.io"):
                made("-n", namespace, *load).ok()
        yield made
    finally:
        process.kill()  # its first process goes with it, and all others
        process.wait()


def measures() -> bool:
    """Whether its statistics work here: it wants all of /proc/self/cgroup to be mounted."""
    mounts = Path("/proc/self/mountinfo").read_text()
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    names = [line.split(":")[1].removeprefix("name=") for line in lines]
    return all(f"/sys/fs/cgroup/{name} " in mounts for name in names if name)


@contextlib.contextmanager
def group() -> Iterator[str]:
    """The path of a control group for containers; it is gone afterwards."""
    path = f"/bh-containerd-{os.getpid()}-{time.monotonic_ns()}"
    try:
        yield path
    finally:
        remove_groups(path)
