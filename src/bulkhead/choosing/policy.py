"""The installation's policy: `<root>/policy.yaml`, the one file in which an administrator decides.

    version: 1
    unnamed: auto             # what a workload gets for which nobody names a boundary
    default: container        # what `auto` takes where no rule asks for more
    untrusted: microvm        # the least boundary of code that is not trusted
    regulated: microvm        # the least boundary of what an auditor asks about
    require-kvm: true         # a guest whose walls are not the hardware's is refused
    allow: [container, microvm]
    enforce: true             # a boundary that somebody names must not be weaker than auto's
    needs:                    # what holds for every workload here, as `advise` words it
      tenancy: strangers
    tenants:
      acme: {boundary: microvm}

Every member may be missing, and so may the file. It is read again when it changes; one that cannot
be read refuses every workload that it would govern, in words, rather than let one pass.
"""

import os
from typing import Any

import msgspec

from bulkhead.errors import Invalid
from bulkhead.home import Home

FILE = "policy.yaml"
MOST_BYTES = 1 << 20
BOUNDARIES = ("container", "sandbox", "microvm", "vm")
"""Lightest first; each separates at least as well as those before it."""


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """What holds for the workloads of one tenant."""

    boundary: str = ""
    """The least boundary of its workloads."""
    machine: str = ""
    """The machine (docs/machines.md) that its containers run in."""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """What the administrator decided. Without a file: all defaults."""

    version: int = 1
    unnamed: str = "container"
    default: str = "container"
    untrusted: str = ""
    regulated: str = ""
    require_kvm: bool = False
    allow: tuple[str, ...] = BOUNDARIES
    enforce: bool = False
    needs: dict[str, str | list[str]] = {}
    tenants: dict[str, Tenant] = {}
    source: str = ""
    """The file it was read from, "" for none."""
    tenant: str = ""
    """Whose workload is being judged: `of`."""

    @property
    def given(self) -> bool:
        """Whether there is a file at all."""
        return bool(self.source)

    def of(self, tenant: str) -> "Policy":
        """The same, for a workload of this tenant."""
        return msgspec.structs.replace(self, tenant=tenant) if tenant in self.tenants else self


NONE = Policy()

_known: dict[str, tuple[tuple[int, int, int], Policy]] = {}


def path(home: Home) -> str:
    """Where the policy of an installation lies."""
    return home.in_root(FILE)


def load(home: Home) -> Policy:
    """The policy in force; Invalid, with the place, for a file that is not one."""
    where = path(home)
    try:
        found = os.stat(where)
    except FileNotFoundError:
        return NONE
    except OSError as error:
        raise Invalid(f"the policy {where} cannot be read: {error.strerror}") from error
    print_ = (found.st_ino, found.st_mtime_ns, found.st_size)
    known = _known.get(where)
    if known is None or known[0] != print_:
        known = _known[where] = (print_, parse(_text(where), where))
    return known[1]


def _text(where: str) -> str:
    try:
        with open(where, encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"the policy {where} cannot be read: {error}") from error
    if len(text) > MOST_BYTES:
        raise Invalid(f"the policy {where} is larger than {MOST_BYTES >> 20} MiB")
    return text


def parse(text: str, source: str) -> Policy:
    """The policy that `text` is."""
    from bulkhead.choosing.documents import yaml_document

    document = yaml_document(text, source)
    if document is None:
        document = {}
    if not isinstance(document, dict) or {"source", "tenant"} & set(document):
        raise Invalid(f"{source}: a policy is a mapping, as docs/choosing.md shows")
    try:
        policy = msgspec.convert({**document, "source": source}, Policy)
    except msgspec.ValidationError as error:
        raise Invalid(f"{source}: {error}") from None
    _check(policy)
    return policy


def _check(policy: Policy) -> None:
    if policy.version != 1:
        raise Invalid(f"{policy.source}: version {policy.version} is not known: there is 1")
    words: list[tuple[str, Any]] = [
        ("unnamed", "container" if policy.unnamed == "auto" else policy.unnamed),
        ("default", policy.default), ("untrusted", policy.untrusted),
        ("regulated", policy.regulated), *(("allow", one) for one in policy.allow),
        *((f"tenants.{name}.boundary", one.boundary) for name, one in policy.tenants.items()),
    ]  # fmt: skip
    for key, word in words:
        if word not in (*BOUNDARIES, "") or (not word and key in ("default", "allow", "unnamed")):
            raise Invalid(
                f"{policy.source}: {key}: there is no boundary {word!r}, only "
                f"{', '.join(BOUNDARIES)}"
            )
    if not policy.allow:
        raise Invalid(f"{policy.source}: allow: names no boundary")
    if policy.default not in policy.allow:
        raise Invalid(f"{policy.source}: default: {policy.default} is not in allow")
