"""bulkhead-runtime where systemd is process 1: its scopes as control groups.

Run in the Debian guest only.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import criu
from tests.helpers.runtime_rig import Bundle
from tests.helpers.waiting import until

UNIT = "bh-one.scope"
SLICE = "bulkhead-test.slice"
MIB = 1 << 20


def shown(name: str, unit: str = UNIT) -> str:
    command = ["systemctl", "show", "--value", f"--property={name}", unit]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    made = Bundle(tmp_path)
    made.configure("sh", "-c", "i=0; while true; do i=$((i+1)); echo $i; sleep 0.1; done",
                   change=_scoped)  # fmt: skip
    yield made
    made.call("delete", "--force", "one")


def _scoped(spec: dict[str, Any]) -> None:
    spec["linux"]["cgroupsPath"] = f"{SLICE}:bh:one"
    spec["linux"]["resources"] |= {
        "memory": {"limit": 64 * MIB},
        "pids": {"limit": 50},
        "cpu": {"shares": 2048, "quota": 50_000, "period": 100_000},
    }


def create(bundle: Bundle, *words: str) -> None:
    """Its streams are files: the container has them as long as it lives."""
    said = bundle.folder / "said"
    with open(bundle.folder / "out", "wb") as out, said.open("wb") as err:
        command = bundle.command("--systemd-cgroup", "create", "--bundle", str(bundle.path), *words)
        done = subprocess.run(
            [*command, "one"], stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False
        )
    assert done.returncode == 0, said.read_text()


def file(bundle: Bundle, name: str) -> str:
    (line,) = Path(f"/proc/{bundle.pid('one')}/cgroup").read_text().splitlines()
    return Path(f"/sys/fs/cgroup{line.removeprefix('0::')}/{name}").read_text().strip()


def test_a_container_is_a_scope(bundle: Bundle) -> None:
    create(bundle)
    path = f"/bulkhead.slice/{SLICE}/{UNIT}"
    assert Path(f"/proc/{bundle.pid('one')}/cgroup").read_text() == f"0::{path}\n"
    known = {name: shown(name) for name in ("ActiveState", "ControlGroup", "Slice", "Delegate")}
    assert known == {
        "ActiveState": "active", "ControlGroup": path, "Slice": SLICE, "Delegate": "yes",
    }  # fmt: skip
    bundle.call("start", "one")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert file(bundle, "memory.max") == shown("MemoryMax") == str(64 * MIB)
    assert file(bundle, "pids.max") == shown("TasksMax") == "50"
    assert file(bundle, "cpu.max") == "50000 100000"
    assert file(bundle, "cpu.weight") == shown("CPUWeight")
    bundle.call("update", "--memory", str(96 * MIB), "--pids-limit", "60", "one")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert file(bundle, "memory.max") == shown("MemoryMax") == str(96 * MIB)
    assert file(bundle, "pids.max") == shown("TasksMax") == "60"
    bundle.call("exec", "one", "sh", "-c", "mknod /dev/sda b 8 0 && head -c 1 /dev/sda", code=1)
    bundle.call("kill", "one", "KILL")
    until(lambda: bundle.status("one") == "stopped", "its end")
    bundle.call("delete", "one")
    until(lambda: shown("LoadState") == "not-found", "systemd forgets it")
    assert not Path(f"/sys/fs/cgroup{path}").exists()


def test_systemd_ends_a_container(bundle: Bundle) -> None:
    create(bundle)
    bundle.call("start", "one")
    subprocess.run(["systemctl", "stop", UNIT], check=True)
    until(lambda: bundle.status("one") == "stopped", "its end")
    bundle.call("delete", "one")


def test_a_restored_container_is_a_scope(bundle: Bundle, tmp_path: Path) -> None:
    if criu.missing():
        pytest.skip(criu.missing())
    create(bundle)
    bundle.call("start", "one")
    images = ("--image-path", str(tmp_path / "images"))
    until(lambda: (bundle.folder / "out").read_text().count("\n") > 3, "it counts")
    bundle.call("--criu", criu.program(), "checkpoint", *images, "one")
    until(lambda: shown("LoadState") == "not-found", "systemd forgets it")
    words = ("--criu", criu.program(), "--systemd-cgroup", "restore", "--detach", *images)
    with open(bundle.folder / "out", "ab") as out:
        before = (bundle.folder / "out").read_text().split()
        command = bundle.command(*words, "--bundle", str(bundle.path), "one")
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, check=True
        )
    assert shown("ActiveState") == "active"
    assert file(bundle, "memory.max") == str(64 * MIB)
    count = len(before)
    until(lambda: len((bundle.folder / "out").read_text().split()) > count, "it goes on")
    lines = (bundle.folder / "out").read_text().split()
    assert lines[: count + 1] == [str(number + 1) for number in range(count + 1)]


def test_other_paths_are_refused(bundle: Bundle) -> None:
    bundle.configure("true")
    done = bundle.call("--systemd-cgroup", "run", "--bundle", str(bundle.path), "one", code=1)
    assert 'format "slice:prefix:name"' in done.stderr
