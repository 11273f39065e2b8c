"""The sandbox alone: its jail from the host's side, and what is left when its parts are killed."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until

PROGRAMS = ("linux.uml", "mke2fs", "busybox")
LACKING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(LACKING) or os.geteuid() != 0,
    reason=f"not installed: {', '.join(LACKING)}" if LACKING else "needs root",
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("sandbox")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


def _field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise AssertionError(f"no {name} in the status of {pid}")


def _kernel(monitor: int) -> int:
    """The process id of the kernel: the monitor's child."""
    children = Path(f"/proc/{monitor}/task/{monitor}/children").read_text().split()
    (child,) = children
    return int(child)


def test_the_jail_is_empty_and_without_powers(rig: Rig) -> None:
    rigs.start(rig, "jailed", "sleep 1000", boundary="sandbox")
    monitor = rigs.state(rig, "jailed")["Pid"]
    for pid in (monitor, _kernel(monitor)):
        assert {_field(pid, f"Cap{kind}") for kind in ("Prm", "Eff", "Inh", "Bnd", "Amb")} == {
            "0" * 16
        }
        assert _field(pid, "NoNewPrivs") == "1"
        assert _field(pid, "Seccomp") == "2"
        ids = set(_field(pid, "Uid").split()) | set(_field(pid, "Gid").split())
        assert len(ids) == 1 and int(ids.pop()) > 1 << 30
        for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
            ours = os.readlink(f"/proc/self/ns/{kind}")
            assert os.readlink(f"/proc/{pid}/ns/{kind}") != ours
        root = Path(f"/proc/{pid}/root")
        assert sorted(os.listdir(root / "usr/bin")) == ["bulkhead-monitor", "linux.uml"]
        assert os.listdir(root / "proc") == ["cpuinfo"]
        assert not (root / "sys").exists() and not (root / "etc").exists()
    rig.call("workload.remove", id="jailed", force=True)


@pytest.mark.parametrize("part", ["kernel", "monitor"])
def test_a_killed_part_ends_the_workload_alone(rig: Rig, part: str) -> None:
    rigs.start(rig, "other", "while :; do echo .; sleep 0.1; done", boundary="sandbox")
    rigs.start(rig, "victim", "echo before; sleep 1000", boundary="sandbox")
    until(lambda: rigs.logs(rig, "victim") == b"before\n", "it runs")
    monitor = rigs.state(rig, "victim")["Pid"]
    os.kill(_kernel(monitor) if part == "kernel" else monitor, signal.SIGKILL)
    rig.call("workload.wait", id="victim")
    state = rigs.state(rig, "victim")
    assert state["Status"] == "exited"
    assert state["ExitCode"] == (125 if part == "kernel" else 137)
    assert rigs.logs(rig, "victim").startswith(b"before\n")
    seen = len(rigs.logs(rig, "other"))
    until(lambda: len(rigs.logs(rig, "other")) > seen, "the other one runs on")
    rig.call("workload.start", id="victim")
    until(lambda: rigs.logs(rig, "victim").count(b"before\n") == 2, "it runs again")
    for name in ("victim", "other"):
        rig.call("workload.remove", id=name, force=True)


def test_a_disk_has_its_quota_and_grows_with_use(rig: Rig) -> None:
    script = "df -m / | tail -n 1; head -c 40000000 /dev/zero > /full; echo $?"
    done = rigs.run(rig, ["sh", "-c", script], boundary="sandbox", StorageOpt={"size": "32m"})
    assert done.out.split()[-1] != b"0", "more was written than fits"
    rigs.start(rig, "small", "sleep 1000", boundary="sandbox")
    disk = Path(rig.root) / "workloads" / rig.call("workload.inspect", id="small")["Id"]
    info = (disk / "disk.ext4").stat()
    assert info.st_size == 10 << 30
    assert info.st_blocks * 512 < 32 << 20
    rig.call("workload.remove", id="small", force=True)


def _said(rig: Rig, name: str, script: str, **host: Any) -> list[str]:
    rigs.start(rig, name, script, boundary="sandbox", **host)
    rig.call("workload.wait", id=name)
    said = rigs.logs(rig, name).decode().splitlines()
    rig.call("workload.remove", id=name, force=True)
    return said


def test_the_kernel_starts_no_helper_programs(rig: Rig) -> None:
    """Each would be a fork of the whole kernel, a hundred of them at boot."""
    script = 'for f in hotplug modprobe; do echo "$f=$(cat /proc/sys/kernel/$f)"; done'
    assert _said(rig, "helpers", script) == ["hotplug=", "modprobe="]


def test_fuse_is_there_for_who_can_mount_it(rig: Rig) -> None:
    script = "grep -c fuse /proc/filesystems"
    assert _said(rig, "plain", script) == ["0"]
    assert _said(rig, "mighty", script, Privileged=True)[0] != "0"
