"""Snapshots of running microVMs: what goes on where it was, and what must be its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import guest_kernel
from tests.helpers.installation import Installation, installation
from tests.helpers.waiting import until

MISSING = guest_kernel.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

COUNT = """echo boot >> /boots; i=0; while true; do
i=$((i+1)); echo $i > /next; mv /next /count; sleep 0.05; done"""
FACTS = """hostname; cat /sys/class/net/eth0/address; hostname -i; cat /etc/hostname
cat /etc/machine-id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | md5sum"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("snapshots")
    guest_kernel.provide(folder / "root")
    with installation(folder) as made:
        made.load_busybox(folder)
        script = f"echo 0123456789abcdef0123456789abcdef > /etc/machine-id; {COUNT}"
        begin(made, "first", "sh", "-c", script)
        until(lambda: count(made, "first") > 3, "it counts")
        yield made


def begin(here: Installation, name: str, *words: str, boundary: str = "microvm") -> None:
    here.cli("run", "-d", "--name", name, "--boundary", boundary, "busybox", *words).ok()


def say(here: Installation, name: str, script: str) -> list[str]:
    return here.cli("exec", name, "sh", "-c", script).ok().out.split("\n")


def count(here: Installation, name: str) -> int:
    return int(say(here, name, "cat /count || echo 0")[0])


def test_a_restored_workload_goes_on_with_an_identity_of_its_own(here: Installation) -> None:
    assert here.cli("snapshot", "first", "early").ok().line == "early"
    before = count(here, "first")
    say(here, "first", "echo late > /late")
    here.cli("restore", "--name", "second", "early").ok()
    assert count(here, "second") >= 3, "it has not begun anew"
    until(lambda: count(here, "first") > before, "the first goes on")
    assert say(here, "second", "cat /boots; ls /")[0] == "boot"
    assert "late" not in say(here, "second", "ls /")
    first, second = say(here, "first", FACTS), say(here, "second", FACTS)
    for number, kind in enumerate(
        ("host name", "MAC", "address", "hostname file", "machine id", "uuid", "bytes")
    ):
        assert first[number] != second[number], kind
        assert second[number], kind
    assert second[0] == second[3]
    shape = "{{.Config.Hostname}} {{.NetworkSettings.Networks.bridge.IPAddress}}"
    told = here.cli("inspect", "-f", shape, "second").ok().line
    assert told == f"{second[0]} {second[2].strip()}"


def test_two_from_one_snapshot_reach_each_other_and_end_apart(here: Installation) -> None:
    here.cli("snapshot", "first", "twice").ok()
    for name in ("left", "right"):
        here.cli("restore", "--name", name, "twice").ok()
    shape = "{{.NetworkSettings.Networks.bridge.IPAddress}}"
    address = here.cli("inspect", "-f", shape, "right").ok().line
    say(here, "left", f"ping -c 1 -W 20 {address}")
    bits = [say(here, name, "cat /proc/sys/kernel/random/uuid")[0] for name in ("left", "right")]
    assert bits[0] != bits[1]
    here.cli("snapshot", "rm", "twice").ok()
    here.cli("kill", "left").ok()
    assert count(here, "right") > 0
    here.cli("rm", "-f", "left", "right").ok()


def test_a_fork_is_a_workload_like_any_other(here: Installation) -> None:
    here.cli("fork", "--name", "forked", "first").ok()
    assert here.cli("snapshot", "ls", "-q").ok().out.count("fork") == 0
    here.cli("stop", "-t", "0", "forked").ok()
    here.cli("start", "forked").ok()
    until(lambda: say(here, "forked", "cat /boots").count("boot") == 2, "it has booted")
    here.cli("fork", "--name", "grandchild", "forked").ok()
    assert say(here, "grandchild", "cat /boots").count("boot") == 2
    here.cli("rm", "-f", "forked", "grandchild").ok()


def test_snapshots_are_listed_and_removed(here: Installation) -> None:
    made = here.cli("snapshot", "first").ok().line
    assert made.startswith("first-")
    assert made in here.cli("snapshot", "ls", "-q").ok().out.split()
    here.cli("snapshot", "first", made).failed(1, "already")
    files = {path.name: path.stat().st_mode & 0o777 for path in _files(here, made)}
    assert files["machine.image"] == 0o600
    here.cli("snapshot", "rm", made).ok()
    here.cli("restore", made).failed(1, "No such snapshot")


def _files(here: Installation, name: str) -> list[Path]:
    return list((here.root / "snapshots" / name).iterdir())


def test_what_cannot_be_saved_is_refused_in_words(here: Installation) -> None:
    here.cli("run", "-d", "--name", "plain", "busybox", "sleep", "1000").ok()
    here.cli("snapshot", "plain").failed(1, "shares the host's kernel", "commit")
    here.cli("rm", "-f", "plain").ok()
    here.cli("create", "--name", "idle", "--boundary", "microvm", "busybox", "true").ok()
    here.cli("snapshot", "idle").failed(1, "is not running")
    here.cli("rm", "idle").ok()
    words = ("-v", "data:/data", "--boundary", "microvm", "busybox", "true")
    here.cli("create", "--name", "bound", *words).ok()
    here.cli("snapshot", "bound").failed(1, "/data", "without volumes")
    here.cli("rm", "-v", "bound").ok()
