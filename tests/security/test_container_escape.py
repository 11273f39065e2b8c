"""Attempts to get out of a container, or to be led out by its image, all of which must fail."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundary.seam import Rootfs
from bulkhead.errors import BulkheadError, CommandNotFound, LaunchFailed
from bulkhead.isolation import capabilities
from bulkhead.isolation.seccomp import profile
from bulkhead.linux import procfs, unwritable
from bulkhead.oci.runtime import DeviceCgroup, Mount, Namespace, Resources, Spec, User
from tests.helpers.container_lab import SAFE, Lab, cannot_run
from tests.helpers.waiting import until

WHY_NOT = cannot_run()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no containers here: {WHY_NOT}")

PROBE_SOURCE = Path(__file__).parents[1] / "helpers/probe.c"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab whose image has the attacks of probe.c as /bin/probe."""
    with Lab(tmp_path_factory.mktemp("escape")) as made:
        compiler = shutil.which("gcc") or shutil.which("cc")
        assert compiler is not None, "a C compiler is needed, as for the package itself"
        subprocess.run(
            [compiler, "-static", "-O1", "-o", made.image / "bin/probe", PROBE_SOURCE], check=True
        )
        yield made


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A directory of the host that nothing may reach, with a file in it."""
    target = tmp_path / "host"
    target.mkdir()
    (target / "secret").write_text("of the host")
    return target


def listing(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def layered(lab: Lab, tmp_path: Path) -> tuple[Path, Rootfs]:
    """A hostile layer over the lab's image: (its directory, the root file system)."""
    layer = tmp_path / "layer"
    layer.mkdir()
    (tmp_path / "upper").mkdir()
    (tmp_path / "work").mkdir()
    lowers = (str(layer), str(lab.image))
    return layer, Rootfs(lowers, str(tmp_path / "upper"), str(tmp_path / "work"))


# --- the image leads mounts astray -------------------------------------------------------------


@pytest.mark.parametrize("climb", ["", "../../../../../../../.."])
def test_mount_target_behind_a_link_stays_inside(
    lab: Lab, host: Path, tmp_path: Path, climb: str
) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "evil").symlink_to(f"{climb}{host}")
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("bound")

    def change(spec: Spec) -> None:
        spec.mounts.append(Mount("/evil", str(source), "bind", ["rbind"]))

    # The link's target does not exist inside: the mount is refused or made inside, never outside.
    try:
        result = lab.shell("cat /evil/file", change, rootfs=rootfs)
    except LaunchFailed as error:
        assert "/evil" in error.message
    else:
        assert result.out == "bound"
    assert listing(host) == ["secret"]


def test_mount_target_below_a_link_is_made_inside(lab: Lab, host: Path, tmp_path: Path) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "evil").symlink_to("/inside")
    (layer / "inside").mkdir()
    source = tmp_path / "source"
    source.write_text("bound")

    def change(spec: Spec) -> None:
        spec.mounts.append(Mount("/evil/a/b", str(source), "bind", ["bind", "ro"]))

    result = lab.shell("cat /inside/a/b; echo x > /evil/a/b", change, rootfs=rootfs)
    assert result.out == "bound"
    assert "Read-only" in result.err
    assert listing(host) == ["secret"]


def test_mount_target_through_a_magic_link_is_refused(lab: Lab, host: Path, tmp_path: Path) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "evil").symlink_to("/proc/1/root")
    (layer / "cwd").symlink_to("/proc/self/cwd")

    for name in ("/evil/x", "/cwd/x"):

        def change(spec: Spec, name: str = name) -> None:
            spec.mounts.append(Mount(name, str(host), "bind", ["rbind"]))

        with pytest.raises(LaunchFailed) as caught:
            lab.shell("true", change, rootfs=rootfs)
        assert name in caught.value.step
    assert not Path("/x").exists()
    assert listing(host) == ["secret"]


def test_link_inside_a_shared_volume_is_not_followed_out(
    lab: Lab, host: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "sub").symlink_to(host)

    def change(spec: Spec) -> None:
        spec.mounts.append(Mount("/vol", str(volume), "bind", ["rbind"]))
        spec.mounts.append(Mount("/vol/sub/x", "tmpfs", "tmpfs", ["mode=755"]))

    # EXDEV/ELOOP, or a directory inside: the host's directory is not touched in any case.
    try:
        lab.shell("true", change)
    except LaunchFailed as error:
        assert "/vol/sub/x" in error.step
    assert listing(host) == ["secret"]


def test_proc_that_is_a_link_does_not_unmask(lab: Lab, tmp_path: Path) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "fake").mkdir()
    (layer / "fake/keys").write_text("bait")
    (layer / "proc").symlink_to("/fake")
    result = lab.shell(
        "stat -c %t:%T /fake/keys; echo x > /fake/sys/kernel/core_pattern; ls /fake/1/exe",
        rootfs=rootfs,
    )
    assert result.out.splitlines() == ["1:3", "/fake/1/exe"]
    assert "Read-only" in result.err


def test_dev_null_of_the_image_is_never_used(lab: Lab, host: Path, tmp_path: Path) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "dev").mkdir()
    (layer / "dev/null").symlink_to(host / "secret")

    def change(spec: Spec) -> None:
        spec.linux.masked_paths.append("/etc/passwd")
        spec.mounts = [m for m in spec.mounts if not m.destination.startswith("/dev")]

    result = lab.shell(
        "stat -c %t:%T /proc/keys /etc/passwd; cat /etc/passwd", change, rootfs=rootfs
    )
    assert result.out.split() == ["1:3", "1:3"]
    assert (host / "secret").read_text() == "of the host"


def test_devices_go_into_our_own_dev(lab: Lab, host: Path, tmp_path: Path) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "dev").symlink_to(host)
    # The link leads nowhere inside: refused, and the host's directory stays as it was.
    with pytest.raises(LaunchFailed) as caught:
        lab.shell("true", rootfs=rootfs)
    assert "/dev" in caught.value.step
    assert listing(host) == ["secret"]


def test_dev_that_is_a_link_inside(lab: Lab, tmp_path: Path) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "dev").symlink_to("elsewhere")
    (layer / "elsewhere").mkdir()
    assert lab.shell("stat -c %t:%T /dev/null", rootfs=rootfs).out == "1:3\n"


# --- what is masked stays masked ---------------------------------------------------------------


def test_masked_and_read_only_paths(lab: Lab) -> None:
    script = """
    for p in /proc/keys /proc/timer_list /proc/interrupts; do stat -c '%n %t:%T' $p; done
    for d in /proc/acpi /proc/scsi /sys/firmware; do [ -d $d ] && ls -A $d; done
    for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/hostname \
        /proc/irq/default_smp_affinity /proc/sysrq-trigger \
        /sys/kernel/uevent_helper /sys/fs/cgroup/memory/tasks; do
        [ -e $f ] || continue
        (echo x > $f) 2>&1 | grep -q -e Read-only -e denied || echo writable $f
    done
    for p in /proc/keys /sys/firmware /proc/sys; do umount $p 2>/dev/null && echo unmounted $p; done
    mount -o remount,rw /sys 2>/dev/null && echo remounted
    mount -o remount,rw,bind /proc/sys 2>/dev/null && echo remounted
    mount -t proc proc /tmp 2>/dev/null && echo mounted
    cat /proc/1/root/proc/keys
    """
    result = lab.shell(script)
    assert result.out.splitlines() == [
        "/proc/keys 1:3",
        "/proc/timer_list 1:3",
        "/proc/interrupts 1:3",
    ]


def test_masks_of_a_bound_proc(lab: Lab) -> None:
    """A configuration that binds the host's /proc still gets its masks."""

    def change(spec: Spec) -> None:
        spec.mounts[0] = Mount("/proc", "/proc", "bind", ["rbind", *SAFE])

    result = lab.shell("stat -c %t:%T /proc/keys; echo x > /proc/sys/kernel/core_pattern", change)
    assert result.out.strip() == "1:3"
    assert "Read-only" in result.err


def test_masks_of_files_and_directories_of_the_image(lab: Lab, tmp_path: Path) -> None:
    layer, rootfs = layered(lab, tmp_path)
    (layer / "private").mkdir()
    (layer / "private/key").write_text("secret")
    (layer / "token").write_text("secret")
    (layer / "alias").symlink_to("token")

    def change(spec: Spec) -> None:
        spec.linux.masked_paths += ["/private", "/alias", "/none/such"]
        spec.linux.readonly_paths += ["/etc", "/nor/this"]

    result = lab.shell("ls -A /private; cat /token; echo x > /etc/passwd", change, rootfs=rootfs)
    assert result.out == ""
    assert "Read-only" in result.err


# --- descriptors and working directory ---------------------------------------------------------


def test_no_descriptors_leak_in(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    assert sorted(procfs.open_fds(running.pid)) == [0, 1, 2]
    assert running.exec(["probe", "fds"]).out == "3\n"
    inside = running.start_exec(["sleep", "1000"])
    assert sorted(procfs.open_fds(inside.pid)) == [0, 1, 2]
    running.kill()
    inside.wait()


@pytest.mark.parametrize("number", range(3, 24))
def test_working_directory_through_a_descriptor(lab: Lab, number: int) -> None:
    """CVE-2024-21626: a working directory that is one of the launcher's descriptors."""

    def change(spec: Spec) -> None:
        assert spec.process is not None
        spec.process.cwd = f"/proc/self/fd/{number}"

    with pytest.raises(LaunchFailed):
        lab.run(["ls"], change)


def test_program_and_directory_of_exec_through_a_descriptor(lab: Lab, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copy(lab.image / "bin/busybox", outside)
    running = lab.start(["sleep", "1000"])
    for number in range(3, 24):
        climb = f"/proc/self/fd/{number}/../../../../../../../../../..{outside}"
        for path in (climb, f"/proc/self/fd/{number}"):
            with pytest.raises(BulkheadError) as caught:
                running.exec([path, "true"])
            assert isinstance(caught.value, LaunchFailed)
        with pytest.raises(LaunchFailed):
            running.exec(["ls"], cwd=f"/proc/self/fd/{number}")
    running.kill()


@pytest.mark.parametrize("number", range(3, 24, 4))
def test_first_program_through_a_descriptor(lab: Lab, tmp_path: Path, number: int) -> None:
    outside = tmp_path / "outside"
    shutil.copy(lab.image / "bin/busybox", outside)
    with pytest.raises(LaunchFailed):
        lab.run([f"/proc/self/fd/{number}/../../../../../../../../../..{outside}", "true"])


def test_exec_cannot_be_spied_upon(lab: Lab) -> None:
    """CVE-2016-9962, CVE-2019-5736: while exec enters, a process inside watches /proc."""
    running = lab.start(["probe", "spy", "/stop"])
    for _ in range(30):
        assert running.exec(["true"]).code == 0
    running.exec(["touch", "/stop"])
    result = running.wait()
    lab.do(running.container.delete(force=True))
    assert result.out == "nothing\n"


def test_holder_program_cannot_be_written_from_inside(lab: Lab) -> None:
    """CVE-2019-5736: a container that makes the launcher's own program its own, to overwrite it."""
    running = lab.start(["probe", "overwrite", "/stop"])
    for _ in range(20):
        running.exec(["/proc/self/exe", "/tmp/x.sock", "1"])
    running.exec(["touch", "/stop"])
    result = running.wait()
    lab.do(running.container.delete(force=True))
    # While a holder runs its file is busy for everybody; what protects it later is the mount.
    assert result.out in ("", "Text file busy\n", "Read-only file system\n"), result.out
    assert os.statvfs(f"/proc/{lab.holder.pid}/exe").f_flag & os.ST_RDONLY


def test_sealed_copy_is_sealed(tmp_path: Path) -> None:
    """What serves in place of the read-only mount where mounting is not allowed."""
    program = tmp_path / "program"
    shutil.copy("/bin/true", program)
    with unwritable.sealed_copy(str(program)) as copy:
        with pytest.raises(PermissionError):
            os.write(int(copy), b"x")
        path = f"/proc/self/fd/{int(copy)}"
        assert subprocess.run([path], pass_fds=[int(copy)], check=False).returncode == 0


# --- system calls ------------------------------------------------------------------------------

ATTACKS = ["mount", "fsmount", "setns", "handle"]


@pytest.mark.parametrize("filtered", [True, False])
def test_privileged_calls_are_refused(lab: Lab, filtered: bool) -> None:
    def change(spec: Spec) -> None:
        if filtered:
            spec.linux.seccomp = profile.default_for(frozenset(capabilities.select()))

    script = "; ".join(f"probe {attack}" for attack in ATTACKS)
    result = lab.shell(script, change)
    assert result.out.splitlines() == ["Operation not permitted"] * len(ATTACKS)


def test_filter_refuses_user_namespaces(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.linux.seccomp = profile.default_for(frozenset(capabilities.select()))

    assert lab.run(["probe", "userns"], change).out == "Operation not permitted\n"


def test_chroot_does_not_lead_out(lab: Lab, host: Path) -> None:
    result = lab.run(["probe", "chroot", str(host / "secret")])
    assert result.out == "No such file or directory\n"


def test_processes_outside_are_invisible(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    result = running.exec(["sh", "-c", f"ls -d /proc/[0-9]*; probe ptrace {os.getpid()}"])
    assert "No such process" in result.out
    assert {line for line in result.out.splitlines() if line.startswith("/proc/")} <= {
        f"/proc/{number}" for number in range(1, 10)
    }
    running.kill()


def test_device_nodes_do_not_open(lab: Lab, tmp_path: Path) -> None:
    """mknod is Docker's default; opening what it makes is what the device rules forbid."""
    disk = os.stat("/").st_dev
    major, minor = os.major(disk), os.minor(disk)
    if major == 0:
        pytest.skip("the root file system has no device")

    def change(spec: Spec) -> None:
        spec.linux.resources = Resources(
            devices=[
                DeviceCgroup(False),
                DeviceCgroup(True, "c", None, None, "m"),
                DeviceCgroup(True, "b", None, None, "m"),
                DeviceCgroup(True, "c", 1, 3, "rwm"),
            ]
        )

    result = lab.shell(
        f"mknod /tmp/disk b {major} {minor} && echo made; head -c 1 /tmp/disk;"
        " echo x > /dev/null && echo null",
        change,
    )
    assert result.out.splitlines() == ["made", "null"]
    assert "Operation not permitted" in result.err


def test_keys_of_the_launcher_are_out_of_reach(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    assert running.exec(["probe", "add-key", "bulkhead-test"]).out == "ok\n"
    assert running.exec(["probe", "find-key", "bulkhead-test"]).out != "ok\n"
    assert lab.run(["probe", "find-key", "bulkhead-test"]).out != "ok\n"
    running.kill()


def test_capabilities_follow_the_user(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        assert spec.process is not None
        assert spec.process.capabilities is not None
        spec.process.user = User(1000, 1000, additional_gids=[10])
        spec.process.capabilities.effective = []
        spec.process.capabilities.permitted = []
        spec.process.no_new_privileges = True

    result = lab.shell("grep -e ^Cap -e ^NoNew /proc/self/status; id; touch /etc/x", change)
    lines = dict(line.split(":\t") for line in result.out.splitlines() if ":\t" in line)
    assert {int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert lines["NoNewPrivs"] == "1"
    assert "uid=1000(alice) gid=1000(alice) groups=10(wheel)" in result.out
    assert "Permission denied" in result.err


def test_shared_pid_namespace_hides_the_launch(lab: Lab) -> None:
    """With the host's PID namespace the child is undumpable until its exec."""
    running = lab.start(["sleep", "1000"])

    def change(spec: Spec) -> None:
        spec.linux.namespaces = [n for n in spec.linux.namespaces if n.type_ != "pid"]
        spec.linux.namespaces.append(Namespace("pid", f"/proc/{running.pid}/ns/pid"))

    second = lab.start(["sleep", "1000"], change)
    assert running.exec(["sh", "-c", "ps | grep -c '[s]leep 1000'"]).out == "2\n"
    running.kill()
    until(lambda: not Path(f"/proc/{second.pid}/exe").exists(), "the namespace ended")
    second.wait()
    lab.do(second.container.delete(force=True))


def test_missing_program_says_so(lab: Lab) -> None:
    with pytest.raises(CommandNotFound, match="executable file not found in \\$PATH"):
        lab.run(["no-such-program"])
    with pytest.raises(CommandNotFound, match="stat /no/such: no such file or directory"):
        lab.run(["/no/such"])


def test_tmpfs_and_shm_refuse_programs(lab: Lab) -> None:
    result = lab.shell("cp /bin/busybox /dev/shm/x; /dev/shm/x true")
    assert "Permission denied" in result.err
    mode = lab.shell("stat -c %a /dev/shm /dev/pts /dev")
    assert mode.out.split() == ["1777", "755", "755"]
