"""Whole machines' hardware: screens, discs, firmware, processors, memory and disks with limits."""

import datetime
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import guest_kernel, packages, tiny_disk, vm_disk
from tests.helpers.installation import Installation, installation
from tests.helpers.rfb import Rfb
from tests.helpers.waiting import until

MISSING = (
    guest_kernel.missing() or tiny_disk.missing() or packages.missing(*tiny_disk.DISC_PACKAGES)
)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
BOOT_S = 300.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("hardware")
    guest_kernel.provide(folder / "root")
    with installation(folder) as made:
        disk = tiny_disk.raw(folder / "tiny.raw")
        made.cli("vm", "import", str(disk), "tiny").ok()
        yield made


def said(here: Installation, name: str) -> str:
    return here.cli("logs", name).ok().out.replace("\r", "")


def make(here: Installation, name: str, *words: str, expected: str = "BOOT 1") -> None:
    """A machine that runs and has said `expected`."""
    here.cli("vm", "create", "--memory", "64m", "--no-seed", *words, "--start", name).ok()
    until(lambda: expected in said(here, name), f"{name} says {expected!r}", BOOT_S)


def off(here: Installation, name: str) -> bool:
    return here.cli("inspect", "-f", "{{.State.Running}}", name).ok().line == "false"


def gone(here: Installation, name: str) -> None:
    here.cli("vm", "rm", "-f", name).ok()


def test_a_screen(here: Installation) -> None:
    make(here, "screen", "--image", "tiny", "--screen")
    path = here.cli("vm", "screen", "screen").ok().line.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(BOOT_S)
        folder = os.open(os.path.dirname(path), os.O_PATH)
        sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        os.close(folder)
        direct = Rfb(sock)
        assert direct.width >= 640
        assert direct.height >= 350
        until(lambda: len(set(direct.picture())) > 1, "something else than black", BOOT_S)
    with here.popen("vm", "screen", "--listen", "0", "screen") as leading:
        try:
            assert leading.stdout is not None
            port = int(leading.stdout.readline().decode().rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), BOOT_S) as sock:
                assert Rfb(sock).version == b"RFB 003.008\n"
        finally:
            leading.kill()
    gone(here, "screen")
    make(here, "blind", "--image", "tiny")
    here.cli("vm", "screen", "blind").failed(1, "--screen")
    gone(here, "blind")


def test_a_system_is_installed_from_a_disc(here: Installation, tmp_path: Path) -> None:
    disc = tiny_disk.installer(tmp_path / "installer.iso", "from a disc")
    words = ("--iso", str(disc), "--firmware", "bios", "--size", "8m")
    make(here, "fresh", *words, expected="INSTALLED")
    until(lambda: off(here, "fresh"), "the installer switches it off", BOOT_S)
    assert "NOT" not in said(here, "fresh")
    here.cli("vm", "start", "fresh").ok()
    until(lambda: "BOOT 1 from a disc" in said(here, "fresh"), "the installed system", BOOT_S)
    gone(here, "fresh")


def test_a_disc_for_uefi(here: Installation, tmp_path: Path) -> None:
    if reason := vm_disk.missing():
        pytest.skip(reason)
    vm_disk.firmware_for(here)
    disc = tiny_disk.uefi_disc(tmp_path / "uefi.iso", "HELLO FROM UEFI")
    make(here, "uefi", "--iso", str(disc), "--size", "8m", expected="HELLO FROM UEFI")
    found = here.cli("vm", "inspect", "-f", "{{.Machine.Firmware}}", "uefi").ok()
    assert found.line == "uefi"
    until(lambda: off(here, "uefi"), "it switches itself off", BOOT_S)
    gone(here, "uefi")


@pytest.mark.parametrize("kind", ["vhd", "vhdx", "vdi", "raw"])
def test_disks_are_written_in_every_format(here: Installation, tmp_path: Path, kind: str) -> None:
    name = f"out-{kind}"
    here.cli("vm", "create", "--memory", "64m", "--no-seed", "--image", "tiny", name).ok()
    file = tmp_path / f"disk.{kind}"
    here.cli("vm", "export", name, str(file)).ok()
    plain = tmp_path / "plain.raw"
    known = {"vhd": "vpc"}.get(kind, kind)
    convert = ["qemu-img", "convert", "-f", known, "-O", "raw", str(file), str(plain)]
    subprocess.run(convert, check=True)
    original = tiny_disk.raw(tmp_path / "tiny.raw").read_bytes()
    assert plain.read_bytes()[: len(original)] == original
    imported = here.cli("vm", "import", str(file), f"in-{kind}").ok().out
    assert f"({known})" in imported
    gone(here, name)
    make(here, name, "--image", f"in-{kind}")
    gone(here, name)


def vcpus(here: Installation, name: str) -> dict[int, str]:
    """Which processors of the host each of the machine's may run on."""
    pid = int(here.cli("inspect", "-f", "{{.State.Pid}}", name).ok().line)
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        words = (task / "comm").read_text().replace("/", " ").split()
        if words[0] in ("CPU", "ALL"):
            status = (task / "status").read_text()
            (line,) = [one for one in status.splitlines() if one.startswith("Cpus_allowed_list")]
            found[int(words[1]) if words[1].isdecimal() else 0] = line.split()[1]
    return found


def test_processors_are_pinned(here: Installation) -> None:
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("needs two processors")
    first, second = mine[:2]
    pair = f"{first},{second}"
    make(here, "pair", "--image", "tiny", "--cpus", "2", "--cpuset-cpus", pair)
    assert vcpus(here, "pair") == {0: str(first), 1: str(second)}
    gone(here, "pair")
    make(here, "one", "--image", "tiny", "--cpuset-cpus", str(second))
    assert vcpus(here, "one") == {0: str(second)}
    gone(here, "one")


def resident(here: Installation, name: str) -> int:
    """Bytes of memory that the machine's QEMU has."""
    pid = int(here.cli("inspect", "-f", "{{.State.Pid}}", name).ok().line)
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [one for one in status.splitlines() if one.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def test_reserved_memory_is_taken_at_the_start(here: Installation) -> None:
    size = 192 * MIB
    make(here, "lazy", "--image", "tiny", "--memory", str(size))
    make(here, "sure", "--image", "tiny", "--memory", str(size), "--reserve-memory", str(size))
    assert resident(here, "lazy") < size <= resident(here, "sure")
    gone(here, "lazy")
    gone(here, "sure")


def between(here: Installation, name: str, first: str, second: str) -> float:
    """Seconds from one line of its log to another."""
    lines = here.cli("logs", "-t", name).ok().out.splitlines()

    def moment(word: str) -> datetime.datetime:
        (line,) = [one for one in lines if word in one]
        return datetime.datetime.fromisoformat(line.split()[0][:26] + "+00:00")

    return (moment(second) - moment(first)).total_seconds()


@pytest.mark.parametrize(
    ("limit", "least_s"), [(("--iops", "20"), 1.0), (("--bps", str(80 << 10)), 1.0)]
)
def test_disks_are_limited(
    here: Installation, tmp_path: Path, limit: tuple[str, str], least_s: float
) -> None:
    """60 reads of 4 KiB at 20 in a second, or at 80 KiB a second, take three seconds."""
    name = f"slow{limit[0]}"
    disk = tiny_disk.raw(tmp_path / "reads.raw", "then", reads=60)
    here.cli("vm", "import", str(disk), name).ok()
    make(here, name, "--image", name, *limit, expected="READ")
    assert between(here, name, "BOOT", "READ") > least_s
    gone(here, name)
