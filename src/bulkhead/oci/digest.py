"""Content digests, "sha256:" and 64 lower-case hexadecimal digits.

Only sha256 is accepted: it is what registries, docker and podman write; the sha512 that the image
specification also registers is refused in words instead of being half supported.
"""

import hashlib
import re

from bulkhead.errors import Corrupt, Invalid

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_ANY = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}\Z")


def is_digest(text: str) -> bool:
    """Whether `text` is a digest of the supported kind."""
    return _DIGEST.match(text) is not None


def check(text: str, *, where: str = "") -> str:
    """`text` itself if it is a supported digest, else Invalid; `where` says what it names."""
    if _DIGEST.match(text):
        return text
    place = f" for {where}" if where else ""
    shown = text[:100]
    if _ANY.match(text):
        raise Invalid(f"digest {shown!r}{place} is not sha256, the only algorithm supported")
    raise Invalid(f"{shown!r}{place} is not a digest (sha256: and 64 hexadecimal digits)")


def of(data: bytes) -> str:
    """The digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def verify(data: bytes, digest: str, *, where: str) -> None:
    """Corrupt unless `data` has `digest`; `where` names the thing for the message."""
    found = of(data)
    if found != digest:
        raise Corrupt(f"{where} has digest {found}, expected {digest}")


def encoded(digest: str) -> str:
    """The hexadecimal half of a checked digest, as a file name."""
    return check(digest)[7:]
