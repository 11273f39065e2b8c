"""Image references, read as Docker reads them.

The grammar is github.com/distribution/reference: `[domain/]path[:tag][@digest]`. The first
component is a domain only if it holds a dot or a colon, is "localhost", or has an upper-case
letter; otherwise the domain is docker.io, and a single component is put below "library/".
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from bulkhead.errors import Invalid
from bulkhead.oci.digest import check

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
_LEGACY_DOMAIN = "index.docker.io"
_LONGEST_NAME = 255

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?\Z")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_IDENTIFIER = re.compile(r"[0-9a-f]{64}\Z")
_HEX_PREFIX = re.compile(r"(?:sha256:)?[0-9a-f]{1,64}\Z")


@dataclass(frozen=True, slots=True, order=True)
class Reference:
    """A normalised reference; `str()` is the canonical form, with the domain and without defaults.

    `tag` and `digest` are None when not given.
    """

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """Domain and path: "docker.io/library/debian"."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """The short form of `name` that docker shows: "debian"."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        path = self.path.removeprefix("library/")
        return path if "/" not in path else self.path

    @property
    def familiar(self) -> str:
        """The short form of the whole reference: "debian:bookworm"."""
        return self.familiar_name + self._suffix()

    def tagged(self) -> "Reference":
        """With the default tag, if it has neither tag nor digest."""
        if self.tag is None and self.digest is None:
            return replace(self, tag=DEFAULT_TAG)
        return self

    def with_digest(self, digest: str) -> "Reference":
        """The same repository's content with `digest`, without a tag."""
        return Reference(self.domain, self.path, None, check(digest, where=self.name))

    def with_tag(self, tag: str) -> "Reference":
        """The same repository's `tag`."""
        return Reference(self.domain, self.path, check_tag(tag), None)

    def _suffix(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return tag + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        return self.name + self._suffix()


def check_tag(tag: str) -> str:
    """`tag` itself if it is a valid tag, else Invalid."""
    if not _TAG.match(tag):
        raise Invalid(f"invalid tag {tag[:140]!r}: a tag is 1 to 128 letters, digits, and _ . -")
    return tag


def could_be_id(text: str) -> bool:
    """Whether `text` can be an image id or a prefix of one."""
    return _HEX_PREFIX.match(text) is not None


def _split_domain(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    is_domain = slash and (
        "." in first or ":" in first or first == "localhost" or first.lower() != first
    )
    domain, path = (first, rest) if is_domain else (DEFAULT_DOMAIN, text)
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = "library/" + path
    return domain, path


@lru_cache(maxsize=1024)
def parse(text: str) -> Reference:
    """The reference that `text` means to docker; Invalid, in docker's words, if it means none."""
    if _IDENTIFIER.match(text):
        raise Invalid(
            f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings"
        )
    if len(text) > 1024:
        raise Invalid("invalid reference format: more than 1024 characters")
    rest, at, digest = text.partition("@")
    domain, path = _split_domain(rest)
    head, colon, tag = path.rpartition(":")
    if colon:
        path = head
    if (colon and not _TAG.match(tag)) or (at and ":" not in digest):
        raise Invalid(f"invalid reference format: {text!r}")
    if path != path.lower():
        raise Invalid(f"invalid reference format: repository name ({path}) must be lowercase")
    if not _PATH.match(path) or not _DOMAIN.match(domain):
        raise Invalid(f"invalid reference format: {text!r}")
    if len(domain) + 1 + len(path) > _LONGEST_NAME:
        raise Invalid(f"invalid reference format: name is longer than {_LONGEST_NAME} characters")
    if at:
        check(digest, where=repr(text[:300]))
    return Reference(domain, path, tag if colon else None, digest if at else None)
