"""Who a process runs as: "name", "uid", "name:group" resolved with the image's passwd and group.

`parse` is pure. `Accounts` finds the two files in a root: through /proc/PID/root of a running
workload, or in the layers and the writable layer of one that does not run, topmost first.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from bulkhead.errors import Invalid
from bulkhead.linux import openat2

LARGEST = 4 << 20
"""Bytes of a passwd or group file that are read; more is refused."""
_MAX_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Identity:
    """The result: ids, and the home directory ("/" if unknown)."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    name: str


@dataclass(frozen=True, slots=True)
class Accounts:
    """The texts of /etc/passwd and /etc/group."""

    passwd: str = ""
    group: str = ""


def _rows(text: str, fields: int) -> list[list[str]]:
    rows = []
    for line in text.splitlines():
        parts = line.strip().split(":")
        if len(parts) >= fields and not parts[0].startswith("#"):
            rows.append(parts)
    return rows


def _id(text: str, what: str) -> int:
    value = int(text)
    if value > _MAX_ID:
        raise Invalid(f"{what} {text} is out of range: ids are 0 to {_MAX_ID}")
    return value


def resolve(user: str, accounts: Accounts, group_add: Sequence[str] = ()) -> Identity:
    """The ids of `user` ("" is root); Invalid in Docker's words for unknown names."""
    return _resolve(user, accounts, tuple(group_add))


@lru_cache(maxsize=64)
def _resolve(user: str, accounts: Accounts, group_add: tuple[str, ...]) -> Identity:
    name, _, group = user.partition(":")
    passwd = [row for row in _rows(accounts.passwd, 4) if row[2].isdigit() and row[3].isdigit()]
    groups = [row for row in _rows(accounts.group, 3) if row[2].isdigit()]
    wanted = name or "0"
    row = next((r for r in passwd if r[0] == wanted), None)
    if row is None and wanted.isdigit():
        number = _id(wanted, "uid")
        row = next((r for r in passwd if int(r[2]) == number), None)
    if row is not None:
        login, uid, gid = row[0], int(row[2]), int(row[3])
        home = row[5] if len(row) > 5 and row[5] else "/"
    elif wanted.isdigit():
        login, uid, gid, home = "", int(wanted), 0, "/"
    else:
        raise Invalid(f"unable to find user {name}: no matching entries in passwd file")
    if not row and uid == 0:
        home = "/root"
    extra: set[int] = set()
    if group:
        gid = _group(group, groups)
    elif login:
        extra = {int(r[2]) for r in groups if len(r) > 3 and login in r[3].split(",")}
    extra.update(_group(one, groups) for one in group_add)
    extra.discard(gid)
    return Identity(uid, gid, (gid, *sorted(extra)), home, login)


def _group(text: str, groups: list[list[str]]) -> int:
    row = next((r for r in groups if r[0] == text), None)
    if row is not None:
        return int(row[2])
    if text.isdigit():
        return _id(text, "gid")
    raise Invalid(f"unable to find group {text}: no matching entries in group file")


def read(directories: Sequence[str]) -> Accounts:
    """The files in the first of `directories` (topmost first) that has each."""
    return Accounts(
        passwd=_first(directories, "etc/passwd"), group=_first(directories, "etc/group")
    )


def _first(directories: Sequence[str], path: str) -> str:
    for directory in directories:
        try:
            root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            text = _read(root, path)
        finally:
            os.close(root)
        if text is not None:
            return text
    return ""


def _read(root: int, path: str) -> str | None:
    """The file's text; "" for a whiteout, None if this layer says nothing of it."""
    try:
        # A fifo or a device must not block or act: O_NONBLOCK, and only then a look at the type.
        fd = openat2.openat2(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, openat2.IN_ROOT)
    except OSError as error:
        # ENXIO: a whiteout is a character device 0/0, which has no driver; overlayfs.
        return "" if error.errno == 6 else None
    with fd:
        if not stat.S_ISREG(os.fstat(int(fd)).st_mode):
            return ""
        with os.fdopen(fd.take(), "rb") as file:
            data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise Invalid(f"/{path} of the image is larger than {LARGEST} bytes")
    return data.decode("utf-8", "surrogateescape")
