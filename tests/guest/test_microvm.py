"""MicroVMs under QEMU: booted, cloned, each with an identity of its own."""

from collections.abc import Iterator

import pytest

from tests.helpers import guest_kernel
from tests.helpers.installation import Done, Installation, installation

MISSING = guest_kernel.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("microvm")
    guest_kernel.provide(folder / "root")
    with installation(folder) as made:
        made.load_busybox(folder)
        yield made


def run(here: Installation, *words: str) -> Done:
    return here.cli("run", "--rm", "--boundary", "microvm", *words)


def test_it_has_a_kernel_of_its_own(here: Installation) -> None:
    release = (here.root / "kernels/cloud/kernel.json").read_text()
    assert run(here, "busybox", "uname", "-r").ok().line in release


def test_clones_are_not_alike(here: Installation) -> None:
    script = "cd /proc/sys/kernel/random; cat uuid boot_id; cat /sys/class/net/eth0/address"
    script += "; hostname; head -c 16 /dev/urandom | md5sum"
    seen = [run(here, "busybox", "sh", "-c", script).ok().out.split("\n") for _ in range(3)]
    for number, kind in enumerate(("uuid", "boot id", "MAC", "host name", "bytes")):
        values = {one[number] for one in seen}
        if kind != "MAC":  # which goes with the address, and that is free again
            assert len(values) == 3, kind
        assert all(values), kind


def test_sizes_of_disks_are_the_clones_own(here: Installation) -> None:
    words = ("busybox", "sh", "-c", "cat /proc/partitions; dd if=/dev/zero of=/x bs=1M count=8")
    for size, blocks in (("64m", 65536), ("128m", 131072)):
        done = run(here, "--storage-opt", f"size={size}", *words).ok()
        assert str(blocks) in done.out.split()


def test_several_processors_are_booted(here: Installation) -> None:
    done = run(here, "--cpus", "2", "busybox", "grep", "-c", "^processor", "/proc/cpuinfo").ok()
    assert done.line in ("1", "2")


def test_too_little_memory_is_refused_in_words(here: Installation) -> None:
    run(here, "--memory", "32m", "busybox", "true").failed(125, "at least 96m")


def test_the_workload_is_confined_in_the_guest(here: Installation) -> None:
    script = "grep -E 'CapEff|Seccomp:' /proc/self/status; ls /sys/firmware | wc -l"
    done = run(here, "--cap-drop", "ALL", "busybox", "sh", "-c", script).ok()
    assert done.out.split() == ["CapEff:", "0000000000000000", "Seccomp:", "2", "0"]


def test_a_template_outlives_its_engine_and_nobody_else_can_read_it(here: Installation) -> None:
    run(here, "busybox", "true").ok()
    found = {path.name: path.stat() for path in (here.root / "templates").iterdir()}
    assert found
    assert {info.st_mode & 0o777 for info in found.values()} == {0o600}
    here.cli("system", "shutdown").ok()
    run(here, "busybox", "true").ok()
    after = {path.name: path.stat() for path in (here.root / "templates").iterdir()}
    assert {name: info.st_ino for name, info in after.items()} == {
        name: info.st_ino for name, info in found.items()
    }
