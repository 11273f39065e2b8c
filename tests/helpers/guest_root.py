"""A guest as after its boot, without a machine: a root of its own (a tmpfs), a network namespace
with the interface "vec0", a layer as an EROFS file, a writable disk on a loop device.

The init runs below a monitor (`monitor_rig`) that gets what `plan.start` made of a bundle.
"""

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from bulkhead.keeper.holder import program_path
from bulkhead.store.content import ContentStore
from tests.helpers.container_lab import build_root

_SCRIPT = r"""
set -e
mount -t tmpfs root "$1"
cd "$1"
mkdir bin dev disks initramfs old proc sys
cp /usr/bin/busybox bin/busybox
cp "$2" init
mount --rbind /dev dev
mount --bind "$3" disks
mount -t proc proc proc
mount -t sysfs sysfs sys
ip link add vec0 type veth peer name wire
ip link set wire up
pivot_root . old
export BULKHEAD_GUEST_CHANNEL=fd:9
exec /bin/busybox sh -c 'cd /; /bin/busybox umount -l /old; exec /init'
"""


def vmm(folder: Path) -> list[str]:
    """The command that stands for a VMM; `folder` is /disks inside."""
    (folder / "root").mkdir()
    return [
        "/usr/bin/unshare", "--fork", "--pid", "--mount", "--net", "--kill-child",
        "--propagation", "private",
        "/bin/sh", "-c", _SCRIPT, "sh",
        str(folder / "root"), program_path("bulkhead-guest"), str(folder / "disks"),
    ]  # fmt: skip


def make_layer(folder: Path) -> str:
    """A busybox root as an EROFS file in `folder`/disks; its path inside."""
    build_root(folder / "tree")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for child in sorted((folder / "tree").iterdir()):
            archive.add(child, child.name)
    store = ContentStore(str(folder / "store"))
    layer = store.ingest([packed.getvalue()], compression="")
    (folder / "disks").mkdir(exist_ok=True)
    os.link(layer.path, folder / "disks/layer.erofs")
    return "/disks/layer.erofs"


@contextlib.contextmanager
def writable_disk(folder: Path) -> Iterator[str]:
    """An ext4 file system on a loop device, which goes with its last mount."""
    image = folder / "disks/upper.ext4"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True)
    shown = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True
    )
    device = shown.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
