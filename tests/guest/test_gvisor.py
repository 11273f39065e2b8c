"""gVisor as the sandbox's kernel, beyond what holds on every boundary."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundaries import gvisor
from bulkhead.boundaries.guest import kernels
from bulkhead.errors import (
    CommandNotExecutable,
    CommandNotFound,
    Invalid,
    LaunchFailed,
    Unsupported,
)
from bulkhead.home import Home
from bulkhead.linux import procfs
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until

BOUNDARY = "sandbox:gvisor"
REASON = "" if shutil.which("runsc") else f"runsc is not installed ({gvisor.REMEDY})"
if os.geteuid() != 0:
    REASON = "needs root"

needs_runsc = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("engine")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


@needs_runsc
def test_it_is_another_kernel(rig: Rig) -> None:
    done = rigs.run(rig, ["uname", "-r"], boundary=BOUNDARY)
    assert done.code == 0
    assert done.out.decode().strip() != os.uname().release
    assert rig.call("workload.list", all=True) == []


@needs_runsc
def test_volumes_and_binds_are_served(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    script = (
        "cat /bind/in; echo there > /bind/out; echo kept > /data/file; cp /bind/in /ro || echo no"
    )
    binds = [f"{tmp_path}:/bind", "gv-data:/data", f"{tmp_path}:/ro:ro"]
    done = rigs.run(rig, ["sh", "-c", script], boundary=BOUNDARY, Binds=binds)
    assert done.out == b"from the host\nno\n"
    assert (tmp_path / "out").read_text() == "there\n"
    again = rigs.run(rig, ["cat", "/data/file"], Binds=["gv-data:/data"])
    assert again.out == b"kept\n"
    rig.call("volume.remove", name="gv-data")


@needs_runsc
def test_the_sentry_has_no_powers_and_an_empty_root(rig: Rig) -> None:
    identity = rigs.start(rig, "walled", "sleep 1000", boundary=BOUNDARY)
    pid = rig.call("workload.inspect", id=identity)["State"]["Pid"]
    found = [one for one in _below(pid) if b"boot" in _line(one)]
    assert found, [_line(one) for one in _below(pid)]
    status = procfs.status(found[0])
    assert int(status["CapEff"], 16) == 0 or os.readlink(f"/proc/{found[0]}/ns/user") != _user(pid)
    assert status["Seccomp"] == "2"
    assert set(os.listdir(f"/proc/{found[0]}/root")) <= {"proc", "etc"}
    assert set(os.listdir(f"/proc/{pid}/root")) <= {
        "dev", "disks", "etc", "lib", "lib64", "proc", "run", "sys", "tmp", "usr",
    }  # fmt: skip
    rig.call("workload.remove", id=identity, force=True)


def _user(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/user")


def _line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _below(pid: int) -> list[int]:
    """The processes in the same PID namespace."""
    own = os.readlink(f"/proc/{pid}/ns/pid_for_children")
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and os.readlink(f"/proc/{name}/ns/pid") == own:
                found.append(int(name))
        except OSError:
            continue
    return found


@needs_runsc
def test_a_killed_sentry_ends_its_workload_alone(rig: Rig) -> None:
    doomed = rigs.start(rig, "doomed", "sleep 1000", boundary=BOUNDARY)
    spared = rigs.start(rig, "spared", "sleep 1000", boundary=BOUNDARY)
    pid = rig.call("workload.inspect", id=doomed)["State"]["Pid"]
    os.kill(next(one for one in _below(pid) if b"boot" in _line(one)), 9)
    until(lambda: not rigs.state(rig, "doomed")["Running"], "it has ended")
    assert rigs.execute(rig, "spared", ["echo", "still here"]) == (0, b"still here\n")
    for identity in (doomed, spared):
        rig.call("workload.remove", id=identity, force=True)


@needs_runsc
def test_what_it_cannot_do_is_refused_in_words(rig: Rig) -> None:
    for host, word in (
        ({"Privileged": True}, "--privileged"),
        ({"Sysctls": {"net.ipv4.ip_forward": "1"}}, "--sysctl"),
        ({"StorageOpt": {"size": "1g"}}, "--storage-opt"),
    ):
        with pytest.raises(Unsupported, match=word):
            rigs.run(rig, ["true"], boundary=BOUNDARY, **host)
    with pytest.raises(Invalid, match="--kernel gvisor is for the boundary sandbox"):
        rigs.run(rig, ["true"], boundary="microvm:gvisor")


@needs_runsc
def test_it_is_listed_among_the_kernels(tmp_path: Path) -> None:
    (found,) = [
        k for k in kernels.kernels(Home(str(tmp_path), str(tmp_path))) if k.name == "gvisor"
    ]
    assert found.kind == "gvisor"
    assert found.release


def test_without_runsc_the_command_that_adds_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="not installed: apt-get install runsc"):
        kernels.find(Home(str(tmp_path), str(tmp_path)), "gvisor")


@pytest.mark.parametrize(
    ("log", "kind", "words"),
    [
        ('{"level":"error","msg":"x: failed to load /a: no such file or directory"}',
         CommandNotFound, "stat /a: no such file"),
        ('{"level":"error","msg":"error finding executable \\"a\\" in PATH []: no such file"}',
         CommandNotFound, 'exec: "/a": executable file not found'),
        ('{"level":"info","msg":"x"}{"level":"error","msg":"failed to load /a: permission denied"}',
         CommandNotExecutable, "permission denied"),
        ('{"level":"error","msg":"no room"}garbage', LaunchFailed, "gVisor: no room"),
    ],
)  # fmt: skip
def test_what_runsc_says_becomes_the_error(
    tmp_path: Path, log: str, kind: type[LaunchFailed], words: str
) -> None:
    (tmp_path / "log").write_text(log)
    found = gvisor.failure(str(tmp_path / "log"), "/a")
    assert type(found) is kind
    assert words in str(found)
    assert gvisor.failure(str(tmp_path / "none"), "/a") is None
