"""What a guest is told: the frames of a bundle."""

from pathlib import Path

import pytest

from bulkhead.boundaries.guest import frames, plan
from bulkhead.boundaries.guest.frames import Decoder, Mode, Type
from bulkhead.boundaries.guest.plan import Disk, Machine, Share
from bulkhead.boundary.seam import Bundle, Rootfs
from bulkhead.errors import Invalid, Unsupported
from bulkhead.oci.runtime import (
    Device,
    Mount,
    Namespace,
    Pids,
    Process,
    Resources,
    Rlimit,
    Spec,
)
from tests.helpers.container_lab import default_spec

MACHINE = Machine(("/dev/vda", "/dev/vdb"), "/dev/vdc", ("/modules/erofs.ko",))


def made(spec: Spec, machine: Machine = MACHINE, *, terminal: bool = False) -> plan.Planned:
    return plan.start(Bundle("w", spec, Rootfs(), "/nowhere"), machine, terminal=terminal)


def decoded(planned: plan.Planned) -> list[frames.Frame]:
    return Decoder().feed(planned.frames)


def test_set_up_then_the_main_program_then_the_end() -> None:
    found = decoded(made(default_spec(["true"])))
    assert [(f.type, f.id) for f in found] == [
        (Type.RUN, plan.SETUP),
        (Type.RUN, plan.MAIN),
        (Type.SHUTDOWN, 0),
    ]
    assert found[-1].payload == b"/upper\0"


def test_without_write_back_the_guest_is_not_asked_to_end() -> None:
    machine = Machine(("/dev/vda",), "/dev/vdb", write_back=False)
    assert [f.type for f in decoded(made(default_spec(["true"]), machine))] == [Type.RUN, Type.RUN]


def test_the_listing_says_what_happens() -> None:
    text = "\n".join(made(default_spec(["true"])).listing)
    for step in (
        "load module /modules/erofs.ko",
        "mount('/dev/vda', '/layers/0', 'erofs', 1, NULL)",
        "mount('/dev/vdb', '/layers/1', 'erofs', 1, NULL)",
        "mount('/dev/vdc', '/upper', 'ext4'",
        "lowerdir=512:513,upperdir=514,workdir=515",
        "pivot the root",
        "execute the program",
    ):
        assert step in text
    assert "lowerdir+" not in text  # guests' kernels are older than it


def test_the_network_namespace_is_the_guests() -> None:
    spec = plan.guest_spec(default_spec(["true"]))
    assert spec.linux.namespace("network") is None
    assert spec.linux.namespace("pid") is not None


def test_shares_are_mounted_once_before_the_program() -> None:
    spec = default_spec(["true"])
    at = len(spec.mounts)
    spec.mounts += [Mount(f"/data{n}", "/host", "bind", ["rbind"]) for n in range(3)]
    sources: dict[int, plan.Source] = {
        at: Share(100, "a"),
        at + 1: Share(100, "b"),
        at + 2: Share(101),
    }
    planned = made(spec, Machine(("/dev/vda",), "/dev/vdb", sources=sources))
    found = decoded(planned)
    mounts = [(f.id, f.payload) for f in found if f.type == Type.FUSE_MOUNT]
    options = b"allow_other,default_permissions"
    assert mounts == [
        (100, b"/shares/100\0" + options + b"\0"),
        (101, b"/shares/101\0" + options + b"\0"),
    ]
    assert "/shares/100/b" in "\n".join(planned.listing)


def test_volumes_on_disks_are_unmounted_at_the_end() -> None:
    spec = default_spec(["true"])
    at = len(spec.mounts)
    spec.mounts.append(Mount("/data", "/host", "bind", ["rbind"]))
    machine = Machine(("/dev/vda",), "/dev/vdb", sources={at: Disk("/dev/vdc", path="_data")})
    planned = made(spec, machine)
    assert decoded(planned)[-1].payload == f"/volumes/{at}\0/upper\0".encode()
    assert f"/volumes/{at}/_data" in "\n".join(planned.listing)


def test_the_number_of_tasks_is_limited_inside() -> None:
    spec = default_spec(["true"])
    spec.linux.resources = Resources(pids=Pids(77))
    text = "\n".join(made(spec).listing)
    assert "write(-100, '/sys/fs/cgroup/workload/pids.max', b'77'" in text
    assert "/sys/fs/cgroup/workload/cgroup.procs" in text


def test_network_settings_are_the_guests_own() -> None:
    spec = default_spec(["true"])
    spec.linux.sysctl = {"net.ipv4.ip_forward": "1", "kernel.msgmax": "9000"}
    text = "\n".join(made(spec).listing)
    assert "'/proc/sys/net/ipv4/ip_forward', b'1'" in text
    assert text.count("ip_forward") == 2  # the step's name and its path: once


def test_open_files_are_limited_as_containers_are() -> None:
    spec = default_spec(["true"])
    assert "set RLIMIT_NOFILE" in "\n".join(made(spec).listing)
    assert isinstance(spec.process, Process)
    spec.process.rlimits = [Rlimit("RLIMIT_NOFILE", 5, 6)]
    inside = plan.guest_spec(spec).process
    assert inside is not None and inside.rlimits == spec.process.rlimits


def test_a_terminal_has_its_size() -> None:
    spec = default_spec(["true"])
    assert spec.process is not None
    wanted = Bundle("w", spec, Rootfs(), "/nowhere")
    planned = plan.start(wanted, MACHINE, terminal=True, rows=33, columns=99)
    (_, main, _) = decoded(planned)
    assert main.payload[4:8] == Mode.TERMINAL.to_bytes(4, "little")
    assert b"\x21\x00\x63\x00" in main.payload


@pytest.mark.parametrize(
    ("namespace", "words"),
    [
        (Namespace("ipc", "/proc/1/ns/ipc"), "cannot share ipc namespaces"),
        (Namespace("user"), "cannot have a user namespace"),
    ],
)
def test_what_belongs_to_the_host_is_refused(namespace: Namespace, words: str) -> None:
    spec = default_spec(["true"])
    others = [n for n in spec.linux.namespaces if n.type_ != namespace.type_]
    spec.linux.namespaces = [*others, namespace]
    with pytest.raises(Unsupported, match=words):
        made(spec)


def test_devices_and_processes_of_the_host_are_refused() -> None:
    spec = default_spec(["true"])
    spec.linux.devices = [Device("/dev/sda", "b", 8, 0)]
    with pytest.raises(Unsupported, match="/dev/sda"):
        made(spec)
    spec = default_spec(["true"])
    spec.linux.namespaces = [n for n in spec.linux.namespaces if n.type_ != "pid"]
    with pytest.raises(Unsupported, match="host's processes"):
        made(spec)


def test_a_bind_without_a_source_is_refused(tmp_path: Path) -> None:
    spec = default_spec(["true"])
    spec.mounts.append(Mount("/data", str(tmp_path), "bind", ["rbind"]))
    with pytest.raises(Unsupported, match=r"/data: this boundary cannot bind"):
        made(spec)
    with pytest.raises(Invalid, match="at least one layer"):
        made(default_spec(["true"]), Machine((), "/dev/vdb"))
