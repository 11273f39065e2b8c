"""Which extended attributes of an archive go into a layer: xattr(7), acl(5), capabilities(7).

The kernel would refuse to *set* malformed access lists and capabilities; written into an image they
would only make files fail later, and differently from an unpacked tree. So they are judged here.
"""

import struct

from bulkhead.errors import Invalid
from bulkhead.store.tar_read import show

_STRIPPED = (b"trusted.overlay.", b"user.overlay.")
_NAME_MAX = 255
_VALUE_MAX = 65535
_COUNT_MAX = 200
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_ORDER = {0x01: 0, 0x02: 1, 0x04: 2, 0x08: 3, 0x10: 4, 0x20: 5}
_ACL_ACCESS = b"system.posix_acl_access"
_ACL_DEFAULT = b"system.posix_acl_default"
_CAPABILITY_SIZE = {2: 20, 3: 24}


def valid_acl(value: bytes) -> bool:
    """Whether the kernel's posix_acl_valid() would accept it; ordered, with what is required."""
    if len(value) < 4 or (len(value) - 4) % _ACL_ENTRY.size or value[:4] != b"\2\0\0\0":
        return False
    last = (-1, -1)
    counts = dict.fromkeys(_ACL_ORDER, 0)
    for tag, permissions, identity in _ACL_ENTRY.iter_unpack(value[4:]):
        if tag not in _ACL_ORDER or permissions > 7:
            return False
        named = tag in (0x02, 0x08)
        here = (_ACL_ORDER[tag], identity if named else -1)
        if here[0] < last[0] or (not named and here[0] == last[0]):
            return False
        if named and identity == 0xFFFFFFFF:
            return False
        counts[tag] += 1
        last = here
    needs_mask = counts[0x02] + counts[0x08] > 0
    single = counts[0x01] == counts[0x04] == counts[0x20] == 1
    return single and counts[0x10] <= 1 and (not needs_mask or counts[0x10] == 1)


def valid_capability(value: bytes) -> bool:
    """Whether it is a file capability of revision 2 or 3."""
    if len(value) < 4:
        return False
    magic = int.from_bytes(value[:4], "little")
    return magic & 0x00FFFFFE == 0 and _CAPABILITY_SIZE.get(magic >> 24) == len(value)


def _refuse(member: bytes, name: bytes, why: str) -> Invalid:
    return Invalid(f"archive member {show(member)}: extended attribute {show(name)} is {why}")


def kept(
    member: bytes, xattrs: dict[bytes, bytes], *, directory: bool, regular: bool, symlink: bool
) -> dict[bytes, bytes] | None:
    """The attributes to store for `member`, or None for none; Invalid for malformed ones.

    Overlay's own are ours to write. What Linux does not allow on such a file is left out: `user.*`
    on links and devices, access lists on links.
    """
    result: dict[bytes, bytes] = {}
    for name, value in xattrs.items():
        if name.startswith(_STRIPPED):
            continue
        space, _, rest = name.partition(b".")
        if not space or not rest or len(name) > _NAME_MAX or len(value) > _VALUE_MAX:
            raise _refuse(member, name, "invalid")
        if space == b"user" and not (regular or directory):
            continue
        if name in (_ACL_ACCESS, _ACL_DEFAULT):
            if symlink or value == b"\2\0\0\0":
                continue
            if not valid_acl(value) or (name == _ACL_DEFAULT and not directory):
                raise _refuse(member, name, "malformed")
        if name == b"security.capability" and not valid_capability(value):
            raise _refuse(member, name, "malformed")
        result[name] = value
    if len(result) > _COUNT_MAX:
        raise Invalid(f"archive member {show(member)}: too many extended attributes")
    return result or None
