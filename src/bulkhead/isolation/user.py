"""Who "--user" means: names looked up in the image's own passwd and group files.

The rules and words are Docker's (runc's libcontainer/user): "user", "uid", "user:group",
"uid:gid" and mixtures. Pure, but for `read_databases`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bulkhead.errors import Invalid
from bulkhead.isolation.lookup import Layers

_LARGEST = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Identity:
    """Ids to run with, and what passwd says of the user."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary."""
    home: str
    name: str


@dataclass(frozen=True, slots=True)
class _Account:
    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def read_databases(layers: Sequence[str]) -> tuple[bytes, bytes]:
    """(passwd, group) of an image whose layers (topmost first) are the given directories."""
    with Layers(layers) as view:
        return view.read("/etc/passwd") or b"", view.read("/etc/group") or b""


def resolve(user: str, passwd: bytes, group: bytes, additional: Iterable[str] = ()) -> Identity:
    """The identity of `user` ("" is root) with `additional` groups (names or numbers).

    Invalid, in Docker's words, for a name that the image does not have, or an id out of range.
    """
    wanted, colon, wanted_group = user.partition(":")
    accounts, groups = _accounts(passwd), _groups(group)
    number = _number(wanted)
    account = _account(accounts, wanted, number)
    if account is not None:
        uid, gid, home, name = account.uid, account.gid, account.home, account.name
    elif not wanted:
        uid, gid, home, name = 0, 0, "/", ""
    elif number is None:
        raise Invalid(f"unable to find user {wanted}: no matching entries in passwd file")
    else:
        uid, gid, home, name = number, 0, "/", ""
    extra: list[int] = []
    if colon and wanted_group:
        gid = _group_id(groups, wanted_group)
    elif name:
        extra = [entry.gid for entry in groups if name in entry.members]
    for one in additional:
        extra.append(_additional(groups, one))
    for value in (uid, gid):
        if not 0 <= value <= _LARGEST:
            raise Invalid(f"uids and gids must be in range 0-{_LARGEST}")
    return Identity(uid, gid, tuple(dict.fromkeys(extra)), home or "/", name)


def _account(accounts: Sequence[_Account], wanted: str, number: int | None) -> _Account | None:
    for entry in accounts:
        if not wanted and entry.uid == 0:
            return entry
        if wanted and (entry.name == wanted or (number is not None and entry.uid == number)):
            return entry
    return None


def _group_id(groups: Sequence[_Group], wanted: str) -> int:
    number = _number(wanted)
    for entry in groups:
        if entry.name == wanted or (number is not None and entry.gid == number):
            return entry.gid
    if number is None:
        raise Invalid(f"unable to find group {wanted}: no matching entries in group file")
    return number


def _additional(groups: Sequence[_Group], wanted: str) -> int:
    number = _number(wanted)
    for entry in groups:
        if entry.name == wanted or (number is not None and entry.gid == number):
            return entry.gid
    if number is None:
        raise Invalid(f"Unable to find group {wanted}")
    if number > _LARGEST:
        raise Invalid(f"uids and gids must be in range 0-{_LARGEST}")
    return number


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _accounts(data: bytes) -> list[_Account]:
    found: list[_Account] = []
    for fields in _lines(data):
        if len(fields) >= 4:
            uid, gid = _number(fields[2]), _number(fields[3])
            if uid is not None and gid is not None:
                home = fields[5] if len(fields) > 5 else ""
                found.append(_Account(fields[0], uid, gid, home))
    return found


def _groups(data: bytes) -> list[_Group]:
    found: list[_Group] = []
    for fields in _lines(data):
        if len(fields) >= 3 and (gid := _number(fields[2])) is not None:
            members = fields[3].split(",") if len(fields) > 3 and fields[3] else []
            found.append(_Group(fields[0], gid, tuple(members)))
    return found


def _lines(data: bytes) -> Iterable[list[str]]:
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            yield text.split(":")
