"""Less to boot: modules without debugging information, user-mode-linux without helper programs.

A guest starts hundreds of times more often than it is debugged, and user-mode-linux pays for every
page that it maps with a system call, for every program that it starts with a fork of itself:

- `module`: distributions strip the modules of their kernels, those of user-mode-linux they do not.
- `kernel`: it is built to start /sbin/hotplug at every event of a device (a hundred at boot) and
  /sbin/modprobe for what it lacks. No guest of ours has either; that they are missing is found out
  after the fork. In our copy of the program both names are empty, which the kernel knows as "none"
  (/proc/sys/kernel/hotplug and modprobe say the same later, and can still be set).

    <root>/kernels/trimmed/HASH     copies of kernels, by the file that they were made of
"""

import contextlib
import hashlib
import os
import struct
import tempfile

from bulkhead.home import Home
from bulkhead.linux.elf import ElfError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_RELOCATABLE = 1
_NOBITS = 8
_DEBUG = (b".debug_", b".rela.debug_")
_HELPERS = (b"/sbin/hotplug", b"/sbin/modprobe")
_ROOM = 256
"""Bytes of the kernel's variables for names of programs (KMOD_PATH_LEN, UEVENT_HELPER_PATH_LEN)."""


def module(data: bytes) -> bytes:
    """A module (relocatable ELF, 64-bit) without the contents of its debugging sections.

    The sections stay, empty, so that every number that names one holds. A module that has none is
    returned as it is, with its signature; ElfError for what is no module.
    """
    if len(data) < _HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        raise ElfError("not a 64-bit little-endian ELF file")
    fields = list(_HEADER.unpack_from(data))
    table, size, count, names = fields[6], fields[11], fields[12], fields[13]
    if fields[1] != _RELOCATABLE or size != _SECTION.size or names >= count:
        raise ElfError("not a module")
    if table + size * count > len(data):
        raise ElfError("damaged section headers")
    sections = [list(_SECTION.unpack_from(data, table + size * i)) for i in range(count)]
    at, length = sections[names][4], sections[names][5]
    texts = data[at : at + length]
    dropped = [texts[one[0] :].startswith(_DEBUG) for one in sections]
    if not any(dropped):
        return data
    out = bytearray(data[: _HEADER.size])
    for section, drop in zip(sections, dropped, strict=True):
        if drop:
            section[1], section[2], section[5] = _NOBITS, 0, 0
        start, length = section[4], section[5]
        if section[1] == _NOBITS or not length:
            section[4] = min(start, len(out))
            continue
        if start + length > len(data):
            raise ElfError("damaged sections")
        out += bytes(-len(out) % max(1, section[8]))
        section[4] = len(out)
        out += data[start : start + length]
    out += bytes(-len(out) % 8)
    fields[6] = len(out)
    for section in sections:
        out += _SECTION.pack(*section)
    _HEADER.pack_into(out, 0, *fields)
    return bytes(out)


def kernel(home: Home, path: str) -> str:
    """A copy of user-mode-linux (the file `path`) that starts no helper programs; made once.

    `path` itself, if it does not have each name exactly once where it could be changed: it then
    was built without helpers, or is not known here, and works as well.
    """
    info = os.stat(path)
    stamp = f"1\0{path}\0{info.st_ino}\0{info.st_size}\0{info.st_mtime_ns}"
    folder = home.in_root("kernels", "trimmed")
    made = f"{folder}/{hashlib.sha256(stamp.encode()).hexdigest()[:24]}"
    if os.path.exists(made):
        return made
    with open(path, "rb") as file:
        data = bytearray(file.read())
    changed = False
    for name in _HELPERS:
        variable = name + bytes(_ROOM - len(name))
        at = data.find(variable)
        if at >= 0 and data.find(variable, at + 1) < 0:
            data[at] = 0
            changed = True
    if not changed:
        return path
    os.makedirs(folder, mode=0o711, exist_ok=True)
    fd, scratch = tempfile.mkstemp(dir=folder, prefix=".new-")
    with contextlib.ExitStack() as undo:
        undo.callback(os.unlink, scratch)
        with os.fdopen(fd, "wb") as copy:
            copy.write(data)
            os.fchmod(copy.fileno(), 0o555)
            copy.flush()
            os.fsync(copy.fileno())  # what has this name is never made again
        os.rename(scratch, made)
        undo.pop_all()
    return made
