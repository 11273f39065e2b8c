"""One suite for the seam: what is promised of a workload holds behind every boundary.

A boundary that cannot run here is skipped with the reason that its own report gives. Each test is
one row, each boundary one column.
"""

import contextlib
import functools
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.boundaries.gvisor import GvisorBoundary
from bulkhead.boundary import registry
from bulkhead.boundary.seam import Measured, Pausable, Report, Updatable
from bulkhead.errors import (
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    NotFound,
    Unsupported,
)
from bulkhead.home import Home
from bulkhead.linux import loop
from tests.guest.archives import fetch, send
from tests.helpers import engine_rig as rigs
from tests.helpers import guest_kernel, images
from tests.helpers.engine_rig import IMAGE, Outcome, Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until

PROTOCOLS = {"pausable": Pausable, "updatable": Updatable, "measured": Measured}
BIG = 3 << 20
CONFINED = "CapBnd|NoNewPrivs|Seccomp:"


GVISOR = "sandbox:gvisor"
"""The sandbox boundary with its second kernel: a column of its own."""
KERNELS = frozenset({"microvm", "vm"})
"""Boundaries that boot the distribution's cloud kernel."""
COLUMNS = (*registry.names(), GVISOR)

_NOT_IN_GVISOR = {
    "test_capabilities_and_filter_confine_it": "its /proc/self/status shows no filter",
    "test_kernel_settings_and_limits": "it has no kernel settings: --sysctl is refused",
    "test_too_many_tasks_are_refused": "--pids-limit counts the host's threads, not its tasks",
    "test_its_processes_are_listed": "its processes are its own: top is refused",
    "test_a_privileged_one_may_mount": "--privileged is refused",
    "test_networks_change_while_it_runs": "its interfaces are those of its start",
    "test_several_share_network_processes_and_memory": "a kernel of its own for each workload",
    "test_what_the_host_changes_is_seen": "what it has cached of a file may be seen beside the new",
}
ON_A_PC = frozenset({
    "test_output_and_exit_code", "test_exec", "test_a_terminal_has_its_size_and_is_one",
    "test_stop_kill_and_exit_codes", "test_they_find_and_reach_each_other_by_name",
    "test_a_volume_keeps_its_files", "test_an_image_of_a_hundred_layers",
    "test_a_report_says_what_is_there",
})  # fmt: skip
"""Rows that another machine could change: run on vm always, the others with EVERYTHING."""
EVERYTHING = os.environ.get("BULKHEAD_CONFORMANCE") == "all"
_NOT_ON_A_PC = {
    "test_networks_change_while_it_runs": "its cards are those of its start",
    "test_several_share_network_processes_and_memory": "its disks are those of its start",
}
BLANKS = {(GVISOR, test): f"gVisor: {reason}" for test, reason in _NOT_IN_GVISOR.items()} | {
    ("vm", test): f"a whole machine: {reason}" for test, reason in _NOT_ON_A_PC.items()
}
"""Column and test: why it cannot hold there."""


def _unusable(name: str) -> str:
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("busybox") is None:
        return "busybox-static is not installed"
    home = Home("/nonexistent", "/nonexistent")
    if name in KERNELS:
        reason = guest_kernel.missing()
        if reason:
            return reason
        home = Home(str(guest_kernel.CACHE), str(guest_kernel.CACHE))
    services = registry.Services(home, None)  # type: ignore[arg-type]
    report = probe(name, services)
    if report.usable:
        return ""
    return "; ".join(f"{one.what} is missing ({one.remedy})" for one in report.missing)


def probe(column: str, services: registry.Services) -> Report:
    """What the boundary, or its second kernel, says of itself."""
    if column == GVISOR:
        return GvisorBoundary(services).probe()
    return registry.boundary(column, services).probe()


@pytest.fixture(autouse=True)
def blank(request: pytest.FixtureRequest, boundary: str) -> None:
    reason = BLANKS.get((boundary, request.node.originalname))
    if reason:
        pytest.skip(reason)
    if boundary == "vm" and not EVERYTHING and request.node.originalname not in ON_A_PC:
        pytest.skip("microvm's column has it: the same init, protocol and jail on a slower machine")


@pytest.fixture(scope="module", params=COLUMNS)
def boundary(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = _unusable(name)
    if reason:
        pytest.skip(reason)
    return name


@pytest.fixture(scope="module")
def rig(boundary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp(boundary.replace(":", "-"))
    if boundary in KERNELS:
        guest_kernel.provide(directory / "root")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


Run = Callable[..., Outcome]
Start = Callable[..., str]


@pytest.fixture
def run(rig: Rig, boundary: str) -> Run:
    return lambda command, **more: rigs.run(rig, command, boundary=boundary, **more)


@pytest.fixture
def start(rig: Rig, boundary: str) -> Iterator[Start]:
    """Detached workloads by name and script; removed after the test."""
    made: list[str] = []

    def begin(name: str, script: str, **more: Any) -> str:
        made.append(name)
        return rigs.start(rig, name, script, **{"boundary": boundary, **more})

    yield begin
    for name in made:
        with contextlib.suppress(NotFound):
            rig.call("workload.remove", id=name, force=True, volumes=True)


def say(rig: Rig, name: str) -> str:
    return rigs.logs(rig, name).decode()


# --- run -----------------------------------------------------------------------------------------


def test_output_and_exit_code(run: Run, rig: Rig) -> None:
    done = run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.code, done.out, done.err) == (7, b"out\n", b"err\n")
    assert rig.call("workload.list", all=True) == []


def test_a_signal_gives_128_plus_its_number(run: Run) -> None:
    assert run(["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"]).code == 143


def test_standard_input_reaches_it_and_ends(run: Run) -> None:
    done = run(["sh", "-c", "cat; echo end"], stdin=b"one\ntwo\n")
    assert (done.code, done.out) == (0, b"one\ntwo\nend\n")


def test_bytes_arrive_as_they_were_sent(run: Run) -> None:
    everything = bytes(range(256)) * 64
    assert run(["cat"], stdin=everything).out == everything


def test_much_output_arrives_whole(run: Run) -> None:
    done = run(["sh", "-c", f"head -c {BIG} /dev/zero; echo end >&2"])
    assert (len(done.out), done.out.count(0), done.err) == (BIG, BIG, b"end\n")


def test_what_cannot_be_run_is_named(run: Run, rig: Rig) -> None:
    with pytest.raises(CommandNotFound, match=r'"nosuch": executable file not found in \$PATH'):
        run(["nosuch"])
    with pytest.raises(CommandNotFound, match=r"stat /no/such: no such file or directory"):
        run(["/no/such"])
    with pytest.raises(CommandNotExecutable, match="permission denied"):
        run(["/etc"])
    assert rig.call("workload.list", all=True) == []


def test_environment_user_directory_and_host_name(run: Run) -> None:
    config = {"Env": ["A=b c"], "User": "1000:1000", "WorkingDir": "/var/deep/er"}
    config["Hostname"] = "box"
    done = run(["sh", "-c", 'echo "$A"; id -u; id -g; pwd; hostname'], config=config)
    assert done.out.decode().splitlines() == ["b c", "1000", "1000", "/var/deep/er", "box"]


def test_capabilities_and_filter_confine_it(run: Run) -> None:
    done = run(
        ["sh", "-c", f"grep -E '{CONFINED}' /proc/self/status; mount -t tmpfs x /tmp"],
        CapDrop=["ALL"],
        SecurityOpt=["no-new-privileges"],
    )  # fmt: skip
    words = done.out.decode().split()
    assert words[:6] == ["CapBnd:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]
    assert done.code != 0


def test_read_only_root_and_tmpfs(run: Run) -> None:
    done = run(
        ["sh", "-c", "touch /x 2>/dev/null || echo no; touch /scratch/x && echo yes"],
        ReadonlyRootfs=True,
        Tmpfs={"/scratch": "size=1m"},
    )
    assert done.out == b"no\nyes\n"


def test_kernel_settings_and_limits(run: Run) -> None:
    done = run(
        ["sh", "-c", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni; ulimit -n"],
        Sysctls={"net.ipv4.ip_forward": "1", "kernel.shmmni": "77"},
        Ulimits=[{"Name": "nofile", "Soft": 200, "Hard": 200}],
    )
    assert done.out.split() == [b"1", b"77", b"200"]


def test_too_many_tasks_are_refused(run: Run) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 30 & done; echo started"
    done = run(["sh", "-c", script], PidsLimit=6)
    assert b"started" not in done.out or b"fork" in done.err


def test_memory_is_limited(run: Run, rig: Rig) -> None:
    done = run(["sh", "-c", "x=a; while :; do x=$x$x; done"], Memory=96 << 20)
    assert done.code != 0
    assert run(["echo", "well"]).out == b"well\n"


# --- terminals -----------------------------------------------------------------------------------


def test_a_terminal_has_its_size_and_is_one(rig: Rig, boundary: str) -> None:
    body = {
        "Image": IMAGE,
        "Cmd": ["sh", "-c", "test -t 0 && test -t 1 && stty size; read x; stty size; echo got $x"],
        "Tty": True, "OpenStdin": True, "StdinOnce": True,
        "AttachStdin": True, "AttachStdout": True,
        "HostConfig": {"AutoRemove": True},
    }  # fmt: skip
    ours, theirs = socket.socketpair()
    ours.settimeout(rigs.DEADLINE_S)
    with ours, rigs.Rpc(rig.socket) as rpc:
        with theirs:
            number = rpc.start(
                "workload.run",
                {
                    "body": body, "boundary": boundary.partition(":")[0],
                    "kernel": boundary.partition(":")[2], "attach": [True, True, False],
                    "tty": True, "rows": 33, "columns": 77,
                },
                [theirs.fileno(), theirs.fileno()],
            )  # fmt: skip
        frames = rpc.frames(number)
        identity = next(frames)["Id"]
        seen = _until(ours, b"33 77\r\n")
        until(lambda: rigs.state(rig, identity)["Running"], "the engine knows that it runs")
        rig.call("workload.resize", id=identity, rows=20, columns=40)
        _until_size(rig, identity, "20 40")
        ours.sendall(b"word\n")
        seen += _until(ours, b"got word")
        assert b"20 40" in seen
        with pytest.raises(StopIteration) as end:
            while True:
                next(frames)
        assert end.value.value["StatusCode"] == 0


def _until(stream: socket.socket, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        data = stream.recv(4096)
        assert data, f"ended after {seen!r}"
        seen += data
    return seen


def _until_size(rig: Rig, identity: str, size: str) -> None:
    """The terminal inside, asked by another process, has the size."""
    script = "stty size < /proc/1/fd/0"
    until(
        lambda: size.encode() in rigs.execute(rig, identity, ["sh", "-c", script])[1],
        f"the size is {size}",
    )


# --- further processes ---------------------------------------------------------------------------


def test_exec(rig: Rig, start: Start) -> None:
    start("main", "sleep 1000")
    code, out = rigs.execute(rig, "main", ["sh", "-c", "echo $$ $0; id -un; exit 5"], User="alice")
    assert (code, out.split()[-1]) == (5, b"alice")
    assert b"sleep" in rigs.execute(rig, "main", ["cat", "/proc/1/cmdline"])[1]
    with pytest.raises(CommandNotFound, match="nosuch"):
        rigs.execute(rig, "main", ["nosuch"])


def test_many_at_once(rig: Rig, start: Start) -> None:
    start("busy", "sleep 1000")
    results: list[tuple[int, bytes]] = []

    def one(number: int) -> None:
        script = f"head -c 100000 /dev/zero; exit {number}"
        results.append(rigs.execute(rig, "busy", ["sh", "-c", script]))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(code for code, _ in results) == list(range(8))
    assert {len(out) for _, out in results} == {100000}


# --- life ----------------------------------------------------------------------------------------


def test_stop_kill_and_exit_codes(rig: Rig, start: Start) -> None:
    start("polite", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: "up" in say(rig, "polite"), "it runs")
    rig.call("workload.stop", id="polite", timeout_s=60)
    assert rigs.state(rig, "polite")["ExitCode"] == 3
    assert say(rig, "polite") == "up\nbye\n"
    start("stubborn", "sleep 1000")
    rig.call("workload.kill", id="stubborn", signal="KILL")
    rig.call("workload.wait", id="stubborn")
    assert rigs.state(rig, "stubborn")["ExitCode"] == 137


def test_what_was_written_outlives_a_restart(rig: Rig, start: Start) -> None:
    start("kept", "echo $(($(cat /count 2>/dev/null || echo 0)+1)) > /count; cat /count; sleep 999")
    until(lambda: say(rig, "kept") == "1\n", "the first run has written")
    rig.call("workload.restart", id="kept", timeout_s=0)
    until(lambda: say(rig, "kept") == "1\n2\n", "the second run has read it")


def test_a_failing_workload_is_restarted(rig: Rig, start: Start) -> None:
    policy = {"Name": "on-failure", "MaximumRetryCount": 2}
    start("failing", "echo try; exit 1", RestartPolicy=policy)
    until(lambda: rigs.state(rig, "failing")["Status"] == "exited", "it has given up")
    assert say(rig, "failing") == "try\n" * 3


def test_pause_and_unpause(rig: Rig, start: Start) -> None:
    start("frozen", "while :; do echo .; sleep 0.05; done")
    until(lambda: say(rig, "frozen"), "it writes")
    rig.call("workload.pause", id="frozen")
    assert rigs.state(rig, "frozen")["Status"] == "paused"
    rig.call("workload.unpause", id="frozen")
    before = len(say(rig, "frozen"))
    until(lambda: len(say(rig, "frozen")) > before, "it writes again")


def test_health(rig: Rig, start: Start) -> None:
    check = {"Test": ["CMD-SHELL", "test -e /healthy"], "Interval": 10**8, "Retries": 1}
    start("checked", "touch /healthy; sleep 1000", config={"Healthcheck": check})
    until(lambda: rigs.state(rig, "checked")["Health"]["Status"] == "healthy", "it is healthy")


def test_stats_and_inspect(rig: Rig, start: Start, boundary: str) -> None:
    start("seen", "sleep 1000")
    items, _ = rig.rpc.stream("workload.stats", {"id": "seen", "stream": False, "one_shot": True})
    assert items[0]["memory_stats"]["usage"] > 0
    assert items[0]["cpu_stats"]["cpu_usage"]["total_usage"] > 0
    name = boundary.partition(":")[0]
    assert rig.call("workload.inspect", id="seen")["Boundary"] == name
    (found,) = rig.call("workload.list", filters={"boundary": [name]})
    assert found["Boundary"] == name


def test_the_engine_may_be_killed(rig: Rig, start: Start) -> None:
    start("alone", "echo one; while ! test -e /go; do sleep 0.05; done; echo two; exit 9")
    until(lambda: say(rig, "alone") == "one\n", "it runs")
    rig.kill()
    rig.start()
    assert rigs.state(rig, "alone")["Status"] == "running"
    assert rigs.execute(rig, "alone", ["touch", "/go"])[0] == 0
    rig.call("workload.wait", id="alone")
    assert rigs.state(rig, "alone")["ExitCode"] == 9
    assert say(rig, "alone") == "one\ntwo\n"


# --- files from outside --------------------------------------------------------------------------


def _cp_both_ways(rig: Rig, name: str) -> None:
    data = os.urandom(300_000)
    send(rig, name, "/srv", images.tar_of({"in/a": data, "in/b": b"bee"}))
    found = fetch(rig, "workload.archive_get", id=name, path="/srv/in")
    assert found["in"][0].isdir()
    assert found["in/a"][1] == data
    assert found["in/b"][1] == b"bee"
    shown = rig.call("workload.archive_stat", id=name, path="/srv/link")
    assert (shown["name"], shown["linkTarget"]) == ("link", "/srv/in/a")
    with pytest.raises(NotFound, match="Could not find the file /none"):
        rig.call("workload.archive_stat", id=name, path="/none")


def test_files_are_copied_in_and_out(rig: Rig, start: Start) -> None:
    start("copied", "mkdir -p /srv; ln -s in/a /srv/link; touch /ready; sleep 1000")
    until(lambda: rigs.execute(rig, "copied", ["test", "-e", "/ready"])[0] == 0, "it is ready")
    _cp_both_ways(rig, "copied")
    assert rigs.execute(rig, "copied", ["cat", "/srv/in/b"])[1] == b"bee"
    rig.call("workload.kill", id="copied", signal="KILL")
    rig.call("workload.wait", id="copied")
    found = fetch(rig, "workload.archive_get", id="copied", path="/srv/in/b")
    assert found["b"][1] == b"bee"
    send(rig, "copied", "/srv", images.tar_of({"later": b"while it stood still"}))
    rig.call("workload.start", id="copied")
    assert rigs.execute(rig, "copied", ["cat", "/srv/later"])[1] == b"while it stood still"


def test_changes_export_and_commit(rig: Rig, start: Start, run: Run) -> None:
    start("changed", "echo new > /new; rm /etc/group; mkdir /d; touch /d/f; touch /ok; sleep 1000")
    until(lambda: rigs.execute(rig, "changed", ["test", "-e", "/ok"])[0] == 0, "it has written")
    found = {(one["Kind"], one["Path"]) for one in rig.call("workload.changes", id="changed")}
    wanted = {(1, "/new"), (2, "/etc/group"), (0, "/etc"), (1, "/d"), (1, "/d/f"), (1, "/ok")}
    assert found == wanted
    exported = fetch(rig, "workload.export", id="changed")
    assert exported["new"][1] == b"new\n"
    assert "etc/group" not in exported
    assert "bin/busybox" in exported
    image = rig.call("workload.commit", id="changed", repo="changed", tag="1")["Id"]
    done = run(["sh", "-c", "cat /new; ls /d; ls /etc/group"], config={"Image": image})
    assert done.out == b"new\nf\n"
    assert b"No such file" in done.err
    assert rigs.execute(rig, "changed", ["echo", "goes on"])[1] == b"goes on\n"


def test_its_size_is_counted(rig: Rig, start: Start) -> None:
    start("large", "head -c 3000000 /dev/urandom > /data; sync; touch /done; sleep 1000")
    until(lambda: rigs.execute(rig, "large", ["test", "-e", "/done"])[0] == 0, "it has written")
    until(lambda: rig.call("workload.inspect", id="large", size=True)["SizeRw"] >= 3_000_000, "rw")
    (one,) = [c for c in rig.call("system.df")["Containers"] if c["Names"] == ["/large"]]
    assert one["SizeRw"] >= 3_000_000


# --- processes and limits ------------------------------------------------------------------------


def test_its_processes_are_listed(rig: Rig, start: Start) -> None:
    start("listed", "sleep 1234 & sleep 4321")

    def commands() -> set[str]:
        shown = rig.call("workload.top", id="listed", ps_args="-o pid,user,cmd")
        return {row[2] for row in shown["Processes"]}

    until(lambda: {"sleep 1234", "sleep 4321"} <= commands(), "both are there")
    assert rig.call("workload.top", id="listed")["Titles"][:3] == ["UID", "PID", "PPID"]


def test_an_init_reaps_and_passes_signals_on(rig: Rig, start: Start) -> None:
    start("reaped", "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done", Init=True)
    until(lambda: say(rig, "reaped") == "up\n", "it runs")
    assert b"/dev/init" in rigs.execute(rig, "reaped", ["cat", "/proc/1/cmdline"])[1]
    rig.call("workload.stop", id="reaped", timeout_s=60)
    assert rigs.state(rig, "reaped")["ExitCode"] == 9


def test_a_privileged_one_may_mount(run: Run) -> None:
    script = (
        "mount -t tmpfs x /mnt && grep CapEff /proc/self/status && echo 1 > /proc/sys/vm/swappiness"
    )
    refused = run(["sh", "-c", script])
    assert refused.code != 0
    done = run(["sh", "-c", f"mkdir /mnt; {script}; echo 60 > /proc/sys/vm/swappiness"],
               Privileged=True)  # fmt: skip
    assert (done.code, done.err) == (0, b"")
    assert int(done.out.split()[1], 16) & (1 << 21)


def test_limits_change_while_it_runs(rig: Rig, start: Start) -> None:
    start("limited", "sleep 1000", Memory=192 << 20)
    rig.call("workload.update", id="limited", body={"Memory": 128 << 20, "PidsLimit": 50})
    inspected = rig.call("workload.inspect", id="limited")["HostConfig"]
    assert (inspected["Memory"], inspected["PidsLimit"]) == (128 << 20, 50)
    rig.call("workload.update", id="limited", body={"NanoCpus": 500_000_000})
    script = "i=0; while [ $i -lt 60 ]; do sleep 100 & i=$((i+1)); done; echo all"
    code, out = rigs.execute(rig, "limited", ["sh", "-c", script])
    assert code != 0 or b"all" not in out


def test_a_kill_for_want_of_memory_is_told(rig: Rig, start: Start) -> None:
    start("hungry", "x=aaaaaaaa; while :; do x=$x$x; done", Memory=96 << 20)
    rig.call("workload.wait", id="hungry")
    state = rigs.state(rig, "hungry")
    assert (state["ExitCode"], state["OOMKilled"]) == (137, True)
    assert "memory" in state["Error"]


def test_usage_is_measured(rig: Rig, start: Start, boundary: str) -> None:
    start("measured", "head -c 20000000 /dev/zero > /dev/shm/x; echo held; sleep 1000")
    until(lambda: say(rig, "measured") == "held\n", "it holds memory")
    items, _ = rig.rpc.stream(
        "workload.stats", {"id": "measured", "stream": False, "one_shot": True}
    )
    (sample,) = items
    assert sample["memory_stats"]["usage"] >= 20_000_000
    if boundary in registry.GUESTS:
        assert sample["guest"]["memory_stats"]["usage"] >= 20_000_000
        assert sample["guest"]["memory_stats"]["limit"] <= 1 << 30
        assert sample["guest"]["pids_stats"]["current"] >= 1


def test_the_clock_is_right_after_a_pause(rig: Rig, start: Start) -> None:
    start("paused", "sleep 1000")
    rig.call("workload.pause", id="paused")
    before = time.time()
    until(lambda: time.time() - before > 2, "time has gone by")
    rig.call("workload.unpause", id="paused")
    earliest = time.time()
    inside = int(rigs.execute(rig, "paused", ["date", "+%s"])[1])
    assert int(earliest) - 1 <= inside <= time.time() + 1


def test_health_by_connection(rig: Rig, start: Start) -> None:
    serve = "while :; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\n' | nc -l -p 8080; done"
    check = {"Test": ["HTTP", "http://localhost:8080/"], "Interval": 10**8, "Retries": 100}
    start("served", serve, config={"Healthcheck": check})
    until(lambda: rigs.state(rig, "served")["Health"]["Status"] == "healthy", "it answers")


# --- networks ------------------------------------------------------------------------------------


@pytest.fixture
def network(rig: Rig) -> Iterator[str]:
    rig.call("network.create", Name="both")
    yield "both"
    rig.call("network.remove", name="both")


def test_they_find_and_reach_each_other_by_name(rig: Rig, network: str, start: Start) -> None:
    serve = "echo from $(hostname) > /page; while :; do nc -l -p 80 < /page; done"
    start("server", serve, NetworkMode=network, config={"Hostname": "there"})
    start("asker", "sleep 1000", NetworkMode=network)
    start("neighbour", "sleep 1000", NetworkMode=network, boundary="container")

    def answer(name: str) -> bytes:
        ask = "nc -w 2 server 80 < /dev/null"
        return rigs.execute(rig, name, ["sh", "-c", ask])[1]

    for name in ("asker", "neighbour"):
        until(functools.partial(_equal, answer, name, b"from there\n"), f"{name} is answered")


def _equal(answer: Callable[[str], bytes], name: str, wanted: bytes) -> bool:
    return answer(name) == wanted


def test_a_published_port_is_reached_from_the_host(rig: Rig, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start(
        "web", "echo page > /page; while :; do nc -l -p 80 < /page; done",
        config={"ExposedPorts": {"80/tcp": {}}},
        PortBindings={"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]},
    )  # fmt: skip

    def answer() -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                return connection.recv(100)
        except OSError:
            return b""

    until(lambda: answer() == b"page\n", "the port answers")


def test_addresses_of_version_six(rig: Rig, start: Start) -> None:
    rig.call("network.create", Name="six", EnableIPv6=True)
    start("six-server", "echo six > /page; while :; do nc -l -p 80 < /page; done",
          NetworkMode="six")  # fmt: skip
    settings = rig.call("workload.inspect", id="six-server")["NetworkSettings"]["Networks"]["six"]
    address = settings["GlobalIPv6Address"]
    start("six-asker", "sleep 1000", NetworkMode="six")
    for target in (address, "six-server"):
        until(
            functools.partial(_answers, rig, "six-asker", f"nc -w 2 {target} 80 < /dev/null"),
            f"{target} answers",
        )
    for name in ("six-asker", "six-server"):
        rig.call("workload.remove", id=name, force=True)
    rig.call("network.remove", name="six")


def _answers(rig: Rig, name: str, command: str) -> bool:
    return rigs.execute(rig, name, ["sh", "-c", command])[1] == b"six\n"


def test_networks_change_while_it_runs(rig: Rig, network: str, start: Start) -> None:
    serve = "echo here > /page; while :; do nc -l -p 80 < /page; done"
    start("server", serve, NetworkMode=network, boundary="container")
    start("mover", "sleep 1000")

    def answer(name: str) -> bytes:
        return rigs.execute(rig, name, ["sh", "-c", "nc -w 2 server 80 < /dev/null"])[1]

    for _ in range(2):
        rig.call("network.connect", network=network, container="mover")
        until(functools.partial(_equal, answer, "mover", b"here\n"), "the server is reached")
        rig.call("network.disconnect", network=network, container="mover")
        assert b"here" not in answer("mover")
    shown = rigs.execute(rig, "mover", ["ip", "route"])[1]
    assert b"default via" in shown


def test_several_share_network_processes_and_memory(rig: Rig, start: Start, run: Run) -> None:
    start("first", "echo seen > /dev/shm/file; echo 1 > /own; sleep 1000", IpcMode="shareable")
    network = {"NetworkMode": "container:first"}
    start("second", "while :; do nc -l -p 81 -e echo local; done", **network)
    ask = "nc -w 2 127.0.0.1 81 < /dev/null"

    def answer(name: str) -> bytes:
        return rigs.execute(rig, name, ["sh", "-c", ask])[1]

    until(functools.partial(_equal, answer, "first", b"local\n"), "one reaches the other")
    alone = run(["sh", "-c", "echo $$; ls /own; cat /dev/shm/file; exit 5"], **network)
    assert (alone.code, alone.out) == (5, b"1\n")
    until(lambda: rigs.execute(rig, "first", ["cat", "/dev/shm/file"])[1] == b"seen\n", "written")
    shared = {**network, "PidMode": "container:first", "IpcMode": "container:first"}
    both = run(["sh", "-c", "cat /dev/shm/file; ps | grep -c 'sleep [1]000'"], **shared)
    assert both.out == b"seen\n1\n"


def test_without_a_network_there_is_only_lo(run: Run) -> None:
    done = run(["ls", "/sys/class/net"], NetworkMode="none")
    assert done.out.split() == [b"lo"]


# --- images --------------------------------------------------------------------------------------


def test_an_image_of_a_hundred_layers(rig: Rig, boundary: str, tmp_path: Path) -> None:
    layers = [images.tar_of({"etc/last": b"%d" % n, f"etc/n{n}": b"x"}) for n in range(99)]
    layers.append(images.tar_of({"etc/.wh.n7": b"", "etc/link": "last"}))
    archive = tmp_path / "many.tar"
    blobs = images.Blobs()
    image = images.build(blobs, [images.busybox_tar(), *layers])
    images.oci_archive(archive, blobs, [("many:latest", image.descriptor)])
    with archive.open("rb") as file:
        rig.rpc.stream("image.load", {}, [file.fileno()])
    script = "cat /etc/link; ls /etc | grep -c '^n[0-9]'; id -un"
    for _ in range(2):
        done = rigs.run(rig, ["sh", "-c", script], boundary=boundary, config={"Image": "many"})
        assert done.out == b"98" + b"98\nroot\n", done.err
    rig.call("image.remove", name="many")


# --- files of the host and volumes ----------------------------------------------------------------


@pytest.fixture
def folder(rig: Rig) -> Iterator[Path]:
    """A directory of the host that everybody may enter."""
    path = Path(tempfile.mkdtemp(dir=rig.root.parent))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_a_directory_of_the_host_is_shared(run: Run, folder: Path) -> None:
    (folder / "old").write_text("from the host\n")
    script = (
        "cat /data/old; mkdir /data/d; echo new > /data/d/f; mv /data/d/f /data/d/g; rm /data/old;"
        "ln /data/d/g /data/l; ln -s d/g /data/s; chown 12:34 /data/l; chmod 640 /data/l;"
        "cat /data/s; stat -c '%h %u %g %a' /data/l"
    )
    done = run(["sh", "-ec", script], Binds=[f"{folder}:/data"])
    assert done.out.decode().splitlines() == ["from the host", "new", "2 12 34 640"], done.err
    found = (folder / "d/g").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777, found.st_nlink) == (12, 34, 0o640, 2)
    assert os.readlink(folder / "s") == "d/g" and not (folder / "old").exists()


def test_a_bind_can_be_read_only(run: Run, folder: Path) -> None:
    (folder / "f").write_text("x\n")
    done = run(["sh", "-c", "cat /data/f; echo y > /data/f"], Binds=[f"{folder}:/data:ro"])
    assert (done.code, done.out) == (1, b"x\n")
    assert b"Read-only file system" in done.err
    assert (folder / "f").read_text() == "x\n"


def test_a_single_file_can_be_bound(run: Run, folder: Path) -> None:
    (folder / "conf").write_text("one\n")
    script = "cat /etc/app.conf; echo two >> /etc/app.conf; ls /etc | grep app"
    done = run(["sh", "-c", script], Binds=[f"{folder}/conf:/etc/app.conf"])
    assert done.out == b"one\napp.conf\n", done.err
    assert (folder / "conf").read_text() == "one\ntwo\n"


def test_what_the_host_changes_is_seen(start: Start, rig: Rig, folder: Path) -> None:
    (folder / "f").write_text("first\n")
    wanted = '"$(cat /data/f /data/other 2>/dev/null | tr -d "\\n")" = secondother'
    script = f"until [ {wanted} ]; do sleep 0.05; done; echo seen"
    start("watching", f"cat /data/f; {script}", Binds=[f"{folder}:/data"])
    until(lambda: say(rig, "watching") == "first\n", "it has read the file")
    (folder / "other").write_text("other\n")
    (folder / "f").write_text("second\n")
    assert rig.call("workload.wait", id="watching")["StatusCode"] == 0
    assert say(rig, "watching") == "first\nseen\n"


def test_a_volume_keeps_its_files(run: Run, rig: Rig) -> None:
    rig.call("volume.create", Name="kept", Labels={"a": "b"})
    binds = ["kept:/v"]
    assert run(["sh", "-c", "echo one > /v/f; sync"], Binds=binds).code == 0
    assert run(["sh", "-c", "cat /v/f; echo two >> /v/f"], Binds=binds).out == b"one\n"
    assert rigs.run(rig, ["cat", "/v/f"], Binds=binds).out == b"one\ntwo\n"
    (found,) = rig.call("volume.list", filters={"label": ["a=b"]})["Volumes"]
    assert found["Name"] == "kept"
    rig.call("volume.remove", name="kept")


def test_a_new_volume_has_what_the_image_has(run: Run, rig: Rig) -> None:
    done = run(["sh", "-c", "ls /etc/passwd; echo x > /etc/added"], Binds=["filled:/etc"])
    assert (done.code, done.out) == (0, b"/etc/passwd\n"), done.err
    again = run(["sh", "-c", "rm /etc/passwd; cat /etc/added; ls /e"], Binds=["filled:/e"])
    assert b"added" in again.out and b"passwd" in again.out
    rig.call("volume.remove", name="filled")
    anonymous = run(["sh", "-c", "echo x > /v/f"], config={"Volumes": {"/v": {}}})
    assert anonymous.code == 0
    until(lambda: rig.call("volume.list")["Volumes"] == [], "the anonymous volume is gone")


def test_a_part_of_a_volume(run: Run, rig: Rig) -> None:
    made = rigs.run(rig, ["sh", "-c", "mkdir /v/a; echo x > /v/a/f"], Binds=["whole:/v"])
    assert made.code == 0
    mount = {"Type": "volume", "Source": "whole", "Target": "/p", "ReadOnly": True}
    done = run(
        ["sh", "-c", "cat /p/f; touch /p/g"],
        Mounts=[{**mount, "VolumeOptions": {"Subpath": "a"}}],
    )
    assert (done.code, done.out) == (1, b"x\n"), done.err
    rig.call("volume.remove", name="whole")


def test_one_kernel_writes_a_volume(rig: Rig, start: Start, boundary: str) -> None:
    start("writing", "echo x > /v/f; echo ready; sleep 1000", Binds=["leased:/v"])
    until(lambda: say(rig, "writing") == "ready\n", "it has written")
    if boundary == "container":
        assert rigs.run(rig, ["touch", "/v/g"], Binds=["leased:/v"]).code == 0
    else:
        with pytest.raises(Conflict, match=r"volume leased is written by writing \(boundary"):
            rigs.run(rig, ["touch", "/v/g"], Binds=["leased:/v"])
    assert rigs.run(rig, ["cat", "/v/f"], Binds=["leased:/v:ro"]).out == b"x\n"
    rig.call("workload.kill", id="writing", signal="KILL")
    rig.call("workload.wait", id="writing")
    assert rigs.run(rig, ["touch", "/v/g"], Binds=["leased:/v"]).code == 0
    rig.call("workload.remove", id="writing")
    rig.call("volume.remove", name="leased")


def test_a_volume_with_a_size_is_a_quota(run: Run, rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    try:
        loop.attach_read_only(str(tmp_path / "file"))[0].close()
    except OSError as error:
        pytest.skip(f"no loop devices here, which containers need for it: {error}")
    rig.call("volume.create", Name="sized", DriverOpts={"size": "32m"})
    script = "dd if=/dev/zero of=/v/big bs=1M count=40; rm /v/big; echo kept > /v/f; ls /v"
    done = run(["sh", "-c", script], Binds=["sized:/v"])
    assert b"No space left on device" in done.err and done.out == b"f\n", done.err
    assert rigs.run(rig, ["cat", "/v/f"], Binds=["sized:/v"]).out == b"kept\n"
    assert run(["cat", "/v/f"], Binds=["sized:/v"]).out == b"kept\n"
    rig.call("volume.remove", name="sized")


# --- what a kernel of its own makes impossible is refused -----------------------------------------


def test_what_a_guest_cannot_have_is_refused(
    rig: Rig, network: str, run: Run, start: Start, boundary: str
) -> None:
    boundary = boundary.partition(":")[0]
    if boundary not in registry.GUESTS:
        pytest.skip("shares the host's kernel")
    host: dict[str, Any]
    for host in (
        {"NetworkMode": "host"}, {"PidMode": "host"}, {"IpcMode": "host"},
        {"Devices": [{"PathOnHost": "/dev/null", "PathInContainer": "/dev/x"}]},
    ):  # fmt: skip
        with pytest.raises(Unsupported, match=f"behind the boundary {boundary}"):
            run(["true"], **host)
    start("other", "sleep 1000")
    with pytest.raises(Unsupported, match="no other workload can join"):
        rigs.run(rig, ["true"], NetworkMode="container:other")
    with pytest.raises(Unsupported, match="are the host's"):
        start("plain", "sleep 1000", boundary="container")
        run(["true"], NetworkMode="container:plain")


# --- the report ----------------------------------------------------------------------------------


def test_a_report_says_what_is_there(boundary: str, tmp_path: Path) -> None:
    if boundary in KERNELS:
        guest_kernel.provide(tmp_path)
    services = registry.Services(Home(str(tmp_path), str(tmp_path)), None)  # type: ignore[arg-type]
    report = probe(boundary, services)
    assert report.usable
    assert (report.name in registry.GUESTS) == ("guest" in report.optional)
    assert report.optional - {"guest"} <= PROTOCOLS.keys()
