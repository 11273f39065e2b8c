"""Containers whose root is nobody on the host: user namespaces, mapped layers, mapped binds."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.errors import BulkheadError
from bulkhead.linux import namespaces, procfs
from bulkhead.oci.runtime import Capabilities, IDMapping, Mount, Namespace, Spec, User
from tests.helpers.container_lab import SAFE, Lab, cannot_run

FIRST, COUNT = 300000, 65536
WHY_NOT = cannot_run()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no containers here: {WHY_NOT}")


def mapped(spec: Spec) -> None:
    spec.linux.namespaces.append(Namespace("user"))
    spec.linux.uid_mappings = [IDMapping(0, FIRST, COUNT)]
    spec.linux.gid_mappings = [IDMapping(0, FIRST, COUNT)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("userns")) as made:
        try:
            made.run(["true"], mapped)
        except BulkheadError as error:
            pytest.skip(f"no containers with user namespaces here: {error}")
        yield made


def test_root_inside_is_nobody_outside(lab: Lab) -> None:
    rootfs = lab.rootfs("mapped")
    lab.shell("echo x > /new", mapped, rootfs=rootfs)
    running = lab.start(["sleep", "1000"], mapped, rootfs=rootfs)
    status = procfs.status(running.pid)
    assert status["Uid"].split() == [str(FIRST)] * 4
    assert status["Gid"].split() == [str(FIRST)] * 4
    for kind in ("user", "mount", "pid", "network", "uts", "ipc", "cgroup"):
        own = namespaces.identity(running.pid, kind)
        assert own != namespaces.identity("self", kind), kind
    result = running.exec(["sh", "-c", "id -u; stat -c '%u %g' / /etc/passwd /new; id -G"])
    assert result.out.split() == ["0"] * 8, result.err
    assert running.exec(["cat", "/proc/self/uid_map"]).out.split() == ["0", str(FIRST), str(COUNT)]
    running.kill()
    # On the disk the layers keep the image's owners: nothing was changed, nothing copied.
    assert rootfs.upper is not None
    assert os.stat(Path(rootfs.upper) / "new").st_uid == 0


def test_file_systems_and_devices(lab: Lab) -> None:
    script = """
    echo x > /dev/null && head -c 2 /dev/zero | wc -c
    stat -c '%n %u:%g' /dev /dev/pts /dev/shm /sys/kernel
    touch /dev/shm/x /tmp/y && mkdir /made && chown 1000:1000 /made && stat -c %u /made
    [ -e /sys/fs/cgroup ] && echo cgroup; [ -e /proc/1/status ] && echo proc
    stat -c '%t:%T' /proc/keys; (echo x > /proc/sys/kernel/core_pattern) 2>&1 | grep -c Read-only
    mknod /tmp/disk b 8 0 2>&1 | grep -c 'not permitted'
    """
    result = lab.shell(script, mapped)
    assert result.out.splitlines() == [
        "2",
        "/dev 0:0",
        "/dev/pts 0:0",
        "/dev/shm 0:0",
        "/sys/kernel 65534:65534",
        "1000",
        "cgroup",
        "proc",
        "1:3",
        "1",
        "1",
    ]


def test_user_in_a_user_namespace(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        mapped(spec)
        assert spec.process is not None
        spec.process.user = User(1000, 1000, additional_gids=[10])

    running = lab.start(["sleep", "1000"], change)
    assert procfs.status(running.pid)["Uid"].split()[0] == str(FIRST + 1000)
    assert running.exec(["id", "-u"], user=User(7, 8)).out == "7\n"
    running.kill()


def test_network_namespace_of_the_host(lab: Lab) -> None:
    """One that was made outside is joined first; its sysfs and settings are its own."""
    first = lab.start(["sleep", "1000"])

    def change(spec: Spec) -> None:
        mapped(spec)
        spec.linux.namespaces = [n for n in spec.linux.namespaces if n.type_ != "network"]
        spec.linux.namespaces.append(Namespace("network", f"/proc/{first.pid}/ns/net"))
        spec.linux.sysctl = {"net.ipv4.ip_unprivileged_port_start": "7", "kernel.msgmax": "4096"}

    result = lab.shell(
        "ls /sys/class/net; cat /proc/sys/net/ipv4/ip_unprivileged_port_start"
        " /proc/sys/kernel/msgmax",
        change,
    )
    assert result.out.split() == ["lo", "7", "4096"]
    first.kill()


def test_privileges_end_at_the_namespace(lab: Lab, tmp_path: Path) -> None:
    """Every capability inside, and still nobody on the host."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    secret.chmod(0o600)

    def change(spec: Spec) -> None:
        mapped(spec)
        assert spec.process is not None
        everything = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_CHOWN", "CAP_MKNOD"]
        spec.process.capabilities = Capabilities(everything, everything, everything)
        spec.mounts.append(Mount("/secret", str(secret), "bind", ["bind"]))

    script = """
    cat /secret; chown 0 /secret; umount /proc/keys; mount -o remount,rw,bind /proc/sys
    mount -t tmpfs none /tmp && echo mounted
    """
    result = lab.shell(script, change)
    assert "of the host" not in result.out
    assert "mounted" in result.out
    assert os.stat(secret).st_uid == 0


def test_mapped_bind(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.chown(tmp_path / "file", 1000, 1000)
    tmp_path.chmod(0o755)

    def change(spec: Spec) -> None:
        mapped(spec)
        spec.mounts += [
            Mount("/mapped", str(tmp_path), "bind", ["rbind", "idmap"]),
            Mount("/plain", str(tmp_path), "bind", ["rbind", *SAFE]),
        ]

    result = lab.shell("stat -c %u /mapped/file /plain/file; echo x > /mapped/new", change)
    assert result.out.split() == ["1000", "65534"]
    assert os.stat(tmp_path / "new").st_uid == 0
