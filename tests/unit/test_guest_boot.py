"""What a guest boots from: initramfs, kernels, disks, the jail's root and its configuration."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bulkhead.boundaries import jail, sandbox_syscalls
from bulkhead.boundaries.guest import disks, initramfs, kernels
from bulkhead.boundary.seam import Bundle, Rootfs
from bulkhead.errors import Conflict, Invalid, NotFound, Unsupported
from bulkhead.home import Home
from bulkhead.isolation.seccomp.compile import compile_filter, unknown_names
from bulkhead.linux import elf
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import CPU, Linux, Memory, Namespace, Pids, Process, Resources, Spec
from tests.helpers.elf_files import relocatable


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(str(tmp_path / "root"), str(tmp_path / "run"))


def _modules(folder: Path) -> Path:
    """A module tree: c needs b needs a; d is built in."""
    modules = folder / "6.0.0"
    modules.mkdir()
    for name in "abc":
        (modules / f"{name}.ko").write_bytes(name.encode())
    (modules / "modules.dep").write_text("a.ko:\nb.ko: a.ko\nc.ko: b.ko a.ko\n")
    (modules / "modules.builtin").write_text("kernel/d.ko\n")
    return modules


# --- kernels -------------------------------------------------------------------------------------


def test_a_kernel_is_added_found_and_removed(home: Home, tmp_path: Path) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(b"kernel")
    made = kernels.add(home, "mine", str(image), str(_modules(tmp_path)))
    assert (made.release, made.kind) == ("6.0.0", "linux")
    assert Path(made.path).read_bytes() == b"kernel"
    found = kernels.find(home, "mine")
    assert found == made
    names = [os.path.basename(path) for path in found.module_files(["c", "d"])]
    assert names == ["a.ko", "b.ko", "c.ko"]
    with pytest.raises(Unsupported, match="no module nosuch"):
        found.module_files(["nosuch"])
    with pytest.raises(Conflict, match="there already"):
        kernels.add(home, "mine", str(image))
    kernels.remove(home, "mine")
    with pytest.raises(NotFound, match="No such kernel: mine"):
        kernels.find(home, "mine")
    assert os.listdir(home.in_root("kernels")) == []


@pytest.mark.parametrize("name", ["uml", "initramfs", "../x", "", "A", "a/b", "-x"])
def test_bad_names_of_kernels_are_refused(home: Home, tmp_path: Path, name: str) -> None:
    (tmp_path / "k").write_bytes(b"")
    with pytest.raises(Invalid, match="invalid kernel name"):
        kernels.add(home, name, str(tmp_path / "k"))
    with pytest.raises(Invalid, match="invalid kernel name"):
        kernels.remove(home, name)


def test_a_kernel_that_cannot_be_read_leaves_nothing(home: Home, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="cannot add the kernel"):
        kernels.add(home, "mine", str(tmp_path / "nosuch"))
    assert os.listdir(home.in_root("kernels")) == []


# --- initramfs -----------------------------------------------------------------------------------


def test_an_initramfs_is_a_cpio_archive_and_made_once(home: Home, tmp_path: Path) -> None:
    init = tmp_path / "guest-init"
    init.write_bytes(b"\x7fELF init")
    (tmp_path / "bulkhead-init").write_bytes(b"\x7fELF reaper")
    modules = _modules(tmp_path)
    files = [str(modules / name) for name in ("a.ko", "b.ko")]
    small = relocatable([(".text", 1, b"code")])
    for name in files:
        Path(name).write_bytes(small)
    made = initramfs.build(home, str(init), files, early=files[:1])
    assert made.modules == ("/modules/a.ko", "/modules/b.ko")
    entries = _cpio(Path(made.path).read_bytes())
    assert entries["init"] == (0o100755, b"\x7fELF init")
    assert entries["bulkhead-init"] == (0o100755, b"\x7fELF reaper")
    assert entries["modules/b.ko"] == (0o100644, small)
    assert entries["modules/order"][1] == b"/modules/a.ko\n"
    assert entries["dev/console"][0] == 0o020600
    assert initramfs.build(home, str(init), files, early=files[:1]) == made
    assert initramfs.build(home, str(init), files).path != made.path


def _cpio(data: bytes) -> dict[str, tuple[int, bytes]]:
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = at + 110 + fields[11]
        start += -start % 4
        end = start + fields[6]
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data[start:end])
        at = end + -end % 4


# --- disks ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="mke2fs is not installed")
def test_a_disk_is_sparse_a_file_system_and_kept(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    disks.make_disk(home, str(path), 64 << 20, uid=os.getuid())
    info = path.stat()
    assert (info.st_size, info.st_mode & 0o777) == (64 << 20, 0o600)
    assert info.st_blocks * 512 < 4 << 20
    with path.open("r+b") as file:
        file.seek(0x438)
        assert struct.unpack("<H", file.read(2)) == (0xEF53,)
        file.seek(0)
        file.write(b"mine")
    disks.make_disk(home, str(path), 64 << 20, uid=os.getuid())
    assert path.read_bytes()[:4] == b"mine"


def test_a_disk_too_small_for_a_file_system_is_refused(home: Home, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="at least 16 MiB"):
        disks.make_disk(home, str(tmp_path / "disk"), 1 << 20, uid=0)


# --- programs and their libraries ----------------------------------------------------------------


def test_libraries_are_those_the_loader_names() -> None:
    program = shutil.which("ls")
    ldd = shutil.which("ldd")
    if program is None or ldd is None:
        pytest.skip("needs ls and ldd")
    done = subprocess.run([ldd, program], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "vdso" not in line]
    wanted = {line.split()[0].rpartition("/")[2] for line in lines}
    assert {os.path.basename(path) for path in elf.closure(program)} == wanted | {"ls"}


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_what_is_no_program_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "program"
    path.write_bytes(data)
    with pytest.raises(elf.ElfError):
        elf.closure(str(path))


# --- the jail ------------------------------------------------------------------------------------


def test_a_jails_root_has_nothing_but_what_is_needed(home: Home) -> None:
    roots = jail.Roots(home)
    text = {"/etc/fact": b"text"}
    root = roots.make("kind", {"/usr/bin/monitor": sys.executable}, text)
    inside = Path(root.directory)
    assert (inside / "usr/bin/monitor").stat().st_size == os.stat(sys.executable).st_size
    assert (inside / "etc/fact").read_bytes() == b"text"
    assert sorted(os.listdir(inside / "disks"), key=int) == [str(n) for n in range(jail.DISKS)]
    assert not (inside / "proc").exists()
    assert not list(inside.rglob("sh"))
    again = jail.Roots(home).make("kind", {"/usr/bin/monitor": sys.executable}, text)
    assert again.directory == root.directory
    other = roots.make("kind", {"/usr/bin/monitor": sys.executable}, {"/etc/fact": b"other"})
    assert other.directory != root.directory


def _jail(**more: object) -> jail.Jail:
    values: dict[str, object] = {
        "root": jail.JailRoot("/root-of-jail", "/lib"), "args": ["monitor"],
        "seccomp": sandbox_syscalls.profile(), "disks": [("/layer", False), ("/upper", True)],
        "guest_bytes": 128 << 20, "overhead_bytes": 64 << 20, "tasks": 24, "terminal": False,
    }  # fmt: skip
    return jail.Jail(**(values | more))  # type: ignore[arg-type]


def test_a_jail_has_no_powers_and_the_workloads_limits(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.touch()
    os.truncate(upper, 20 << 30)
    resources = Resources(
        memory=Memory(limit=128 << 20, swap=256 << 20), pids=Pids(10), cpu=CPU(quota=50000)
    )
    linux = Linux(
        namespaces=[Namespace("network", "/proc/1/ns/net"), Namespace("pid")],
        resources=resources,
        cgroups_path="/x/y",
    )
    spec = Spec(process=Process(args=["workload"], oom_score_adj=5), linux=linux)
    bundle = Bundle("a" * 64, spec, Rootfs(), "/run/w")
    with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as fd:
        own = _jail(disks=[("/layer", False), (str(upper), True)])
        made = jail.jail_bundle(bundle, own, (int(fd),))
    process, inside = made.spec.process, made.spec.linux
    assert process is not None and process.capabilities is not None
    sets = process.capabilities
    assert not (sets.bounding or sets.permitted or sets.effective or sets.ambient)
    assert process.no_new_privileges and process.oom_score_adj == 5
    assert {one.type_: one.hard for one in process.rlimits}["RLIMIT_FSIZE"] == 20 << 30
    assert process.user.uid == process.user.gid == jail.uid_of("a" * 64) > 1 << 30
    assert made.spec.root is not None and made.spec.root.readonly
    kinds = {n.type_: n.path for n in inside.namespaces}
    assert kinds.pop("network") == "/proc/1/ns/net"
    assert kinds == dict.fromkeys(("mount", "pid", "ipc", "uts", "cgroup"), "")
    limits = inside.resources
    assert limits is not None and limits.memory is not None and limits.pids is not None
    assert limits.memory.limit == (128 + 64) << 20
    assert limits.memory.swap == (256 + 64) << 20
    assert limits.pids.limit == 34
    assert limits.cpu is not None and limits.cpu.quota == 50000
    assert resources.memory is not None and resources.memory.limit == 128 << 20
    places = {mount.destination: mount.options for mount in made.spec.mounts}
    assert "ro" in places["/disks/0"] and "rw" in places["/disks/1"]
    assert all("nosuid" in options for options in places.values())
    assert "/proc" not in places and "/sys" not in places


def test_users_of_jails_differ() -> None:
    assert len({jail.uid_of(f"{number:064x}") for number in range(200)}) == 200


def test_the_list_of_system_calls_is_whole() -> None:
    """Each has a reason, none twice, none that leads out; and it compiles."""
    names = [name for names, reason in sandbox_syscalls.CALLS for name in names.split() if reason]
    assert len(names) == len(set(names))
    dangerous = (
        "mount umount2 pivot_root setns unshare bpf init_module keyctl open_by_handle_at chroot "
        "process_vm_readv process_vm_writev userfaultfd io_uring_setup perf_event_open mknod "
        "mknodat setuid setresuid personality"
    )
    assert not set(dangerous.split()) & set(names)
    assert compile_filter(sandbox_syscalls.profile(), machine="x86_64").program
    assert not unknown_names(sandbox_syscalls.profile())
