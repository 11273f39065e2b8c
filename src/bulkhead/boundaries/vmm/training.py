"""What a guest does before it becomes a template: load modules, and once what every start does.

A whole small workload runs in it, made of nothing but ours: disks and a network card are bound,
layers and a writable file system mounted, a process confined and run. The kernel's code for all
that is then translated (images.py) and its caches are made. After it everything is let go.
"""

import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from bulkhead.boundaries.guest import frames, plan
from bulkhead.boundaries.guest.frames import Frame, Mode, Type
from bulkhead.boundary.seam import Bundle, Nic, Rootfs
from bulkhead.errors import Unavailable
from bulkhead.isolation import capabilities
from bulkhead.isolation.seccomp import profile
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Program
from bulkhead.oci.runtime import Capabilities, Linux, Mount, Namespace, Process, Root, Spec

_LOAD, _CLEAN, _IDLE = 1000, 1001, 1002
_LAST_WORK = 4
_PAUSE_S = 0.15
"""QEMU makes the tables of its address translation smaller when few of them were used so long."""
_ADDRESS, _GATEWAY = "169.254.77.2/24", "169.254.77.1"
_MAC = "02:00:00:00:00:01"
_BLOCK = 4096
_EROFS_MAGIC = 0xE0F5E1E2


@dataclass(slots=True)
class Stage:
    """Frames for the init; `waiting` are the ids of what has to end."""

    frames: bytes
    steps: dict[int, list[str]]
    waiting: set[int]


@dataclass(slots=True)
class Lesson:
    """Stages, one after the other."""

    stages: list[Stage]
    done: int = field(default=0)
    pause_s: float = field(default=0.0)
    """To let pass before the next frames are sent."""

    def heard(self, frame: Frame) -> bytes | None:
        """Take in an answer: what to send now, or None when all is done.

        LaunchFailed names a step that failed, Unavailable says that the process did.
        """
        stage = self.stages[self.done]
        if frame.type == Type.FAILED:
            raise frames.failure(frame, stage.steps.get(frame.id, ()))
        if frame.type == Type.EXITED and frame.arg:
            raise Unavailable(f"a template's first process ended with status {frame.arg}")
        if frame.type in (Type.DONE, Type.EXITED):
            stage.waiting.discard(frame.id)
        if stage.waiting:
            return b""
        self.done += 1
        self.pause_s = _PAUSE_S if self.done > _LAST_WORK else 0.0
        return self.stages[self.done].frames if self.done < len(self.stages) else None


def lesson(modules: Sequence[str], cards: int, writable: str, readonly: str) -> Lesson:
    """Load `modules`, and use the first card and two disks of the virtio bus by their names there.

    On the disk `writable` is an empty ext4, on `readonly` what `layer` has made.
    """
    load = Program()
    load.write("bind no drivers", AT_FDCWD, "/sys/bus/virtio/drivers_autoprobe", "0")
    for path in modules:
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = load.call(f"open {path}", "openat", AT_FDCWD, f"/initramfs{path}", flags, 0)
        load.call(f"load module {path}", "finit_module", fd, "", 0)
        load.call("close", "close", fd)
    bound = [("virtio_net", "virtio1")] if cards else []
    bound += [("virtio_blk", readonly), ("virtio_blk", writable)]
    workloads = [_workload(bound, bool(cards), terminal=one) for one in (False, True)]
    clean = Program()
    for path in ("/upper", "/layers/0"):
        clean.call(f"unmount {path}", "umount2", path, 0)
    for driver, device in bound:
        path = f"/sys/bus/virtio/drivers/{driver}/unbind"
        clean.write(f"let go of {device}", AT_FDCWD, path, device)
    clean.write("drop caches", AT_FDCWD, "/proc/sys/vm/drop_caches", "3")
    idle = Program()
    idle.call("be there", "getpid")
    stages = [_setup(_LOAD, load)]
    for workload in workloads:
        stages += [workload, _setup(_CLEAN, clean)]
    return Lesson([*stages, *(_setup(_IDLE + number, idle) for number in range(6))])


def _setup(identity: int, program: Program) -> Stage:
    compiled = program.compile()
    said = frames.run(identity, compiled.data, Mode.SETUP)
    return Stage(said, {identity: compiled.steps}, {identity})


def _workload(bound: Sequence[tuple[str, str]], with_card: bool, *, terminal: bool) -> Stage:
    machine = plan.Machine(
        layers=("/dev/vda",),
        upper="/dev/vdb",
        devices=tuple(bound),
        interfaces=("eth0",) if with_card else (),
        write_back=False,
    )
    with OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as nothing:
        nic = Nic("eth0", nothing, _MAC, (_ADDRESS,), (("default", _GATEWAY),), 1500)
        bundle = Bundle("template", _spec(), Rootfs(), "", nics=(nic,) if with_card else ())
        planned = plan.start(bundle, machine, terminal=terminal)
    return Stage(planned.frames, planned.steps, {plan.SETUP, plan.MAIN})


def _spec() -> Spec:
    """What most workloads have."""
    granted = list(capabilities.select())
    hidden = ["nosuid", "noexec", "nodev"]
    return Spec(
        root=Root(path="rootfs"),
        hostname="template",
        process=Process(
            args=["/init"],
            env=["BULKHEAD_GUEST_CHANNEL=fd:-1"],  # it then ends at once
            capabilities=Capabilities(bounding=granted, permitted=granted, effective=granted),
        ),
        mounts=[
            Mount("/proc", "proc", "proc", hidden),
            Mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
            Mount("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "mode=0620"]),
            Mount("/sys", "sysfs", "sysfs", [*hidden, "ro"]),
            Mount("/sys/fs/cgroup", "cgroup", "cgroup", [*hidden, "relatime", "ro"]),
            Mount("/dev/mqueue", "mqueue", "mqueue", hidden),
            Mount("/dev/shm", "shm", "tmpfs", [*hidden, "mode=1777", "size=65536k"]),
        ],
        linux=Linux(
            namespaces=[Namespace(kind) for kind in ("mount", "pid", "ipc", "uts", "cgroup")],
            seccomp=profile.default_for(frozenset(granted)),
            masked_paths=["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            readonly_paths=["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
            sysctl={"net.ipv4.ip_unprivileged_port_start": "0"},
        ),
    )


def layer(program: bytes) -> bytes:
    """A file system (EROFS) with `program` as /init, and the places that are mounted on.

    The kernel's fs/erofs/erofs_fs.h: block 0 has the superblock and compact inodes, then come the
    root's names, then the program.
    """
    folders = ["dev", "proc", "sys"]
    names = sorted([(b".", 2), (b"..", 2), (b"init", 1), *((one.encode(), 2) for one in folders)])
    inodes = {b".": 64, b"..": 64, b"init": 65}
    inodes |= {name.encode(): 66 + number for number, name in enumerate(folders)}
    entries, texts, at = b"", b"", 12 * len(names)
    for name, kind in names:
        entries += struct.pack("<QHBB", inodes[name], at + len(texts), kind, 0)
        texts += name
    root = (entries + texts).ljust(_BLOCK, b"\0")
    blocks = 2 + -(-len(program) // _BLOCK)
    head = struct.pack(
        "<III BBH QQI III 32x I 44x", _EROFS_MAGIC, 0, 0, 12, 0, 64, 5, 0, 0, blocks, 0, 0, 0
    )
    first = bytearray(_BLOCK)
    first[1024 : 1024 + len(head)] = head

    def inode(number: int, mode: int, links: int, size: int, block: int) -> None:
        data = struct.pack("<HHHHIIIIHHI", 0, 0, mode, links, size, 0, block, number, 0, 0, 0)
        first[number * 32 : number * 32 + 32] = data

    inode(64, stat.S_IFDIR | 0o755, 2 + len(folders), len(entries + texts), 1)
    inode(65, stat.S_IFREG | 0o755, 1, len(program), 2)
    for folder in folders:
        inode(inodes[folder.encode()], stat.S_IFDIR | 0o755, 2, 0, 0)
    return bytes(first) + root + program.ljust((blocks - 2) * _BLOCK, b"\0")
