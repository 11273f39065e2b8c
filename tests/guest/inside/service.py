"""A machine's first boot: the engine as a service of systemd, on cgroup v2 with AppArmor.

Run in the Debian guest only. What it leaves on the disk, `second_boot` looks at.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.errors import Denied, Invalid
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig, Rpc
from tests.helpers.waiting import until

UNITS = Path(__file__).parents[3] / "src/bulkhead/engine/units"
COMMAND = """\
#!/usr/bin/python3
import os
import sys

path = ["/run/host/checkout/src", "/run/site"]
os.environ["PYTHONPATH"] = ":".join(path)
sys.path[:0] = path
from bulkhead.cli.main import entry

entry()
"""
PROFILE = """\
profile bulkhead-test flags=(attach_disconnected) {
  file,
  signal (receive) peer=unconfined,
  deny /forbidden* rw,
}
profile bulkhead-deaf flags=(attach_disconnected) {
  file,
}
"""
COUNT = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.1; done"
QUIET: dict[str, Any] = {"NetworkMode": "none"}


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def active() -> str:
    done = subprocess.run(
        ["systemctl", "is-active", "bulkhead.service"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The installed service, started by the first connection."""
    command = Path("/usr/local/bin/bulkhead")
    command.write_text(COMMAND)
    command.chmod(0o755)
    for unit in UNITS.iterdir():
        shutil.copy(unit, "/etc/systemd/system")
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "bulkhead.service")
    run("systemctl", "start", "bulkhead.socket")
    assert active() == "inactive"
    made = Rig(Path("/var/lib/bulkhead"), Path("/run/bulkhead"))
    assert made.call("system.ping")["pong"]
    assert active() == "active"
    archive = tmp_path_factory.mktemp("image")
    loader = Rig(archive / "root", made.run)
    rigs.load_busybox(loader)
    loader.hang_up()
    yield made
    made.hang_up()


def complete(rig: Rig, name: str) -> int:
    lines = rigs.logs(rig, name).split()
    assert [int(line) for line in lines] == list(range(1, len(lines) + 1))
    return len(lines)


@pytest.mark.parametrize("verbs", [("restart",), ("stop", "start")])
def test_workloads_outlive_the_service(rig: Rig, verbs: tuple[str, ...]) -> None:
    rigs.start(rig, "counter", COUNT, **QUIET)
    pid = rigs.state(rig, "counter")["Pid"]
    until(lambda: complete(rig, "counter"), "it counts")
    rig.hang_up()
    assert "counter" in run("bulkhead", "ps")  # a command server runs from now on
    for verb in verbs:
        run("systemctl", verb, "bulkhead.service")
        assert Path(f"/proc/{pid}").exists()
    assert rigs.state(rig, "counter")["Pid"] == pid
    before = complete(rig, "counter")
    until(lambda: complete(rig, "counter") > before, "it goes on")
    rig.call("workload.remove", id="counter", force=True)


def test_a_killed_engine_is_started_again(rig: Rig) -> None:
    rigs.start(rig, "counter", COUNT, **QUIET)
    pid = rigs.state(rig, "counter")["Pid"]
    first = run("systemctl", "show", "--value", "--property=MainPID", "bulkhead.service")
    rig.hang_up()
    run("kill", "-KILL", first)
    until(
        lambda: (
            run("systemctl", "show", "--value", "--property=MainPID", "bulkhead.service")
            not in ("0", first)
        ),
        "systemd starts it again",
    )
    assert rigs.state(rig, "counter")["Pid"] == pid
    rig.call("workload.remove", id="counter", force=True)


def test_a_network(rig: Rig) -> None:
    shown = rigs.run(rig, ["ip", "-4", "addr", "show", "dev", "eth0"])
    assert (shown.code, b" inet " in shown.out) == (0, True), shown.out + shown.err


def test_out_of_memory_is_explained(rig: Rig) -> None:
    script = "a=x; while true; do a=$a$a; done"
    rigs.start(rig, "eater", script, Memory=32 << 20, MemorySwap=32 << 20, **QUIET)
    assert rig.call("workload.wait", id="eater")["StatusCode"] == 137
    state = rigs.state(rig, "eater")
    assert state["OOMKilled"]
    assert "sh" in state["Error"]
    assert "32" in state["Error"]
    rig.call("workload.remove", id="eater")


def test_processors_and_disks_are_limited(rig: Rig) -> None:
    number = os.stat("/dev/vdd").st_rdev
    shown = rigs.run(
        rig,
        ["cat", "/sys/fs/cgroup/cpuset.cpus.effective", "/sys/fs/cgroup/io.max"],
        CpusetCpus="1",
        BlkioDeviceWriteBps=[{"Path": "/dev/vdd", "Rate": 1 << 20}],
        **QUIET,
    )
    device = f"{os.major(number)}:{os.minor(number)}"
    assert shown.out.decode().splitlines() == [
        "1",
        f"{device} rbps=max wbps=1048576 riops=max wiops=max",
    ]


def test_apparmor(rig: Rig, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    profile.write_text(PROFILE)
    run("apparmor_parser", "--replace", str(profile))
    label = ["cat", "/proc/self/attr/current"]
    assert rigs.run(rig, label, **QUIET).out == b"unconfined\n"
    wanted: dict[str, Any] = {"SecurityOpt": ["apparmor=bulkhead-test"], **QUIET}
    assert rigs.run(rig, label, **wanted).out == b"bulkhead-test (enforce)\n"
    refused = rigs.run(rig, ["touch", "/forbidden"], **wanted)
    assert (refused.code, b"Permission denied" in refused.err) == (1, True)
    assert rigs.run(rig, ["touch", "/allowed"], **wanted).code == 0
    rigs.start(rig, "confined", "sleep 1000", **wanted)
    assert rigs.execute(rig, "confined", label) == (0, b"bulkhead-test (enforce)\n")
    rig.call("workload.remove", id="confined", force=True)
    rigs.start(rig, "deaf", "sleep 1000", SecurityOpt=["apparmor=bulkhead-deaf"], **QUIET)
    with pytest.raises(Denied, match=r"must allow `signal \(receive\) peer=unconfined`"):
        rig.call("workload.kill", id="deaf", signal="HUP")
    rig.call("workload.remove", id="deaf", force=True)
    unconfined: dict[str, Any] = {"SecurityOpt": ["apparmor=unconfined"], **QUIET}
    assert rigs.run(rig, label, **unconfined).out == b"unconfined\n"
    with pytest.raises(Invalid, match="apparmor profile 'no-such' is not loaded"):
        rigs.run(rig, label, SecurityOpt=["apparmor=no-such"], **QUIET)


def test_policies_for_the_next_boot(rig: Rig) -> None:
    for name, policy in (
        ("always", "always"),
        ("always-stopped", "always"),
        ("unless", "unless-stopped"),
        ("unless-stopped", "unless-stopped"),
        ("failure", "on-failure"),
        ("no", "no"),
    ):
        rigs.start(rig, name, "sleep 100000", RestartPolicy={"Name": policy}, **QUIET)
    for name in ("always-stopped", "unless-stopped"):
        rig.call("workload.stop", id=name, timeout_s=0)
    with Rpc(rig.socket) as other:
        names = {entry["Names"][0] for entry in other.call("workload.list")}
    assert names == {"/always", "/unless", "/failure", "/no"}
