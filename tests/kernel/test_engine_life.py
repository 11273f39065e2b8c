"""The engine with real containers: the verbs on one that runs or has ended."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bulkhead.errors import BulkheadError, Conflict, NotFound
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import IMAGE, Rig, Rpc
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


@pytest.fixture(autouse=True)
def _empty(rig: Rig) -> Iterator[None]:
    """Each test begins without workloads, whatever became of the one before."""
    yield
    rig.hang_up()
    for found in rig.call("workload.list", all=True):
        rig.call("workload.remove", id=found["Id"], force=True, volumes=True)


@pytest.fixture
def box(rig: Rig, request: pytest.FixtureRequest) -> Iterator[str]:
    """A workload that waits, says "ready", and ends with 3 on TERM."""
    name = f"box{abs(hash(request.node.name)) % 10**8}"
    rigs.start(rig, name, "trap 'exit 3' TERM; echo ready; while true; do sleep 0.05; done")
    until(lambda: b"ready" in rigs.logs(rig, name), "it is ready")
    yield name
    with contextlib.suppress(NotFound):
        rig.call("workload.remove", id=name, force=True)


def test_stop_sends_term_and_waits(rig: Rig, box: str) -> None:
    assert rig.call("workload.stop", id=box, timeout_s=60) == {}
    found = rigs.state(rig, box)
    assert (found["Status"], found["ExitCode"]) == ("exited", 3)
    assert rig.call("workload.stop", id=box) == {"NotModified": True}


def test_stop_kills_after_its_timeout(rig: Rig, box: str) -> None:
    rig.call("workload.stop", id=box, signal="SIGWINCH", timeout_s=0)
    assert rigs.state(rig, box)["ExitCode"] == 137


def test_start_again_keeps_the_files(rig: Rig, box: str) -> None:
    assert rig.call("workload.start", id=box) == {"NotModified": True}
    assert rigs.execute(rig, box, ["touch", "/kept"]) == (0, b"")
    rig.call("workload.restart", id=box, timeout_s=60)
    assert rigs.execute(rig, box, ["ls", "/kept"]) == (0, b"/kept\n")


def test_wait_gives_the_exit_code(rig: Rig, box: str) -> None:
    with Rpc(rig.socket) as waiting:
        number = waiting.start("workload.wait", {"id": box, "condition": "not-running"})
        rig.call("workload.kill", id=box, signal="TERM")
        frames = waiting.frames(number)
        with pytest.raises(StopIteration) as end:
            next(frames)
        assert end.value.value == {"StatusCode": 3}
    assert rig.call("workload.wait", id=box) == {"StatusCode": 3}


def test_kill_wants_one_that_runs(rig: Rig, box: str) -> None:
    rig.call("workload.kill", id=box)
    until(lambda: rigs.state(rig, box)["Status"] == "exited", "it has ended")
    with pytest.raises(Conflict, match="is not running"):
        rig.call("workload.kill", id=box)
    with pytest.raises(BulkheadError, match="Invalid signal: NOPE"):
        rig.call("workload.kill", id=box, signal="NOPE")


def test_pause_freezes_and_unpause_thaws(rig: Rig, box: str) -> None:
    rig.call("workload.pause", id=box)
    assert rigs.state(rig, box)["Status"] == "paused"
    with pytest.raises(Conflict, match="already paused"):
        rig.call("workload.pause", id=box)
    with pytest.raises(Conflict, match="is paused, unpause the container before exec"):
        rigs.execute(rig, box, ["true"])
    rig.call("workload.unpause", id=box)
    with pytest.raises(Conflict, match="is not paused"):
        rig.call("workload.unpause", id=box)
    assert rigs.execute(rig, box, ["true"])[0] == 0


def test_a_paused_one_can_be_removed(rig: Rig, box: str) -> None:
    rig.call("workload.pause", id=box)
    with pytest.raises(Conflict, match="paused"):
        rig.call("workload.remove", id=box)
    rig.call("workload.remove", id=box, force=True)
    with pytest.raises(NotFound, match=f"No such container: {box}"):
        rig.call("workload.inspect", id=box)


def test_a_running_one_is_removed_by_force_only(rig: Rig, box: str) -> None:
    with pytest.raises(Conflict, match="container is running"):
        rig.call("workload.remove", id=box)
    rig.call("workload.remove", id=box, force=True)
    assert box not in str(rig.call("workload.list", all=True))


def test_rename(rig: Rig, box: str) -> None:
    rig.call("workload.rename", id=box, name=f"{box}-new")
    assert rig.call("workload.inspect", id=f"{box}-new")["Name"] == f"/{box}-new"
    with pytest.raises(BulkheadError):
        rig.call("workload.rename", id=f"{box}-new", name="not valid")
    rig.call("workload.rename", id=f"{box}-new", name=box)


def test_limits_change_at_once(rig: Rig, box: str) -> None:
    rig.call("workload.update", id=box, body={"Memory": 64 << 20, "PidsLimit": 30})
    found = rig.call("workload.inspect", id=box)["HostConfig"]
    assert (found["Memory"], found["MemorySwap"], found["PidsLimit"]) == (64 << 20, 128 << 20, 30)
    kernel = rig.call("workload.explain", id=box)["ControlGroups"]["Files"]
    assert str(64 << 20) in str(kernel)


def test_exec_has_its_own_user_environment_and_code(rig: Rig, box: str) -> None:
    code, out = rigs.execute(
        rig, box, ["sh", "-c", "id -u; echo $X; pwd; exit 9"],
        User="12", Env=["X=y"], WorkingDir="/etc",
    )  # fmt: skip
    assert (code, out) == (9, b"12\ny\n/etc\n")
    with pytest.raises(BulkheadError, match="executable file not found"):
        rigs.execute(rig, box, ["nope"])
    with pytest.raises(NotFound, match="No such exec instance: x"):
        rig.call("exec.inspect", id="x")


def test_exec_ends_with_its_workload(rig: Rig, box: str) -> None:
    results: list[Any] = []

    def work() -> None:
        results.append(rigs.execute(rig, box, ["sh", "-c", "echo on; sleep 1000"]))

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: rig.call("workload.inspect", id=box)["ExecIDs"], "the exec runs")
    (execution,) = rig.call("workload.inspect", id=box)["ExecIDs"]
    assert rig.call("exec.inspect", id=execution)["Pid"] > 0
    rig.call("workload.kill", id=box)
    thread.join()
    assert results[0][0] == 137


def test_top_and_stats_and_explain_come_from_the_kernel(rig: Rig, box: str) -> None:
    found = rig.call("workload.top", id=box)
    assert found["Titles"][:2] == ["UID", "PID"]
    assert any("trap" in row[-1] for row in found["Processes"])
    sample = rig.call("workload.stats", id=box, stream=False, one_shot=True)
    assert sample["memory_stats"]["usage"] > 0
    assert sample["pids_stats"]["current"] >= 1
    assert "eth0" in sample["networks"]
    kernel = rig.call("workload.explain", id=box)
    assert kernel["Seccomp"]["Mode"] == "filter"
    assert "its own" in kernel["Namespaces"]["pid"]
    assert "CAP_SYS_ADMIN" not in kernel["Capabilities"]["CapBnd"]
    assert any(mount.startswith("/: overlay") for mount in kernel["Mounts"])
    assert any(route.startswith("default via") for route in kernel["Network"]["Routes"])


def test_changes_and_commit(rig: Rig, box: str) -> None:
    rigs.execute(rig, box, ["sh", "-c", "echo new >/added; rm /bin/yes"])
    changes = {(c["Kind"], c["Path"]) for c in rig.call("workload.changes", id=box)}
    assert {(1, "/added"), (2, "/bin/yes"), (0, "/bin")} <= changes
    rig.call("workload.commit", id=box, repo="mine", tag="1", changes=['CMD ["cat", "/added"]'])
    assert rig.call("image.inspect", name="mine:1")["Config"]["Cmd"] == ["cat", "/added"]
    params = {"body": {"Image": "mine:1", "HostConfig": {"AutoRemove": False}}, "name": f"{box}c"}
    _, result = rig.rpc.stream("workload.run", params)
    assert result["StatusCode"] == 0
    assert rigs.logs(rig, f"{box}c") == b"new\n"
    rig.call("workload.remove", id=f"{box}c")
    rig.call("image.remove", name="mine:1")


def test_logs_can_be_cut_followed_and_stamped(rig: Rig) -> None:
    rigs.start(rig, "speaker", "for i in 1 2 3; do echo line $i; done; echo oops >&2; sleep 1000")
    until(lambda: b"oops" in rigs.logs(rig, "speaker"), "it has spoken")
    assert rigs.logs(rig, "speaker", tail=2) == b"line 3\noops\n"
    assert rigs.logs(rig, "speaker", stderr=False).endswith(b"line 2\nline 3\n")
    assert rigs.logs(rig, "speaker", stdout=False) == b"oops\n"
    assert rigs.logs(rig, "speaker", until="2001-01-01T00:00:00Z") == b""
    stamped = rigs.logs(rig, "speaker", tail=1, timestamps=True)
    assert stamped.split(b" ", 1)[0].endswith(b"Z")
    with Rpc(rig.socket) as following:
        number = following.start("workload.logs", {"id": "speaker", "follow": True})
        frames = following.frames(number)
        seen = [next(frames) for _ in range(4)]
        assert seen[0] == [1, b"line 1\n"]
        rig.call("workload.kill", id="speaker")
        with pytest.raises(StopIteration):
            next(frames)
    rig.call("workload.remove", id="speaker")


def test_logs_are_bounded(rig: Rig) -> None:
    options = {"Type": "json-file", "Config": {"max-size": "128k", "max-file": "2"}}
    script = "x=$(printf '%1000s'); for i in $(seq 2000); do echo \"$x $i\"; done; sleep 1000"
    rigs.start(rig, "chatter", script, LogConfig=options)
    until(lambda: rigs.logs(rig, "chatter", tail=1).endswith(b" 2000\n"), "everything is logged")
    path = rig.call("workload.inspect", id="chatter")["LogPath"]
    folder = os.path.dirname(path)
    # The bound is looked at after each portion of output, of 64 KiB at most.
    assert sum(os.path.getsize(f"{folder}/{n}") for n in os.listdir(folder)) < 512 << 10
    rig.call("workload.remove", id="chatter", force=True)


def test_restart_policies_start_again(rig: Rig) -> None:
    policy = {"Name": "on-failure", "MaximumRetryCount": 2}
    rigs.start(rig, "failing", "echo try; exit 4", RestartPolicy=policy)
    until(
        lambda: (
            rig.call("workload.inspect", id="failing")["RestartCount"] == 2
            and rigs.state(rig, "failing")["Status"] == "exited"
        ),
        "it was tried three times",
    )
    assert rigs.logs(rig, "failing") == b"try\n" * 3
    assert rigs.state(rig, "failing")["ExitCode"] == 4
    rig.call("workload.remove", id="failing")
    rigs.start(rig, "always", "exit 0", RestartPolicy={"Name": "always"})
    until(lambda: rig.call("workload.inspect", id="always")["RestartCount"] >= 2, "it restarts")
    rig.call("workload.stop", id="always", timeout_s=0)
    until(lambda: rigs.state(rig, "always")["Status"] == "exited", "it stays stopped")
    rig.call("workload.remove", id="always")


@pytest.mark.parametrize(
    ("test", "status"),
    [
        (["CMD-SHELL", "test -e /nothing"], "unhealthy"),
        (["CMD", "true"], "healthy"),
        (["TCP", "8080"], "healthy"),
        (["TCP", "8081"], "unhealthy"),
        (["HTTP", "http://localhost:8080/"], "healthy"),
        (["HTTP", "http://localhost:8080/nothing"], "unhealthy"),
        (["HTTP", "http://localhost:8080/nothing", "404"], "healthy"),
    ],
)
def test_health_is_probed(rig: Rig, test: list[str], status: str) -> None:
    server = (
        'while true; do printf "HTTP/1.1 $(cat /s) x\\r\\nContent-Length: 0\\r\\n\\r\\n" '
        "| nc -l -p 8080 >/dev/null; done"
    )
    code = "404" if test[1].endswith("nothing") else "200"
    check = {"Test": test, "Interval": 50_000_000, "Retries": 3, "Timeout": 30 * 10**9}
    rigs.start(rig, "patient", f"echo {code} >/s; {server}", {"Healthcheck": check})

    def reached() -> bool:
        return bool(rigs.state(rig, "patient")["Health"]["Status"] == status)

    until(reached, status)
    assert rigs.state(rig, "patient")["Health"]["Log"]
    rig.call("workload.remove", id="patient", force=True)


def test_an_unhealthy_one_can_be_restarted(rig: Rig) -> None:
    check = {"Test": ["CMD", "false"], "Interval": 50_000_000, "Retries": 1}
    config = {
        "Healthcheck": check, "Labels": {"bulkhead.health.on-unhealthy": "stop"},
        "StopTimeout": 0,
    }  # fmt: skip
    rigs.start(rig, "sick", "sleep 1000", config)
    until(lambda: rigs.state(rig, "sick")["Status"] == "exited", "it is stopped")
    rig.call("workload.remove", id="sick")


def test_events_tell_the_story(rig: Rig) -> None:
    since = time.time()
    done = rigs.run(rig, ["true"], config={"Labels": {"story": "yes"}})
    items, _ = rig.rpc.stream(
        "system.events",
        {"since": since, "until": time.time(), "filters": {"label": ["story=yes"]}},
    )
    assert [e["Action"] for e in items if e["id"] == done.id] == [
        "create", "attach", "start", "die", "destroy",
    ]  # fmt: skip
    assert items[-2]["Actor"]["Attributes"]["exitCode"] == "0"


def test_events_tell_of_networks_and_volumes(rig: Rig) -> None:
    since = time.time()
    mount = {"Type": "volume", "Source": "told", "Target": "/v", "ReadOnly": True}
    done = rigs.run(rig, ["true"], Mounts=[mount], name="teller")
    rig.call("volume.remove", name="told")

    def told() -> list[Any]:
        items, _ = rig.rpc.stream("system.events", {"since": since, "until": time.time()})
        return [
            (one["Type"], one["Action"], one["Actor"]["Attributes"])
            for one in items
            if one["Actor"]["Attributes"].get("container") == done.id
        ]

    until(lambda: len(told()) == 4, "all is let go")
    names = {"container": done.id, "name": "bridge", "type": "bridge"}
    volume = {"driver": "local", "container": done.id}
    mounted = {**volume, "destination": "/v", "read/write": "false", "propagation": ""}
    assert told() == [
        ("volume", "mount", mounted),
        ("network", "connect", names),
        ("network", "disconnect", names),
        ("volume", "unmount", volume),
    ]


def test_lists_are_filtered(rig: Rig, box: str) -> None:
    rig.call("workload.create", name=f"{box}-made", body={"Image": IMAGE, "Labels": {"k": "v"}})
    for filters, found in (
        ({"status": ["created"]}, {f"{box}-made"}),
        ({"label": ["k=v"]}, {f"{box}-made"}),
        ({"name": [f"^{box}$"]}, {box}),
        ({"ancestor": [IMAGE], "status": ["running"]}, {box}),
        ({"network": ["bridge"], "status": ["running"]}, {box}),
        ({"status": ["exited"]}, set()),
    ):
        listed = rig.call("workload.list", all=True, filters=filters)
        assert {entry["Names"][0][1:] for entry in listed} == found, filters
    with pytest.raises(BulkheadError, match="invalid filter 'nope'"):
        rig.call("workload.list", filters={"nope": ["x"]})
    assert rig.call("workload.prune")["ContainersDeleted"] != []


def test_networks_are_joined_and_left_while_running(rig: Rig, box: str) -> None:
    rig.call("network.create", Name="side")
    rig.call("network.connect", network="side", container=box)
    assert set(rig.call("workload.inspect", id=box)["NetworkSettings"]["Networks"]) == {
        "bridge", "side",
    }  # fmt: skip
    assert b"eth1" in rigs.execute(rig, box, ["ip", "-o", "addr"])[1]
    with pytest.raises(BulkheadError):
        rig.call("network.remove", name="side")
    rig.call("network.disconnect", network="side", container=box)
    assert b"eth1" not in rigs.execute(rig, box, ["ip", "-o", "addr"])[1]
    rig.call("network.remove", name="side")


def test_detached_run_answers_at_once(rig: Rig) -> None:
    body = {"Image": IMAGE, "Cmd": ["sleep", "1000"]}
    _, result = rig.rpc.stream("workload.run", {"body": body, "detach": True, "name": "behind"})
    assert result["Reason"] == "detached"
    assert rigs.state(rig, "behind")["Running"]
    rig.call("workload.remove", id="behind", force=True)


def test_a_client_that_leaves_does_not_end_its_workload(rig: Rig) -> None:
    reading, writing = os.pipe()
    client = Rpc(rig.socket)
    body = {"Image": IMAGE, "Cmd": ["sleep", "1000"]}
    number = client.start(
        "workload.run", {"body": body, "name": "left", "attach": [False, True, False]}, [writing]
    )
    frames = client.frames(number)
    assert any("Started" in item for item in frames)
    client.close()
    os.close(writing)
    assert os.read(reading, 1) == b""  # the attachment has let go
    os.close(reading)
    assert rigs.state(rig, "left")["Running"]
    rig.call("workload.remove", id="left", force=True)


def test_doctor_and_df_and_info_answer(rig: Rig, box: str) -> None:
    checks = {one["check"]: one["status"] for one in rig.call("system.doctor")}
    assert checks["programs"] == "ok"
    usage = rig.call("system.df")
    assert usage["LayersSize"] > 0
    assert [entry["Names"] for entry in usage["Containers"]] == [[f"/{box}"]]
    assert rig.call("system.info")["ContainersRunning"] == 1
    assert rig.call("system.version")["Os"] == "linux"
