"""Who `--chown` means: numbers, or names in the image's passwd and group files."""

from bulkhead.build.copying import Owner
from bulkhead.build.text import Spanned
from bulkhead.build.trees import Tree

_MOST = 2**31 - 1


def _rows(tree: Tree, path: str) -> list[list[str]]:
    data = tree.text(path) or b""
    return [line.split(":") for line in data.decode("utf-8", "replace").splitlines()]


def _number(text: str, at: Spanned) -> int:
    if int(text) > _MOST:
        raise at.error(f"id {text} is out of range: ids are 0 to {_MOST}")
    return int(text)


def owner(text: str, tree: Tree, at: Spanned) -> Owner:
    """USER[:GROUP]; a number without a group is also the group's."""
    user, colon, group = text.partition(":")
    if not user or (colon and not group):
        raise at.error(f"invalid chown value {text!r}: USER or USER:GROUP")
    gid = -1
    if user.isdecimal():
        uid = gid = _number(user, at)
    else:
        row = next((r for r in _rows(tree, "etc/passwd") if r[0] == user and len(r) > 3), None)
        if row is None or not (row[2].isdecimal() and row[3].isdecimal()):
            raise at.error(f"unable to convert uid/gid chown string to host mapping: no such user "
                           f"{user!r} in the image")  # fmt: skip
        uid, gid = int(row[2]), int(row[3])
    if group:
        gid = _group(group, tree, at)
    return Owner(uid, gid)


def _group(group: str, tree: Tree, at: Spanned) -> int:
    if group.isdecimal():
        return _number(group, at)
    for row in _rows(tree, "etc/group"):
        if row[0] == group and len(row) > 2 and row[2].isdecimal():
            return int(row[2])
    raise at.error(f"no such group {group!r} in the image")
