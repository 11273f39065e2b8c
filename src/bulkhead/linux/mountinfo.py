"""/proc/PID/mountinfo as data. See proc_pid_mountinfo(5)."""

import re
from dataclasses import dataclass

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One mounted file system, as the process sees it."""

    mount_id: int
    parent_id: int
    device: str
    """"major:minor"."""
    root: str
    """The directory of the file system that is mounted."""
    target: str
    options: tuple[str, ...]
    """Of the mount: ro, nosuid, relatime."""
    propagation: tuple[str, ...]
    """"shared:N", "master:N", "unbindable"."""
    fstype: str
    source: str
    super_options: tuple[str, ...]
    """Of the file system."""


def _plain(text: str) -> str:
    if "\\" not in text:
        return text
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def parse(text: str) -> list[MountPoint]:
    """The mounts that `text`, the content of a mountinfo file, lists in their order."""
    mounts: list[MountPoint] = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        mounts.append(
            MountPoint(
                mount_id=int(fields[0]),
                parent_id=int(fields[1]),
                device=fields[2],
                root=_plain(fields[3]),
                target=_plain(fields[4]),
                options=tuple(fields[5].split(",")),
                propagation=tuple(fields[6:]),
                fstype=rest[0],
                source=_plain(rest[1]),
                super_options=tuple(rest[2].split(",")) if len(rest) > 2 else (),
            )
        )
    return mounts


def read(pid: "int | str" = "self") -> list[MountPoint]:
    """The mounts of process `pid`; OSError if it is gone."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse(file.read())
