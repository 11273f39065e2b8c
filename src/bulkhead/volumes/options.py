"""Driver options of a local volume: type, device and o, as mount(8) has them; or a size."""

import os
import re
import socket
from collections.abc import Mapping

from bulkhead.errors import Invalid, Unavailable
from bulkhead.linux import syscall
from bulkhead.volumes import disks

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKmMgGtT]?)[iI]?[bB]?")

_FLAGS = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024,
    "nodiratime": 2048, "bind": 4096, "rbind": 4096 | 16384, "relatime": 1 << 21,
    "strictatime": 1 << 24, "private": 1 << 18, "rprivate": (1 << 18) | 16384,
}  # fmt: skip
_IGNORED = frozenset({"rw", "defaults", "suid", "dev", "exec", "async", "auto", "noauto", "user"})
_MS_BIND, _MS_REMOUNT = 4096, 32


def check(opts: dict[str, str]) -> dict[str, str]:
    """The options; Invalid for an unknown one or a combination that cannot be mounted."""
    for key in opts:
        if key not in {"type", "device", "o", "size"}:
            raise Invalid(f'invalid option: "{key}"')
    if "size" in opts:
        if len(opts) > 1:
            raise Invalid("option size makes a disk of its own: it goes with no other option")
        disk_size(opts)
    elif opts:
        for key in ("type", "device"):
            if not opts.get(key):
                raise Invalid(f'missing required option: "{key}"')
        flags, _ = split(opts.get("o", ""))
        if flags & _MS_BIND and not opts["device"].startswith("/"):
            raise Invalid(f"invalid device {opts['device']}: a bind needs an absolute path")
    return opts


def disk_size(opts: Mapping[str, str]) -> int:
    """Bytes of a volume that is a disk; Invalid for what is no size, or not a possible one."""
    match = _SIZE.fullmatch(opts["size"].strip())
    if match is None:
        raise Invalid(f"invalid size: '{opts['size']}': give bytes, or a number with k, m, g or t")
    unit = " kmgt".index(match[2].lower() or " ")
    return disks.check_size(int(float(match[1]) * 1024**unit))


def split(text: str) -> tuple[int, str]:
    """mount(2)'s flags, and what is left for the file system."""
    flags, data = 0, []
    for word in filter(None, text.split(",")):
        if word in _FLAGS:
            flags |= _FLAGS[word]
        elif word not in _IGNORED:
            data.append(word)
    return flags, ",".join(data)


def mount(opts: dict[str, str], target: str, name: str) -> None:
    """Mount the volume at `target`; Unavailable names volume, device and reason."""
    flags, data = split(opts.get("o", ""))
    kind, device = opts["type"], opts["device"]
    if kind.startswith("nfs"):
        data = _resolved(data, name)
    try:
        _call(device, target, "" if flags & _MS_BIND else kind, flags, data)
        rest = flags & ~(_MS_BIND | 16384)
        if flags & _MS_BIND and rest:
            # A bind takes its flags only in a second call; mount(2).
            _call("none", target, "", rest | _MS_BIND | _MS_REMOUNT, "")
    except OSError as error:
        raise Unavailable(
            f"error while mounting volume '{name}': failed to mount local volume: "
            f"mount {device}:{target}: {os.strerror(error.errno or 0)}"
        ) from error


def _call(source: str, target: str, kind: str, flags: int, data: str) -> None:
    syscall.call(
        "mount",
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() if kind else None,
        flags,
        data.encode() if data else None,
    )


def _resolved(data: str, name: str) -> str:
    """NFS needs its server's address: the kernel resolves no names; nfs(5)."""
    words = []
    for word in data.split(","):
        key, _, value = word.partition("=")
        if key == "addr":
            try:
                address = socket.getaddrinfo(value, None, type=socket.SOCK_STREAM)[0][4][0]
            except OSError as error:
                raise Unavailable(
                    f"error while mounting volume '{name}': cannot resolve {value}: {error}"
                ) from error
            word = f"addr={address}"
        words.append(word)
    return ",".join(words)
