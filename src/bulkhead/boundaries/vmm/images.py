"""Images of a QEMU process, from which others are made: with the translator (TCG), not with KVM.

A library that is preloaded into QEMU (native/capture.c) writes the process to a file: memory,
threads, descriptors. `bulkhead-thaw` (native/thaw.c), run in QEMU's place, maps that file
copy-on-write and goes on where it stood. What QEMU had built and translated is there at once, and
is there only once for all clones; loading a saved guest into a new QEMU shares its guest's memory
only, and translates everything again.

Where descriptors are in every image, whatever it is made of:

    10 the guest's channel    11 QMP    12 the other end of 11    13… taps    (0, 1, 2: console)
"""

import os
import socket
from collections.abc import Callable, Mapping, Sequence

from bulkhead.boundaries.vmm import qemu, qmp
from bulkhead.errors import Unavailable

CAPTURE = "/usr/lib/bulkhead-capture.so"
THAW = "/usr/bin/bulkhead-thaw"
"""Places in the jail."""
CHANNEL, CONTROL, CONTROL_PEER, FIRST_TAP = 10, 11, 12, 13
END, GO_ON = b"T", b"S"
"""What becomes of the process: nothing more, or it was stopped meanwhile and goes on."""
_SOCKET = "/run/capture.sock"
_NAME = "qemu-system-x86_64"
_ANSWER = 256


def environment() -> tuple[str, ...]:
    """What QEMU is started with, in order to be captured."""
    return (
        f"LD_PRELOAD={CAPTURE}",
        f"BULKHEAD_CAPTURE={_SOCKET}",
        f"BULKHEAD_CONTROL={CONTROL_PEER}",
        # What is freed is given back, and not kept in pages that clones would copy.
        "MALLOC_ARENA_MAX=1",
        "MALLOC_MMAP_THRESHOLD_=131072",
    )


def take(
    pid: int,
    file: int,
    command: bytes = END,
    *,
    meanwhile: Callable[[], None] | None = None,
    timeout_s: float = 120.0,
) -> None:
    """Write the image of the QEMU in the jail of process `pid` to the empty file; blocks.

    With GO_ON the machine stands still until `meanwhile` is done too. Unavailable with a reason if
    that cannot be done; the machine then goes on as well.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout_s)
        try:
            _connect(connection, pid)
            socket.send_fds(connection, [command], [file])
            answers = [connection.recv(_ANSWER)]
            if command == GO_ON and answers[0] == b"\0" and meanwhile is not None:
                meanwhile()
            if command == GO_ON:
                connection.send(b"\n")
                answers.append(connection.recv(_ANSWER))
        except TimeoutError:
            raise Unavailable(f"no image of QEMU in {timeout_s:.0f} s") from None
        except OSError as error:
            raise Unavailable(f"no image of QEMU: {error.strerror}") from error
    for answer in answers:
        if answer[:1] != b"\0":
            reason = answer[1:].decode("utf-8", "replace") or "it has ended"
            raise Unavailable(f"no image of QEMU: {reason}")


def _connect(connection: socket.socket, pid: int) -> None:
    try:
        connection.connect(f"/proc/{pid}/root{_SOCKET}")
    except FileNotFoundError:
        raise Unavailable("this machine was booted, not cloned: only clones can be saved") from None


def argv(image_fd: int, given: Mapping[int, int]) -> list[str]:
    """The command line of a clone; `given` are descriptors of the image and of this process."""
    return [THAW, _NAME, str(image_fd), *(f"{to}={own}" for to, own in given.items())]


def orders(disks: Mapping[int, qemu.Disk]) -> bytes:
    """What a clone's QEMU is told first: its disks by their places, and to go on."""
    said = b""
    for place, disk in disks.items():
        node = qemu.disk_node(disk, place)
        said += qmp.encode("blockdev-add", **node)
        path = f"/machine/peripheral/{qemu.device_name(place)}"
        said += qmp.encode("qom-set", path=path, property="drive", value=node["node-name"])
    return said + qmp.encode("cont")


def forget_others(folder: str, prefix: str, keep: Sequence[str], most: int) -> None:
    """Remove the images in `folder` whose names do not begin so, and the oldest beyond `most`.

    Those in `keep` stay. Processes made of a removed image have it as long as they run.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(prefix):
                os.unlink(entry.path)
            elif entry.name not in keep:
                found.append((entry.stat().st_mtime_ns, entry.path))
    found.sort(reverse=True)
    for _, path in found[max(0, most - len(keep)) :]:
        os.unlink(path)
