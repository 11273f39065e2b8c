"""Docker's own daemon as a peer, in namespaces of its own, so that nothing of it stays.

    with dockerd(folder, insecure=("127.0.0.1:5000",)) as docker:
        docker("run", "--rm", "busybox", "true").ok()

It runs with its own data, sockets, control group, mounts and processes; with `network=True` also in
a network namespace of its own (`docker.enter` runs programs there), where it makes its bridge and
its iptables chains as ever. Without, it makes none. When its first process is killed, the kernel
takes all of that away.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.installation import TIMEOUT_S, Done
from tests.helpers.waiting import until

CLI = "/usr/bin/docker"
"""The distribution's, as old as the daemon; another one may come first in PATH."""
PROGRAMS = ("dockerd", "containerd", "unshare", CLI)
_INIT = """
ip link set lo up 2>/dev/null
trap 'kill -TERM $daemon' TERM
"$@" & daemon=$!
while kill -0 $daemon 2>/dev/null; do wait $daemon; done
"""


@dataclass
class Dockerd:
    """A running daemon."""

    socket: Path
    first: int
    """The process whose namespaces it lives in, as the host counts."""
    config: Path

    def command(self, *argv: str) -> list[str]:
        """What to execute."""
        return [CLI, "--host", f"unix://{self.socket}", *argv]

    def __call__(self, *argv: str, stdin: bytes = b"", cwd: Path | None = None) -> Done:
        """Run one command of its client to the end."""
        done = subprocess.run(
            self.command(*argv), input=stdin, capture_output=True, timeout=TIMEOUT_S, cwd=cwd,
            env={**os.environ, "DOCKER_CONFIG": str(self.config)},
        )  # fmt: skip
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        return Done(argv, done.returncode, out, err)

    def enter(self, *argv: str) -> list[str]:
        """A command line that runs `argv` in its network namespace."""
        return ["nsenter", f"--net=/proc/{self.first}/ns/net", *argv]


def missing() -> str:
    """Why it cannot run here, "" if it can."""
    if os.geteuid() != 0:
        return "dockerd wants root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)} (apt-get install docker.io)" if lacking else ""


@contextlib.contextmanager
def dockerd(
    folder: Path,
    *,
    network: bool = False,
    insecure: Sequence[str] = (),
    runtimes: Mapping[str, str] | None = None,
) -> Iterator[Dockerd]:
    """A daemon on directories below `folder`; skips the test if there is none on this machine.

    `runtimes` are OCI runtimes by name, as programs.
    """
    if reason := missing():
        pytest.skip(reason)
    place = folder / "dockerd"
    place.mkdir()
    group = f"/bh-dockerd-{os.getpid()}-{time.monotonic_ns()}"
    settings: dict[str, object] = {"insecure-registries": list(insecure)}
    if runtimes:
        settings["runtimes"] = {name: {"path": path} for name, path in runtimes.items()}
    (place / "daemon.json").write_text(json.dumps(settings))
    (place / "client").mkdir()
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["--net"] if network else []
    command += ["sh", "-c", _INIT, "sh", "dockerd", "--config-file", str(place / "daemon.json")]
    command += ["--data-root", str(place / "data"), "--exec-root", str(place / "exec")]
    command += ["--pidfile", str(place / "pid"), "--host", f"unix://{place / 'sock'}"]
    command += ["--cgroup-parent", group]
    if not network:
        command += ["--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"]
    log = place / "log"
    with contextlib.ExitStack() as undo:
        undo.callback(remove_groups, group)
        with log.open("wb") as file:
            outer = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd="/"
            )
        undo.callback(_end, outer)
        made = Dockerd(place / "sock", 0, place / "client")
        until(lambda: _answers(made, outer, log), "dockerd answers", 120)
        made.first = int(_children(outer.pid)[0])
        undo.callback(_empty, made)
        yield made


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _answers(made: Dockerd, outer: "subprocess.Popen[bytes]", log: Path) -> bool:
    if outer.poll() is not None:
        raise AssertionError(f"dockerd ended:\n{log.read_text(errors='replace')[-3000:]}")
    return made.socket.exists() and made("version").code == 0


def _empty(made: Dockerd) -> None:
    """Remove all containers: their shims unmount and end."""
    left = made("ps", "-aq").out.split()
    if left:
        made("rm", "-f", "-v", *left)


def _end(outer: "subprocess.Popen[bytes]") -> None:
    """Ask the daemon to end; what is left then dies with its pid namespace."""
    if outer.poll() is None:
        for child in _children(outer.pid):
            os.kill(int(child), signal.SIGTERM)
        try:
            outer.wait(30)
        except subprocess.TimeoutExpired:
            outer.kill()
            outer.wait()


def remove_groups(name: str) -> None:
    """Remove the control groups `name` of every hierarchy, with those below."""

    def removed() -> bool:
        left = False
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[fields.index("-") + 1] in ("cgroup", "cgroup2"):
                for folder, _, _ in os.walk(fields[4] + name, topdown=False):
                    with contextlib.suppress(FileNotFoundError):
                        try:
                            os.rmdir(folder)
                        except OSError:
                            left = True
        return not left

    until(removed, f"the control groups {name} are removed")
