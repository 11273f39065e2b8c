"""Whole machines with a system of one sector: quick, and everything about disks is real."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import guest_kernel, tiny_disk
from tests.helpers.installation import Installation, installation
from tests.helpers.waiting import until

MISSING = guest_kernel.missing() or tiny_disk.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
BOOT_S = 300.0


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("machines")
    guest_kernel.provide(folder / "root")
    with installation(folder) as made:
        made.load_busybox(folder)
        disk = tiny_disk.raw(folder / "tiny.raw")
        made.cli("vm", "import", str(disk), "tiny").ok()
        yield made


@pytest.fixture
def machine(here: Installation, request: pytest.FixtureRequest) -> Iterator[str]:
    """A machine that does not run yet."""
    name = "m-" + request.node.name.removeprefix("test_").replace("_", "-")[:20].strip("-")
    here.cli("vm", "create", "--image", "tiny", "--memory", "64m", name).ok()
    yield name
    here.cli("vm", "rm", "-f", name).ok()


def said(here: Installation, name: str) -> str:
    return here.cli("logs", name).ok().out.replace("\r", "")


def start(here: Installation, name: str, expected: str) -> None:
    here.cli("vm", "start", name).ok()
    until(lambda: expected in said(here, name), f"{name} says {expected!r}", BOOT_S)


@pytest.mark.parametrize("kind", ["vmdk", "vdi", "vhdx", "qcow2"])
def test_an_imported_disk_boots(here: Installation, tmp_path: Path, kind: str) -> None:
    disk = tiny_disk.raw(tmp_path / "disk.raw", f"from {kind}")
    file = tiny_disk.converted(disk, tmp_path / f"disk.{kind}", kind)
    assert f"({kind})" in here.cli("vm", "import", str(file), f"i-{kind}").ok().out
    here.cli("vm", "create", "--image", f"i-{kind}", "--memory", "64m", f"v-{kind}").ok()
    start(here, f"v-{kind}", f"BOOT 1 from {kind}")
    here.cli("vm", "rmi", f"i-{kind}").failed(1, "in use by", f"v-{kind}")
    here.cli("vm", "rm", "-f", f"v-{kind}").ok()
    here.cli("vm", "rmi", f"i-{kind}").ok()


def test_an_appliance_boots(here: Installation, tmp_path: Path) -> None:
    disk = tiny_disk.raw(tmp_path / "disk.raw", "from an appliance")
    file = tiny_disk.ova(disk, tmp_path / "tiny.ova")
    assert "ova, vmdk" in here.cli("vm", "import", str(file), "appliance").ok().out
    here.cli("vm", "create", "--image", "appliance", "--memory", "64m", "ova").ok()
    start(here, "ova", "BOOT 1 from an appliance")
    here.cli("vm", "rm", "-f", "ova").ok()


def test_disks_that_refer_to_other_files_are_refused(here: Installation, tmp_path: Path) -> None:
    base = tiny_disk.raw(tmp_path / "base.raw")
    secret = tmp_path / "secret"
    secret.write_bytes(b"root:x\n" * 1000)
    hostile = tmp_path / "backed.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret)]
    subprocess.run([*command, "-F", "raw", str(hostile)], check=True)
    here.cli("vm", "import", str(hostile), "x").failed(1, "backing file")
    outside = ["-o", f"data_file={tmp_path}/data.raw"]
    external = tiny_disk.converted(base, tmp_path / "external.qcow2", "qcow2", *outside)
    here.cli("vm", "import", str(external), "x").failed(1, "external data file")
    flat = ["-o", "subformat=monolithicFlat"]
    described = tiny_disk.converted(base, tmp_path / "flat.vmdk", "vmdk", *flat)
    here.cli("vm", "import", str(described), "x").failed(1, "other files")
    # A raw disk whose contents look like another format is what it is said to be, or refused.
    here.cli("vm", "import", "--format", "raw", str(hostile), "x").ok()
    here.cli("vm", "rmi", "x").ok()


def test_the_power_button_and_the_disk(here: Installation, machine: str) -> None:
    for count in (1, 2):
        start(here, machine, f"BOOT {count} tiny")
        here.cli("vm", "stop", "-t", "300", machine).ok()
        assert here.cli("inspect", "-f", "{{.State.ExitCode}}", machine).ok().line == "0"
    here.cli("exec", machine, "true").failed(1, "not running")


def test_snapshots_of_a_machine_that_does_not_run(here: Installation, machine: str) -> None:
    start(here, machine, "BOOT 1")
    here.cli("vm", "stop", "-t", "300", machine).ok()
    here.cli("vm", "snapshot", machine, "first").ok()
    here.cli("vm", "snapshot", machine, "first").failed(1, "already")
    start(here, machine, "BOOT 2")
    here.cli("vm", "snapshot", "--restore", machine, "first").failed(1, "no memory")
    here.cli("vm", "stop", "-t", "300", machine).ok()
    here.cli("vm", "snapshot", "--restore", machine, "first").ok()
    assert said(here, machine).count("BOOT 2") == 1
    here.cli("vm", "start", machine).ok()
    until(lambda: said(here, machine).count("BOOT 2") == 2, "the disk as it was", BOOT_S)
    here.cli("vm", "stop", "-t", "300", machine).ok()
    here.cli("vm", "snapshot", "--rm", machine, "first").ok()
    assert here.cli("vm", "snapshot", "-q", machine).ok().out == ""


def test_snapshots_of_a_machine_that_runs(here: Installation, machine: str) -> None:
    start(here, machine, "BOOT 1")
    here.cli("vm", "snapshot", machine, "live").ok()
    assert here.cli("vm", "snapshot", "-q", machine).ok().line == "live"
    here.cli("vm", "snapshot", "--restore", machine, "live").ok()
    here.cli("vm", "snapshot", "--restore", machine, "other").failed(1, "No such snapshot")
    here.cli("vm", "snapshot", "--rm", machine, "live").ok()
    here.cli("vm", "stop", "-t", "300", machine).ok()
    assert said(here, machine).count("BOOT") == 1


def test_disks_grow_and_are_exported(here: Installation, machine: str, tmp_path: Path) -> None:
    here.cli("vm", "resize", machine, "4m").failed(1, "smaller")
    here.cli("vm", "resize", machine, "16m").ok()
    start(here, machine, "BOOT 1")
    here.cli("vm", "resize", machine, "32m").ok()
    out = tmp_path / "out.vmdk"
    here.cli("vm", "export", machine, str(out)).failed(1, "stop it")
    here.cli("vm", "stop", "-t", "300", machine).ok()
    here.cli("vm", "export", machine, str(out)).ok()
    info = subprocess.run(
        ["qemu-img", "info", "-f", "vmdk", out], capture_output=True, text=True, check=True
    )
    assert "33554432 bytes" in info.stdout
    here.cli("vm", "import", str(out), "again").ok()
    here.cli("vm", "rmi", "again").ok()


def test_hardware_changes_while_it_is_off(here: Installation, machine: str) -> None:
    here.cli("vm", "update", "--memory", "128m", machine).ok()
    start(here, machine, "BOOT 1")
    here.cli("vm", "update", "--memory", "64m", machine).failed(1, "stop it")
    machines = here.cli("vm", "inspect", "-f", "{{.Machine.Memory}}", machine).ok()
    assert machines.line == str(128 << 20)


def test_it_outlives_the_engine(here: Installation, machine: str) -> None:
    start(here, machine, "BOOT 1")
    (engine,) = here.pids("bulkhead.engine")
    os.kill(engine, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{engine}").exists(), "the engine's end")
    assert machine in here.cli("ps", "--format", "{{.Names}}").ok().out.split()
    assert "BOOT 1" in said(here, machine)
    here.cli("vm", "stop", "-t", "300", machine).ok()
    assert here.cli("inspect", "-f", "{{.State.ExitCode}}", machine).ok().line == "0"


def test_autostart(here: Installation, machine: str) -> None:
    here.cli("vm", "autostart", machine).ok()
    here.cli("system", "shutdown", "--force").ok()
    until(lambda: not here.processes(), "everything ends")
    here.cli("ps").ok()
    until(lambda: "BOOT 1" in said(here, machine), "it starts with the engine", BOOT_S)
    here.cli("vm", "autostart", machine, "off").ok()


def test_an_image_on_a_pc(here: Installation) -> None:
    done = here.cli("run", "--rm", "--boundary", "vm", "busybox", "sh", "-c",
                    "uname -r; cat /sys/class/dmi/id/product_name; exit 7")  # fmt: skip
    release = (here.root / "kernels/cloud/kernel.json").read_text()
    assert done.code == 7, done.err
    assert done.out.split()[0] in release


def test_the_words_of_containers(here: Installation, machine: str) -> None:
    start(here, machine, "BOOT 1")
    assert machine in here.cli("ps", "-s", "--format", "{{.Names}} {{.Size}}").ok().out
    here.cli("commit", machine, "x").failed(1, "vm export")
    here.cli("exec", machine, "true").failed(1, "vm console")
    here.cli("top", machine).failed(1, machine)
    here.cli("cp", f"{machine}:/x", "-").failed(1, machine)
    here.cli("kill", "-s", "HUP", machine).failed(1, "power button")
    here.cli("pause", machine).ok()
    here.cli("unpause", machine).ok()
    here.cli("kill", machine).ok()
    assert here.cli("inspect", "-f", "{{.State.ExitCode}}", machine).ok().line == "137"


def test_what_a_machine_has_not(here: Installation) -> None:
    here.cli("vm", "create", "--memory", "64m", "x").failed(1, "--size")
    here.cli("vm", "create", "--image", "nothing", "x").failed(1, "No such disk image")
    here.cli("vm", "import", "/dev/null", "Upper").failed(1, "invalid name")
    here.cli("vm", "inspect", "nothing").failed(1, "No such")
    folder = here.root / "machines/work"
    assert not folder.exists() or not list(folder.iterdir())
