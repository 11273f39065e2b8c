"""Engine, keeper and holder killed at will: workloads go on, nothing is lost, all is repaired."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import IMAGE, Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import DEADLINE_S, until
from tests.kernel.test_engine_run import REASON

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with residue(str(tmp_path)), rigs.engine(tmp_path) as made:
        rigs.load_busybox(made)
        yield made


def holder(rig: Rig) -> int:
    return int(rig.call("system.info")["Processes"]["Holder"])


def end(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        until(lambda: not os.path.exists(f"/proc/{pid}") or _zombie(pid), "it is dead")
    finally:
        os.close(handle)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


COUNT = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.02; done"


def complete(rig: Rig, name: str) -> int:
    """How far a counting workload has come; fails if a line is missing or twice."""
    lines = rigs.logs(rig, name).split()
    assert [int(line) for line in lines] == list(range(1, len(lines) + 1))
    return len(lines)


def test_workloads_outlive_a_killed_engine(rig: Rig) -> None:
    rigs.start(rig, "counter", COUNT)
    rigs.start(rig, "ends", "sleep 0.5; exit 7")
    pid = rigs.state(rig, "counter")["Pid"]
    rig.kill()
    rig.start()
    assert rigs.state(rig, "counter")["Pid"] == pid
    assert rig.call("workload.wait", id="ends") == {"StatusCode": 7}
    before = complete(rig, "counter")
    until(lambda: complete(rig, "counter") > before, "it goes on")
    assert rigs.execute(rig, "counter", ["echo", "in"]) == (0, b"in\n")
    rig.call("workload.stop", id="counter", timeout_s=0)
    assert rigs.state(rig, "counter")["ExitCode"] == 137


def test_an_end_nobody_saw_is_known_afterwards(rig: Rig, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.mkdir()
    script = "while ! [ -e /flag/go ]; do sleep 0.02; done; exit 5"
    rigs.start(rig, "seen", script, Binds=[f"{flag}:/flag"])
    rigs.start(rig, "gone", script, Binds=[f"{flag}:/flag"], AutoRemove=True)
    pids = [rigs.state(rig, name)["Pid"] for name in ("seen", "gone")]
    rig.kill()
    (flag / "go").touch()
    until(lambda: all(_zombie(pid) for pid in pids), "both have ended")
    rig.start()
    found = rigs.state(rig, "seen")
    assert (found["Status"], found["ExitCode"]) == ("exited", 5)
    names = [entry["Names"] for entry in rig.call("workload.list", all=True)]
    assert names == [["/seen"]]


def test_restart_policies_are_kept_by_the_next_engine(rig: Rig) -> None:
    rigs.start(rig, "again", "sleep 0.2; exit 1", RestartPolicy={"Name": "always"})
    rig.kill()
    rig.start()
    count = rig.call("workload.inspect", id="again")["RestartCount"]
    until(lambda: rig.call("workload.inspect", id="again")["RestartCount"] > count, "it restarts")


def test_a_killed_holder_is_replaced_and_its_workloads_watched(rig: Rig) -> None:
    rigs.start(rig, "counter", COUNT)
    rigs.start(rig, "coded", "trap 'exit 9' TERM; echo on; while true; do sleep 0.02; done")
    until(lambda: rigs.logs(rig, "coded") == b"on\n", "it is ready")
    first = holder(rig)
    end(first)
    for _ in range(3):
        assert rigs.run(rig, ["echo", "at once"]).out == b"at once\n"
    assert holder(rig) != first
    assert rigs.state(rig, "counter")["Running"]
    assert rigs.execute(rig, "counter", ["sh", "-c", "exit 4"])[0] == 4
    rig.call("workload.stop", id="coded", timeout_s=DEADLINE_S)
    # PIDFD_GET_INFO tells the code on kernels that have it; else it is said to be unknown.
    found = rigs.state(rig, "coded")
    assert found["ExitCode"] == 9 or (found["ExitCode"] == 255 and "unknown" in found["Error"])
    rig.call("workload.start", id="coded")
    assert rigs.state(rig, "coded")["Running"]


def test_engine_and_holder_killed_together(rig: Rig) -> None:
    rigs.start(rig, "counter", COUNT)
    pid, parent = rigs.state(rig, "counter")["Pid"], holder(rig)
    assert rig.process is not None
    os.kill(rig.process.pid, signal.SIGSTOP)
    end(parent)
    rig.kill()
    rig.start()
    assert rigs.state(rig, "counter")["Pid"] == pid
    assert rigs.run(rig, ["true"]).code == 0
    rig.call("workload.kill", id="counter")
    assert rig.call("workload.wait", id="counter")["StatusCode"] in {137, 255}
    rig.call("workload.start", id="counter")
    rig.call("workload.remove", id="counter", force=True)


def unwrite(rig: Rig, name: str) -> None:
    """Make the record of `name` what it was when the workload had just been created."""
    with contextlib.closing(sqlite3.connect(rig.root / "state.db")) as database, database:
        query = "SELECT document FROM workloads WHERE name=?"
        document = json.loads(database.execute(query, (name,)).fetchone()[0])
        for member in ("status", "pid", "started_ns", "finished_ns", "exit_code"):
            document.pop(member, None)
        database.execute(
            "UPDATE workloads SET status='created', document=? WHERE name=?",
            (json.dumps(document), name),
        )


@pytest.mark.parametrize("both", [False, True], ids=["engine", "engine and holder"])
def test_a_start_and_an_end_that_came_too_late_for_their_records(rig: Rig, both: bool) -> None:
    rigs.start(rig, "counter", COUNT)
    rigs.start(rig, "coded", "sleep 0.1; exit 6")
    rigs.start(rig, "ended", "exit 7")
    assert rig.call("workload.wait", id="ended") == {"StatusCode": 7}
    before, parent = rigs.state(rig, "counter"), holder(rig)
    ending = int(rigs.state(rig, "coded")["Pid"])
    assert rig.process is not None
    os.kill(rig.process.pid, signal.SIGSTOP)
    if ending:
        until(lambda: not os.path.exists(f"/proc/{ending}"), "the holder has reaped it")
    if both:
        end(parent)
    rig.kill()
    for name in ("counter", "coded", "ended"):
        unwrite(rig, name)
    rig.start()
    found = rigs.state(rig, "counter")
    assert (found["Pid"], found["Running"]) == (before["Pid"], True)
    assert rig.call("workload.wait", id="coded") == {"StatusCode": 6}
    assert rig.call("workload.wait", id="ended") == {"StatusCode": 7}
    rig.call("workload.remove", id="counter", force=True)


def test_a_half_done_removal_is_finished(rig: Rig) -> None:
    identity = rigs.start(rig, "victim", "sleep 1000")
    number = rig.rpc.start("workload.remove", {"id": "victim", "force": True})
    assert number
    rig.kill()
    rig.start()
    until(lambda: rig.call("workload.list", all=True) == [] or _stop(rig), "it is gone")
    for parent in (rig.root, rig.run):
        until(lambda parent=parent: not (parent / "workloads" / identity).exists(), "no files")  # type: ignore[misc]


def _stop(rig: Rig) -> bool:
    """The request may not have been read before the kill: then it is asked for again."""
    rig.call("workload.remove", id="victim", force=True)
    return False


def test_directories_and_volumes_of_nobody_are_removed(rig: Rig) -> None:
    rig.stop()
    for place in (rig.root / "workloads" / ("ab" * 32), rig.root / "volumes" / "stray"):
        (place / "deep").mkdir(parents=True)
    rig.start()
    assert os.listdir(rig.root / "workloads") == []
    assert os.listdir(rig.root / "volumes") == []


def test_two_engines_on_one_root_refuse_each_other(rig: Rig) -> None:
    second = subprocess.run(
        rig.command(), env=rig.environment(), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert second.returncode == 1
    assert second.stderr.startswith("bulkhead: another engine (process ")
    assert second.stderr.count("\n") == 1
    assert rig.call("system.ping")["pong"]


def test_a_stopped_engine_leaves_workloads_and_a_started_one_finds_them(rig: Rig) -> None:
    rigs.start(rig, "counter", COUNT)
    assert rig.stop() == 0
    rig.start()
    assert rigs.state(rig, "counter")["Running"]
    assert complete(rig, "counter") > 0
    rig.call("workload.create", name="idle", body={"Image": IMAGE})
    assert rigs.state(rig, "idle")["Status"] == "created"
