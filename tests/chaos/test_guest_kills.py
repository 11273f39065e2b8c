"""kill -9 for a guest's kernel, its monitor, its file server, engine, keeper and holder, anywhere.

What a workload had synced is there afterwards, the state is what is true, new work is done, and
nothing remains. The rounds come from one seed; `make soak` makes ten times as many.
"""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from bulkhead.boundary import registry
from bulkhead.errors import BulkheadError, NotFound
from bulkhead.home import Home
from tests.guest.archives import fetch
from tests.helpers import engine_rig as rigs
from tests.helpers import guest_kernel
from tests.helpers.culling import aimed_at, pids
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue
from tests.helpers.scale import scaled
from tests.helpers.waiting import until

ROUNDS = {"sandbox": 9, "microvm": 4}
PARTS = ("vmm", "monitor", "files", "engine", "keeper", "holder")
VICTIMS = (
    ("vmm",), ("monitor",), ("files",), ("vmm", "engine"), ("keeper",), ("monitor", "engine"),
    ("holder",), ("vmm", "engine", "keeper", "holder"), ("files", "engine"),
)  # fmt: skip
FATAL = frozenset({"vmm", "monitor", "files"})
"""With these parts the workload ends, as by a loss of power."""
LATEST_S = 0.4
SCRIPT = """
n=$(cat /n 2>/dev/null || echo 0)
while :; do
  n=$((n+1)); echo $n > /n.new; sync; mv /n.new /n; sync
  echo $n > /host/n.new; mv /host/n.new /host/n; echo $n
done
"""


@pytest.fixture(params=ROUNDS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Rig, str]]:
    name: str = request.param
    if os.geteuid() != 0 or shutil.which("busybox") is None:
        pytest.skip("needs root and a static busybox")
    if name == "microvm" and (reason := guest_kernel.missing()):
        pytest.skip(reason)
    if name == "microvm":
        guest_kernel.provide(tmp_path / "root")
    services = registry.Services(Home(str(tmp_path / "root"), "/nonexistent"), None)  # type: ignore[arg-type]
    report = registry.boundary(name, services).probe()
    if not report.usable:
        pytest.skip("; ".join(one.what for one in report.missing))
    with residue(str(tmp_path)), rigs.engine(tmp_path) as made:
        rigs.load_busybox(made)
        yield made, name


def _targets(rig: Rig, part: str) -> list[int]:
    if part in {"engine", "keeper", "holder"}:
        return pids(rig, part)
    monitor = rigs.state(rig, "victim")["Pid"]
    if part == "monitor":
        return [monitor]
    with suppress(OSError):
        if part == "vmm":
            children = Path(f"/proc/{monitor}/task/{monitor}/children").read_text()
            return [int(word) for word in children.split()]
        groups = Path(f"/proc/{monitor}/cgroup").read_text()
        return [pid for pid in _called("bulkhead-files") if _groups(pid) == groups]
    return []


def _called(name: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if name.encode() in (entry / "cmdline").read_bytes().split(b"\0", 1)[0]:
                    found.append(int(entry.name))
    return found


def _groups(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cgroup").read_text()
    return ""


def _strike(rig: Rig, victims: tuple[str, ...], delay_s: float) -> None:
    """Kill while the workload writes and another process is being run in it."""
    with ExitStack() as undo:
        targets = [pid for part in victims for pid in _targets(rig, part)]
        fire = undo.enter_context(aimed_at(targets))

        def bystander() -> None:
            with suppress(BulkheadError, OSError):
                rigs.execute(rig, "victim", ["sh", "-c", "head -c 100000 /dev/zero; sync"])

        thread = threading.Thread(target=bystander)
        thread.start()
        undo.callback(thread.join)
        threading.Event().wait(delay_s)  # the random moment
        fire()
        if "engine" in victims:
            rig.hang_up()
            assert rig.process is not None
            rig.process.wait(rigs.DEADLINE_S)
            rig.start()


def _numbers(rig: Rig) -> list[int]:
    """What the workload has said that it had synced."""
    words = rigs.logs(rig, "victim").decode(errors="replace").split()
    return [int(word) for word in words if word.isdecimal()]


def _round(rig: Rig, boundary: str, shared: Path, victims: tuple[str, ...], delay_s: float) -> None:
    binds = [f"{shared}:/host"]
    rigs.start(rig, "victim", SCRIPT, boundary=boundary, Binds=binds)
    until(lambda: _numbers(rig), "it has written")
    _strike(rig, victims, delay_s)
    if FATAL & set(victims):
        until(lambda: rigs.state(rig, "victim")["Status"] == "exited", "its end is known")
        assert rigs.state(rig, "victim")["ExitCode"] in {125, 137, 255}
        if "vmm" in victims:
            assert "the guest failed: the guest ended" in rigs.state(rig, "victim")["Error"]
    else:
        assert rigs.state(rig, "victim")["Status"] == "running"
        assert rigs.execute(rig, "victim", ["echo", "in"])[1] == b"in\n"
        rig.call("workload.kill", id="victim", signal="KILL")
    rig.call("workload.wait", id="victim")
    said = _numbers(rig)[-1]
    kept = int(fetch(rig, "workload.archive_get", id="victim", path="/n")["n"][1])
    assert kept >= said
    assert int((shared / "n").read_text()) >= said
    rig.call("workload.start", id="victim")
    until(lambda: _numbers(rig)[-1] > kept, "it goes on where it was")
    rig.call("workload.remove", id="victim", force=True)


def test_a_guest_can_be_killed_anywhere(rig: tuple[Rig, str], tmp_path: Path) -> None:
    engine, boundary = rig
    chance = random.Random(7)
    shared = tmp_path / "shared"
    shared.mkdir()
    for number in range(scaled(ROUNDS[boundary])):
        victims = VICTIMS[number % len(VICTIMS)]
        delay_s = chance.random() * LATEST_S
        try:
            _round(engine, boundary, shared, victims, delay_s)
            done = rigs.run(engine, ["echo", "well"], boundary=boundary)
            assert done.out == b"well\n"
        except BaseException as error:
            error.add_note(f"round {number}: {'+'.join(victims)} after {delay_s * 1e3:.0f} ms")
            error.add_note(engine.log.read_text()[-3000:])
            raise
    with pytest.raises(NotFound):
        engine.call("workload.inspect", id="victim")
    for folder in (engine.root / "workloads", engine.run / "workloads", engine.run / "looks"):
        until(lambda folder=folder: _empty(folder), f"{folder}")  # type: ignore[misc]


@pytest.mark.parametrize("rig", ["sandbox"], indirect=True)
def test_an_engine_may_be_killed_while_it_shows_files(rig: tuple[Rig, str]) -> None:
    engine, boundary = rig
    rigs.start(engine, "victim", "echo 1 > /n; sync; exit 0", boundary=boundary)
    engine.call("workload.wait", id="victim")
    reading, writing = os.pipe()
    with rigs.Rpc(engine.socket) as rpc:
        rpc.start("workload.archive_put", {"id": "victim", "path": "/"}, [reading])
        until(lambda: not _empty(engine.run / "looks"), "its files are shown")
        engine.kill()
    os.close(reading)
    os.close(writing)
    engine.start()
    assert fetch(engine, "workload.archive_get", id="victim", path="/n")["n"][1] == b"1\n"
    engine.call("workload.start", id="victim")
    engine.call("workload.wait", id="victim")
    engine.call("workload.remove", id="victim")
    until(lambda: _empty(engine.run / "looks"), "nothing is left of it")


def _empty(folder: Path) -> bool:
    return not folder.exists() or not os.listdir(folder)
