"""The file server of a real guest: its jail, its end, and the engine's."""

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.errors import Conflict, Unavailable, Unsupported
from tests.guest.test_sandbox import LACKING
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until

pytestmark = pytest.mark.skipif(
    bool(LACKING) or os.geteuid() != 0,
    reason=f"not installed: {', '.join(LACKING)}" if LACKING else "needs root",
)
ALLOWED = {"chown", "dac_override", "fowner", "fsetid", "setfcap"}
NUMBERS = {0: "chown", 1: "dac_override", 3: "fowner", 4: "fsetid", 31: "setfcap"}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("files")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


@pytest.fixture
def folder(rig: Rig) -> Iterator[Path]:
    path = rig.root.parent / "shared"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def _server(rig: Rig, name: str) -> int:
    """The process id of a workload's file server: it is in the workload's control group."""
    identity = rig.call("workload.inspect", id=name)["Id"]

    def find() -> int:
        for entry in filter(str.isdigit, os.listdir("/proc")):
            place = Path("/proc", entry)
            try:
                if (place / "comm").read_text() == "bulkhead-files\n" and (
                    identity in (place / "cgroup").read_text()
                ):
                    return int(entry)
            except OSError:
                continue
        return 0

    return until(find, "there is a file server")


def test_the_server_has_nothing_but_its_directories(rig: Rig, folder: Path) -> None:
    rigs.start(rig, "served", "sleep 1000", Binds=[f"{folder}:/data:ro"], boundary="sandbox")
    pid = _server(rig, "served")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        held = int(status[kind], 16)
        assert {NUMBERS.get(n, n) for n in range(64) if held >> n & 1} <= ALLOWED
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        own = os.readlink(f"/proc/self/ns/{kind}")
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != own
    root = Path(f"/proc/{pid}/root")
    assert os.listdir(root / "usr/bin") == ["bulkhead-files"]
    assert not (root / "etc").exists() and not (root / "sys").exists()
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    (options,) = (line[5].split(",") for line in mounts if line[4] == "/run/0")
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options)
    rig.call("workload.remove", id="served", force=True)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the server has ended")


def test_a_killed_server_ends_the_workload_in_words(rig: Rig, folder: Path) -> None:
    script = "echo begun; while :; do echo > /data/a; done"
    rigs.start(rig, "victim", script, Binds=[f"{folder}:/data"], boundary="sandbox")
    until(lambda: rigs.logs(rig, "victim") == b"begun\n", "it runs")
    os.kill(_server(rig, "victim"), signal.SIGKILL)
    rig.call("workload.wait", id="victim")
    assert rigs.state(rig, "victim")["ExitCode"] == 125
    assert b"the file server ended" in rigs.logs(rig, "victim")
    rig.call("workload.start", id="victim")
    until(lambda: rigs.logs(rig, "victim").count(b"begun\n") == 2, "it runs again")
    rig.call("workload.remove", id="victim", force=True)


def test_files_and_leases_survive_the_engine(rig: Rig) -> None:
    script = "echo one > /v/f; until [ -e /v/go ]; do sleep 0.05; done; cat /v/go; exec sleep 1000"
    rigs.start(rig, "staying", script, Binds=["stays:/v"], boundary="sandbox")
    place = rig.root / "volumes/stays/_data"
    until(lambda: (place / "f").exists(), "it has written")
    rig.kill()
    rig.start()
    with pytest.raises(Conflict, match="volume stays is written by staying"):
        rigs.run(rig, ["true"], Binds=["stays:/v"])
    (place / "go").write_text("still here\n")
    until(lambda: rigs.logs(rig, "staying") == b"still here\n", "it sees the file")
    rig.call("workload.remove", id="staying", force=True)
    assert rigs.run(rig, ["cat", "/v/f"], Binds=["stays:/v"]).out == b"one\n"
    rig.call("volume.remove", name="stays")


def test_a_disk_is_free_again_after_an_end_that_no_engine_saw(rig: Rig) -> None:
    rig.call("volume.create", Name="freed", DriverOpts={"size": "32m"})
    try:
        rigs.start(rig, "unseen", "echo x > /v/f; exec sleep 1000", Binds=["freed:/v"])
    except Unavailable as error:
        rig.call("workload.remove", id="unseen", force=True)
        pytest.skip(f"no loop devices here: {error}")
    pid = rigs.state(rig, "unseen")["Pid"]
    until(lambda: rigs.execute(rig, "unseen", ["cat", "/v/f"]) == (0, b"x\n"), "it has written")
    rig.kill()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), "it has ended")
    rig.start()
    done = rigs.run(rig, ["cat", "/v/f"], Binds=["freed:/v"], boundary="sandbox")
    assert done.out == b"x\n", done.err
    rig.call("workload.remove", id="unseen", force=True)
    rig.call("volume.remove", name="freed")


def test_restarts_have_their_files(rig: Rig, folder: Path) -> None:
    script = "echo x >> /data/starts; [ $(wc -l < /data/starts) = 4 ]"
    host = {"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 9}}
    rigs.start(rig, "again", script, Binds=[f"{folder}:/data"], boundary="sandbox", **host)
    until(lambda: rigs.state(rig, "again")["Status"] == "exited", "it has started four times")
    assert rigs.state(rig, "again")["ExitCode"] == 0
    assert (folder / "starts").read_text() == "x\n" * 4
    rig.call("workload.remove", id="again")


def test_large_files_come_whole(rig: Rig, folder: Path) -> None:
    data = os.urandom(1 << 20) * 24
    (folder / "in").write_bytes(data)
    done = rigs.run(
        rig,
        ["sh", "-ec", "cp /data/in /data/out; md5sum < /data/in"],
        Binds=[f"{folder}:/data"],
        boundary="sandbox",
    )
    assert done.out.split()[0].decode() == hashlib.md5(data).hexdigest(), done.err
    assert (folder / "out").read_bytes() == data


def test_a_socket_of_the_host_is_refused_in_words(rig: Rig) -> None:
    with pytest.raises(Unsupported, match="not sockets or devices"):
        rigs.run(rig, ["true"], Binds=[f"{rig.socket}:/s"], boundary="sandbox")
