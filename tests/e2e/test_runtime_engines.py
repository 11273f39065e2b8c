"""bulkhead-runtime under other engines: what runc does there, it does."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.dockerd import dockerd
from tests.helpers.images import busybox_tar
from tests.helpers.podman import Podman, podman
from tests.helpers.registry import need
from tests.helpers.residue import residue

CALLS: tuple[tuple[str, ...], ...] = (
    ("run", "--rm", "I", "sh", "-c", "echo out; echo err >&2; exit 7"),
    ("run", "--rm", "I", "/bin/nowhere"),
    ("run", "--rm", "I", "/etc"),
    ("run", "--rm", "-t", "I", "sh", "-c", "test -t 0 && echo a terminal"),
    ("run", "--rm", "--memory", "64m", "--pids-limit", "30", "I", "sh", "-c",
     "cat /sys/fs/cgroup/memory*/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null"),
    ("run", "--rm", "--user", "1000", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/t",
     "--security-opt", "no-new-privileges", "I", "sh", "-c",
     "id -u; echo x > /t/x; cat /t/x; grep -E 'Cap|NoNew' /proc/self/status; echo x > /x"),
    ("run", "--rm", "--hostname", "foo", "--sysctl", "kernel.msgmax=4096", "I", "sh", "-c",
     "hostname; cat /proc/sys/kernel/msgmax"),
    ("run", "--rm", "--pid", "host", "I", "true"),
    ("run", "--rm", "-w", "/some/dir", "I", "pwd"),
    ("run", "-d", "--name", "one", "I", "sh", "-c", "trap 'exit 3' TERM; sleep 1000 & wait"),
    ("exec", "one", "sh", "-c", "echo inside; exit 5"),
    ("exec", "-u", "12", "one", "id", "-u"),
    ("exec", "-t", "one", "sh", "-c", "test -t 1 && echo a terminal"),
    ("exec", "one", "nowhere"),
    ("pause", "one"),
    ("unpause", "one"),
    ("stop", "-t", "60", "one"),
    ("inspect", "-f", "{{.State.ExitCode}}", "one"),
    ("start", "one"),
    ("rm", "-f", "one"),
)  # fmt: skip

VARIES = re.compile(
    r"[0-9a-f]{64}|\S*bulkhead-runtime: |runc: |runc \w+ failed: "
    r"|unable to start container process: |exec failed: |time=\S+ "
    r'|level=error msg="error waiting for container: context canceled"'
    r"|/\S*/(?=bulkhead-runtime)|Error: OCI runtime error: "
)


@pytest.fixture
def runtime(tmp_path: Path) -> str:
    """The program, as an engine is told of it."""
    path = tmp_path / "bulkhead-runtime"
    path.write_text(
        f"#!/bin/sh\nexport BULKHEAD_ROOT={tmp_path}/root\n"
        f'exec "{sys.executable}" -m bulkhead.runtime --root {tmp_path}/state "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


Call = Callable[[tuple[str, ...]], "subprocess.CompletedProcess[str]"]


def compare(ours: Call, theirs: Call) -> None:
    """Every call gives the same output and exit code with both."""
    for words in CALLS:
        shown = []
        for call in (ours, theirs):
            done = call(words)
            text = VARIES.sub("", done.stdout + done.stderr)
            shown.append((done.returncode, text.split()))
        assert shown[0] == shown[1], words


def _run(words: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False
    )


def test_docker_takes_it_for_runc(tmp_path: Path, runtime: str) -> None:
    need("runc", "dockerd")
    with (
        residue(str(tmp_path)),
        # Its containerd has long names below, and a socket's path has at most 107 bytes.
        tempfile.TemporaryDirectory(prefix="bh-", dir="/var/tmp") as short,
        dockerd(Path(short), runtimes={"bulkhead": runtime}) as docker,
    ):
        docker("import", "-", "busybox", stdin=busybox_tar()).ok()

        def with_(name: str) -> Call:
            def call(words: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
                given = ["busybox" if word == "I" else word for word in words]
                options = ["--runtime", name] if words[0] == "run" else []
                given = [f"{name}-one" if word == "one" else word for word in given]
                done = _run(docker.command(given[0], *options, *given[1:]))
                done.stdout = done.stdout.replace(f"{name}-one", "one")
                return done

            return call

        compare(with_("bulkhead"), with_("runc"))


def test_podman_takes_it_for_runc(tmp_path: Path, runtime: str) -> None:
    need("runc", "podman")
    archive = tmp_path / "root.tar"
    archive.write_bytes(busybox_tar())
    with residue(str(tmp_path)), podman(runtime) as ours, podman("runc") as theirs:

        def with_(engine: Podman) -> Call:
            engine("import", "-q", str(archive), "busybox")

            def call(words: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
                given = ["busybox" if word == "I" else word for word in words]
                options = list(engine.RUN) if words[0] == "run" else []
                return _run([*engine.options, given[0], *options, *given[1:]])

            return call

        compare(with_(ours), with_(theirs))
