"""Several workloads in one guest: what is each one's own, and what becomes of them."""

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.boundaries.guest import hotplug
from bulkhead.errors import Conflict, Unsupported
from tests.helpers import engine_rig as rigs
from tests.helpers import guest_kernel
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until

JOINED: dict[str, Any] = {"NetworkMode": "container:first"}


def _missing(boundary: str) -> str:
    if os.geteuid() != 0:
        return "needs root"
    wanted = ["mke2fs", "busybox", *(["linux.uml"] if boundary == "sandbox" else [])]
    lacking = [name for name in wanted if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    return guest_kernel.missing() if boundary == "microvm" else ""


@pytest.fixture(scope="module", params=["sandbox", "microvm"])
def boundary(request: pytest.FixtureRequest) -> str:
    reason = _missing(request.param)
    if reason:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(scope="module")
def rig(boundary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp(f"pods-{boundary}")
    if boundary == "microvm":
        guest_kernel.provide(directory / "root")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


@pytest.fixture
def first(rig: Rig, boundary: str) -> Iterator[str]:
    identity = rigs.start(rig, "first", "sleep 1000", boundary=boundary)
    yield identity
    for one in rig.call("workload.list", all=True):
        rig.call("workload.remove", id=one["Id"], force=True, volumes=True)


def _taken(rig: Rig, identity: str) -> set[str]:
    """Who has disks in the guest."""
    path = rig.run / "workloads" / identity / "guest" / hotplug.NAME
    found = json.loads(path.read_text())
    return {owner for owner, _ in found.values() if owner}


def test_each_has_its_files_limits_logs_and_end(
    rig: Rig, boundary: str, first: str, tmp_path: Path
) -> None:
    (tmp_path / "note").write_text("from the host\n")
    script = "cat /host/note; echo back > /host/answer; test -e /own || echo mine > /own; "
    script += "exec sleep 1000"
    other = rigs.start(
        rig, "other", script, boundary=boundary,
        Binds=[f"{tmp_path}:/host"], Memory=64 << 20, PidsLimit=50, **JOINED,
    )  # fmt: skip
    until(lambda: rigs.execute(rig, "other", ["cat", "/own"])[1] == b"mine\n", "it has begun")
    until(lambda: rigs.logs(rig, "other") == b"from the host\n", "it has said so")
    assert (tmp_path / "answer").read_text() == "back\n"
    code, told = rigs.execute(rig, "other", ["sh", "-c", "cat /sys/fs/cgroup/*.max; cat /own"])
    assert (code, b"67108864" in told, b"50\n" in told, b"mine" in told) == (0, True, True, True)
    assert rigs.execute(rig, "first", ["cat", "/own"])[0] == 1
    listed = [row[-1] for row in rig.call("workload.top", id="other")["Processes"]]
    assert len(listed) == 1
    rig.call("workload.pause", id="other")
    assert rigs.execute(rig, "first", ["true"])[0] == 0
    rig.call("workload.unpause", id="other")
    rig.call("workload.update", id="other", body={"Memory": 48 << 20})
    assert b"50331648" in rigs.execute(rig, "other", ["cat", "/sys/fs/cgroup/memory.max"])[1]
    rig.call("workload.kill", id="other", signal="SIGKILL")
    assert rig.call("workload.wait", id="other", condition="not-running")["StatusCode"] == 137
    until(lambda: other not in _taken(rig, first), "its disks are out of the guest")
    rig.call("workload.start", id="other")
    assert rigs.execute(rig, "other", ["cat", "/own"])[1] == b"mine\n"


def test_they_end_with_the_guest_and_keep_what_they_wrote(
    rig: Rig, boundary: str, first: str
) -> None:
    script = "test -e /file || echo kept > /file; sleep 1000"
    rigs.start(rig, "other", script, boundary=boundary, **JOINED)
    until(lambda: rigs.execute(rig, "other", ["cat", "/file"])[1] == b"kept\n", "it has written")
    rig.call("workload.stop", id="first", timeout_s=0)
    assert rig.call("workload.wait", id="other", condition="not-running")["StatusCode"] == 137
    with pytest.raises(Conflict, match="cannot join network of a non running container"):
        rig.call("workload.start", id="other")
    rig.call("workload.start", id="first")
    rig.call("workload.start", id="other")
    assert rigs.execute(rig, "other", ["cat", "/file"])[1] == b"kept\n"


def test_a_kill_of_its_client_leaves_nothing_in_the_guest(
    rig: Rig, boundary: str, first: str
) -> None:
    other = rigs.start(rig, "other", "sleep 1000", boundary=boundary, **JOINED)
    os.kill(rigs.state(rig, "other")["Pid"], 9)
    assert rig.call("workload.wait", id="other", condition="not-running")["StatusCode"] == 137
    until(lambda: other not in _taken(rig, first), "its disks are out of the guest")
    listed = rigs.execute(rig, "first", ["sh", "-c", "ls /sys/fs/cgroup; ps | grep -c sleep"])[1]
    assert b"member" not in listed
    rig.call("workload.start", id="other")
    assert rigs.execute(rig, "other", ["true"])[0] == 0


def test_an_engine_that_comes_back_knows_them(rig: Rig, boundary: str, first: str) -> None:
    other = rigs.start(rig, "other", "sleep 1000", boundary=boundary, **JOINED)
    rig.kill()
    rig.start()
    assert rigs.execute(rig, "other", ["true"])[0] == 0
    rig.call("workload.stop", id="other", timeout_s=0)
    until(lambda: other not in _taken(rig, first), "its disks are out of the guest")


def test_a_volume_is_the_same_for_all(rig: Rig, boundary: str, first: str) -> None:
    rig.call("workload.remove", id="first", force=True)
    binds: dict[str, Any] = {"Binds": ["pool:/pool"]}
    rigs.start(rig, "first", "sleep 1000", boundary=boundary, **binds)
    rigs.start(rig, "other", "echo one > /pool/a; sleep 1000", boundary=boundary, **binds, **JOINED)
    read = functools.partial(rigs.execute, rig, "first", ["cat", "/pool/a"])
    until(lambda: read()[1] == b"one\n", "seen at once")
    rigs.execute(rig, "first", ["sh", "-c", "echo two > /pool/a"])
    assert rigs.execute(rig, "other", ["cat", "/pool/a"])[1] == b"two\n"


def test_what_cannot_join_is_told(rig: Rig, boundary: str, first: str) -> None:
    with pytest.raises(Unsupported, match="no other workload can join"):
        rigs.start(rig, "plain", "true", **JOINED)
    with pytest.raises(Unsupported, match="is not possible behind"):
        rigs.start(rig, "odd", "true", boundary=boundary, PidMode="container:first")
