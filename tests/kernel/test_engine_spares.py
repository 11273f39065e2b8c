"""What the engine makes before it is needed: used by a start, gone when it cannot be."""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator

import pytest

from bulkhead.isolation.cgroups import manager as cgroups
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import IMAGE, Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until
from tests.kernel.test_engine_run import REASON

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("engine")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


def _run(rig: Rig) -> None:
    """A start after which there are spares like it, some time."""
    body = {"Image": IMAGE, "Cmd": ["true"], "HostConfig": {"AutoRemove": True}}
    assert rig.call("workload.run", body=body)["StatusCode"] == 0
    until(lambda: _spares(rig), "there are spares")


def _spares(rig: Rig) -> set[str]:
    """Directories of no workload."""
    known = {one["Id"] for one in rig.call("workload.list", all=True)}
    return set(os.listdir(rig.root / "workloads")) - known


def _create(rig: Rig, *command: str, **host: object) -> str:
    body = {"Image": IMAGE, "Cmd": list(command), "HostConfig": host}
    identity: str = rig.call("workload.create", body=body)["Id"]
    return identity


def _groups(identity: str) -> list[str]:
    found = []
    for parent, folders, _ in os.walk("/sys/fs/cgroup"):
        found += [f"{parent}/{name}" for name in folders if name == identity]
    return found


def test_a_created_workload_that_is_never_started_leaves_no_group(rig: Rig) -> None:
    _run(rig)
    identity = _create(rig, "true")
    rig.call("workload.remove", id=identity)
    until(lambda: not _groups(identity), "its control group is gone")
    assert not os.path.exists(rig.root / "workloads" / identity)


def test_files_copied_in_before_the_first_start_are_there(rig: Rig) -> None:
    _run(rig)
    identity = _create(rig, "cat", "/given")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo("given")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"text\n"))
    read, write = os.pipe()
    os.write(write, stream.getvalue())
    os.close(write)
    try:
        rig.call("workload.archive_put", [read], id=identity, path="/")
    finally:
        os.close(read)
    rig.call("workload.start", id=identity)
    assert rig.call("workload.wait", id=identity)["StatusCode"] == 0
    assert rigs.logs(rig, identity) == b"text\n"
    rig.call("workload.remove", id=identity)


def test_limits_are_applied_to_a_group_from_stock(rig: Rig) -> None:
    _run(rig)
    identity = _create(rig, "sleep", "3600", Memory=64 << 20, PidsLimit=50)
    rig.call("workload.start", id=identity)
    path = f"/bulkhead-{hashlib.sha256(str(rig.root).encode()).hexdigest()[:8]}/{identity}"
    files = cgroups.detect().open(path).files()
    memory = "memory.limit_in_bytes" if cgroups.detect().version == 1 else "memory.max"
    assert (files["pids.max"], files[memory]) == ("50", str(64 << 20))
    rig.call("workload.remove", id=identity, force=True)


def test_a_workload_with_rm_can_be_restarted(rig: Rig) -> None:
    """Its overlay is volatile: the kernel's mark of that must not stand in the way."""
    _run(rig)
    identity = _create(rig, "sh", "-c", "echo x >> /kept; sleep 3600", AutoRemove=True)
    rig.call("workload.start", id=identity)
    for times in (1, 2):
        until(
            lambda lines=b"x\n" * times: (  # type: ignore[misc]
                rigs.execute(rig, identity, ["cat", "/kept"]) == (0, lines)
            ),
            "it has run so often",
        )
        if times == 1:
            rig.call("workload.restart", id=identity, timeout_s=0)
    rig.call("workload.remove", id=identity, force=True)


def test_spares_serve_workloads_with_a_user_namespace(rig: Rig) -> None:
    _run(rig)
    for _ in range(3):
        done = rigs.run(rig, ["id", "-u"], UsernsMode="auto")
        assert (done.code, done.out) == (0, b"0\n")
        until(lambda: _spares(rig), "there are spares")


_LOOK = (
    "ls -lan /dev /dev/pts /dev/shm /dev/mqueue | grep -v extra | awk '{print $1,$3,$4,$NF}'; "
    "grep ' /dev' /proc/mounts | sort; head -c 3 /dev/zero | wc -c; echo x >/dev/shm/x && echo fine"
)


def test_dev_from_the_reserve_is_what_a_child_would_make(rig: Rig) -> None:
    """One with a device of its own is not from the reserve."""
    device = {"PathOnHost": "/dev/null", "PathInContainer": "/dev/extra", "CgroupPermissions": "r"}
    seen = []
    for devices in ([device], []):
        _run(rig)
        body = {"Image": IMAGE, "Cmd": ["sh", "-c", _LOOK], "HostConfig": {"Devices": devices}}
        made = rig.call("workload.create", body=body)["Id"]
        rig.call("workload.start", id=made)
        assert rig.call("workload.wait", id=made)["StatusCode"] == 0
        text = rigs.logs(rig, made).decode()
        seen.append([line for line in text.splitlines() if not line.startswith("total")])
        rig.call("workload.remove", id=made)
    assert "fine" in seen[0]
    assert seen[0] == seen[1]
