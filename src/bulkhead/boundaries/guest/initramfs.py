"""The initramfs of a guest: our init as /init, and the modules it loads, in a cpio archive.

Modules that the init is to load by itself are named in /modules/order, one path a line
(native/guest_boot.c reads it); the others are loaded by set-up programs.

    <root>/kernels/initramfs/HASH.cpio     named by everything that went in; shared by all guests

Uncompressed newc (cpio(5)): the kernel copies it, nothing is inflated at each start.
"""

import contextlib
import hashlib
import lzma
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.boundaries.guest import trim
from bulkhead.errors import Unsupported
from bulkhead.home import Home
from bulkhead.linux.elf import ElfError

_MAGIC = b"070701"
_CONSOLE = os.makedev(5, 1)


@dataclass(frozen=True, slots=True)
class Initramfs:
    """A built archive and the modules in it, in the order in which they are to be loaded."""

    path: str
    modules: tuple[str, ...]
    """As the guest names them: "/modules/erofs.ko"."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    mode: int
    data: bytes = b""
    rdev: int = 0


def archive(entries: Sequence[_Entry]) -> bytes:
    """The newc archive of `entries`: owner root, time 0, so that equal input is equal output."""
    out = bytearray()
    for number, entry in enumerate((*entries, _Entry("TRAILER!!!", 0)), start=1):
        name = entry.name.encode() + b"\0"
        fields = (
            number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0,
            os.major(entry.rdev), os.minor(entry.rdev), len(name), 0,
        )  # fmt: skip
        out += _MAGIC + b"".join(b"%08X" % field for field in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


def build(home: Home, init: str, modules: Sequence[str], *, early: Sequence[str] = ()) -> Initramfs:
    """The archive of `init` (a static program) and `modules` (files of the host, in load order).

    Beside `init` there is the program of --init (bulkhead-init), which is its neighbour here too.
    Those also named in `early` are loaded by the init before it looks for its channel.

    Compressed modules (.xz) are unpacked, what only debuggers read is left out. Made
    once; later calls find it by a hash of the sources.
    """
    names = tuple(os.path.basename(path).removesuffix(".xz") for path in modules)
    reaper = f"{os.path.dirname(init)}/bulkhead-init"
    key = hashlib.sha256(b"4")
    key.update("\0".join(early).encode())
    for path in (init, reaper, *modules):
        info = os.stat(path)
        key.update(f"{path}\0{info.st_ino}\0{info.st_size}\0{info.st_mtime_ns}\0".encode())
    folder = home.in_root("kernels", "initramfs")
    path = f"{folder}/{key.hexdigest()[:24]}.cpio"
    made = Initramfs(path, tuple(f"/modules/{name}" for name in names))
    if os.path.exists(path):
        return made
    entries = [
        _Entry("dev", stat.S_IFDIR | 0o755),
        _Entry("dev/console", stat.S_IFCHR | 0o600, rdev=_CONSOLE),
        _Entry("modules", stat.S_IFDIR | 0o755),
        _Entry("init", stat.S_IFREG | 0o755, _read(init)),
        _Entry("bulkhead-init", stat.S_IFREG | 0o755, _read(reaper)),
    ]
    entries += [
        _Entry(f"modules/{name}", stat.S_IFREG | 0o644, _module(source))
        for name, source in zip(names, modules, strict=True)
    ]
    first = [name for name, source in zip(names, modules, strict=True) if source in early]
    if first:
        order = "".join(f"/modules/{name}\n" for name in first).encode()
        entries.append(_Entry("modules/order", stat.S_IFREG | 0o644, order))
    os.makedirs(folder, mode=0o711, exist_ok=True)
    _write(folder, path, archive(entries))
    return made


def with_init(program: bytes) -> bytes:
    """An archive of a static program as /init, and the console it speaks on."""
    return archive(
        [
            _Entry("dev", stat.S_IFDIR | 0o755),
            _Entry("dev/console", stat.S_IFCHR | 0o600, rdev=_CONSOLE),
            _Entry("init", stat.S_IFREG | 0o755, program),
        ]
    )


def _write(folder: str, path: str, data: bytes) -> None:
    fd, scratch = tempfile.mkstemp(dir=folder, prefix=".new-")
    with contextlib.ExitStack() as undo:
        undo.callback(os.unlink, scratch)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o444)
        os.rename(scratch, path)
        undo.pop_all()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _module(path: str) -> bytes:
    data = _read(path)
    if path.endswith(".xz"):
        data = lzma.decompress(data)
    elif not path.endswith(".ko"):
        raise Unsupported(f"{path}: a module in a compression that is not known here")
    try:
        return trim.module(data)
    except ElfError as error:
        raise Unsupported(f"{path}: {error}") from error
