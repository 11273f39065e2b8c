"""bulkhead-runtime under containerd: its own client and, as kubelet uses it, its CRI plug-in.

The native client is what containerd executes; the first command leaves a planner for the others.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.containerd import Containerd, containerd, group, measures
from tests.helpers.cri import EXITED, RUNNING, Cri
from tests.helpers.registry import need
from tests.helpers.residue import residue
from tests.helpers.runtime_rig import NATIVE
from tests.helpers.waiting import until


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Containerd]:
    need("runc", "containerd")
    with ExitStack() as stack:
        stack.enter_context(residue(str(tmp_path)))
        # A socket's path has at most 107 bytes.
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bh-", dir="/var/tmp")))
        runtime = short / "bulkhead-runtime"
        runtime.write_text(
            f"#!/bin/sh\nexport BULKHEAD_ROOT={tmp_path}/root BULKHEAD_RUNTIME_PLANNER_WATCH=0\n"
            f'exec {NATIVE} "$@"\n'
        )
        runtime.chmod(0o755)
        yield stack.enter_context(containerd(short, str(runtime)))


CALLS: tuple[tuple[str, ...], ...] = (
    ("run", "--rm", "I", "N", "sh", "-c", "echo out; echo err >&2; exit 7"),
    ("run", "--rm", "I", "N", "nowhere"),
    ("run", "--rm", "--user", "12:34", "--cwd", "/bin", "--env", "A=b", "--read-only", "I", "N",
     "sh", "-c", "id -u; id -g; pwd; echo $A; echo x > /x"),
    ("run", "--rm", "--pid-file", "P", "I", "N", "true"),
    ("run", "-d", "I", "N", "sh", "-c", "trap 'exit 3' TERM; sleep 1000 & wait"),
    ("task", "exec", "--exec-id", "e1", "N", "sh", "-c", "echo inside; exit 5"),
    ("task", "exec", "--exec-id", "e2", "N", "nowhere"),
    ("task", "pause", "N"),
    ("task", "ls"),
    ("task", "resume", "N"),
    ("task", "kill", "N"),
    ("task", "wait", "N"),
    ("task", "delete", "N"),
    ("task", "start", "-d", "N"),
    ("task", "kill", "-s", "KILL", "N"),
    ("task", "wait", "N"),
    ("task", "delete", "N"),
    ("container", "delete", "N"),
)  # fmt: skip
VARIES = re.compile(
    r"time=\S+ |\S*bulkhead-runtime[\w ]*: |runc[\w ]*: |unable to start container process: "
    r"|exec failed: |(?<=one) +\d+|N\d+ |level=\w+ msg="
)


def test_its_client_takes_it_for_runc(daemon: Containerd, tmp_path: Path) -> None:
    shown: dict[str, list[object]] = {}
    with group() as path:
        for name in (daemon.runtime, "runc"):
            shown[name] = []
            for words in CALLS:
                given = [{"N": "one", "P": str(tmp_path / "pid")}.get(word, word) for word in words]
                if given[0] == "run":
                    given[1:1] = ["--runc-binary", name, "--cgroup", f"{path}/one"]
                done = daemon(*given)
                if words[:2] == ("task", "wait"):  # which may be told before the state is
                    until(lambda: "STOPPED" in daemon("task", "ls").out, "its end")
                # Its client sometimes loses what an exec printed, with runc as well.
                text = VARIES.sub("", done.err if "exec" in words else done.out + done.err)
                shown[name].append((words, done.code, text.split()))
    assert shown[daemon.runtime] == shown["runc"]


def test_its_terminal_and_limits(daemon: Containerd) -> None:
    with group() as path:
        run = ("run", "--rm", "--runc-binary", daemon.runtime, "--cgroup", f"{path}/one")
        terminal = daemon(*run, "-t", "I", "one", "sh", "-c", "test -t 0 && tty", terminal=True)
        assert "/dev/pts/0" in terminal.ok().out
        # Half of what it writes is kept in memory: it ends by the limit.
        mounted = "type=tmpfs,src=tmpfs,dst=/t,options=rw"
        limited = ("--memory-limit", str(16 << 20), "--mount", mounted)
        writes = ("dd", "if=/dev/zero", "of=/t/x", "bs=1M", "count=64")
        assert daemon(*run, *limited, "I", "one", *writes).code == 137
        assert daemon(*run, "--mount", mounted, "I", "one", *writes).code == 0


def test_containers_outlive_the_daemon(daemon: Containerd) -> None:
    with group() as path:
        run = ("run", "-d", "--runc-binary", daemon.runtime, "--cgroup", f"{path}/one")
        daemon(*run, "I", "one", "sh", "-c", "trap 'exit 3' TERM; sleep 1000 & wait").ok()
        daemon.restart()
        daemon("task", "exec", "--exec-id", "e1", "one", "true").ok()
        daemon("task", "kill", "one").ok()
        until(lambda: "STOPPED" in daemon("task", "ls").out, "its end")
        assert "exit code 3" in daemon("task", "delete", "one").ok().err
        daemon("container", "delete", "one").ok()


def test_a_pod_of_kubernetes(daemon: Containerd, tmp_path: Path) -> None:
    with group() as path:
        cri = Cri(daemon.socket, "bulkhead", tmp_path, path)
        try:
            sandbox = cri.sandbox()
            script = "trap 'exit 3' TERM; echo begun; sleep 1000 & wait"
            one = cri.create(sandbox, ["sh", "-c", script], memory=32 << 20)
            cri.call("StartContainer", {1: one})
            until(lambda: "begun" in (tmp_path / "1.log").read_text(), "its log")
            assert cri.execute(one, "sh", "-c", "echo out; echo err >&2; exit 5") == (
                5,
                "out\n",
                "err\n",
            )
            if measures():
                assert 0 < cri.memory(one) <= 32 << 20
            cri.call("UpdateContainerResources", {1: one, 2: {4: 48 << 20}})
            cri.call("StopContainer", {1: one, 2: 60})
            assert cri.status(one) == (EXITED, 3)
            # What kubelet calls a restart: the next attempt in the same sandbox.
            again = cri.create(sandbox, ["sh", "-c", "test -t 0 && echo terminal; sleep 1000"],
                               tty=True)  # fmt: skip
            cri.call("StartContainer", {1: again})
            assert cri.status(again)[0] == RUNNING
            until(lambda: "terminal" in (tmp_path / "2.log").read_text(), "its log")
            cri.call("StopContainer", {1: again, 2: 0})
            for container in (one, again):
                cri.call("RemoveContainer", {1: container})
            cri.call("StopPodSandbox", {1: sandbox})
            cri.call("RemovePodSandbox", {1: sandbox})
        finally:
            cri.close()
