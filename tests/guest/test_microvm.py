"""MicroVMs under QEMU: booted, cloned, each with an identity of its own."""

import json
from collections.abc import Iterator

import pytest

from tests.helpers import guest_kernel
from tests.helpers.installation import Done, Installation, installation
from tests.helpers.waiting import until

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


IDENTITY = """cd /proc/sys/kernel/random; cat uuid; cat boot_id; cat /sys/class/net/eth0/address
hostname; hostname -i; head -c 16 /dev/urandom | md5sum; head -c 16 /dev/random | md5sum
cat /proc/self/auxv | md5sum; mktemp -u; sleep 1000"""
KINDS = ("uuid", "boot id", "MAC", "host name", "address", "urandom", "random", "auxv", "libc")


def test_ten_clones_are_not_alike(here: Installation) -> None:
    """Random numbers of the kernel (getrandom, AT_RANDOM, stack addresses), names, addresses."""
    words = ("run", "-d", "--boundary", "microvm", "busybox", "sh", "-c", IDENTITY)
    ids = [here.cli(*words).ok().line for _ in range(10)]
    until(lambda: all(len(said(here, one)) == len(KINDS) for one in ids), "all have said all")
    seen = [said(here, one) for one in ids]
    here.cli("rm", "-f", *ids).ok()
    for number, kind in enumerate(KINDS):
        values = {one[number] for one in seen}
        assert len(values) == 10, f"{kind}: {values}"


def said(here: Installation, name: str) -> list[str]:
    return here.cli("logs", name).ok().out.splitlines()


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


def test_an_idle_guest_does_not_tick(here: Installation) -> None:
    """Its kernel's clock stops when it has nothing to do: what many idle guests cost."""
    script = "until grep -q 'nohz_mode *: 2' /proc/timer_list; do sleep 0.1; done; echo stopped"
    assert run(here, "--privileged", "busybox", "sh", "-c", script).ok().line == "stopped"


def test_nothing_of_its_kernels_protection_is_turned_off(here: Installation) -> None:
    words = run(here, "busybox", "cat", "/proc/cmdline").ok().out.split()
    assert "noreplace-smp" in words
    forbidden = ("mitigations", "spectre", "nopti", "pti=", "init_on_alloc", "rodata", "nosmep")
    assert not [word for word in words if word.startswith(forbidden)]


def test_memory_is_given_back_and_taken_again(here: Installation) -> None:
    """By the balloon; what the workload then needs it gets from it again."""
    fill = "head -c %d /dev/zero > /dev/shm/x; rm /dev/shm/x"
    words = ("--name", "breath", "--shm-size", "150m", "--memory", "256m", "busybox")
    script = f"{fill % (120 << 20)}; echo filled; exec sleep 1000"
    here.cli("run", "-d", "--boundary", "microvm", *words, "sh", "-c", script).ok()

    def used() -> int:
        """Bytes of the jail, as the host counts them."""
        stats = here.cli("stats", "--no-stream", "--format", "{{json .}}", "breath").ok().line
        return _bytes(json.loads(stats)["MemUsage"].partition(" ")[0])

    until(lambda: here.cli("logs", "breath").ok().out == "filled\n", "it has used memory")
    before = used()
    here.cli("update", "--memory", "112m", "--memory-swap", "-1", "breath").ok()
    until(lambda: used() < before - (40 << 20), "it is the host's again")
    here.cli("exec", "breath", "sh", "-c", fill % (40 << 20)).ok()
    here.cli("update", "--memory", "256m", "--memory-swap", "-1", "breath").ok()
    shown = here.cli("exec", "breath", "cat", "/sys/fs/cgroup/memory.max").ok().line
    assert shown == str(256 << 20)
    here.cli("update", "--memory", "300m", "--memory-swap", "-1", "breath").failed(1, "restart")
    here.cli("rm", "-f", "breath").ok()


def _bytes(text: str) -> int:
    number = text.rstrip("KMGTiB")
    return int(float(number) * 1024 ** " KMGT".index(text[len(number) :][:1] or " "))
