"""What a launch takes along besides streams: descriptors, namespaces, a listener."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bulkhead.boundary.seam import Bundle
from bulkhead.errors import Unsupported
from bulkhead.linux import namespaces


@dataclass(frozen=True, slots=True)
class Extras:
    """Of one more process in a container; as the members of seam.Bundle."""

    keep_numbers: bool = False
    listener: tuple[int, int] = (-1, -1)


NONE = Extras()


def ground(bundle: Bundle) -> dict[str, Any]:
    """The members of container_plan.Ground that a bundle decides."""
    return {
        "kept": len(bundle.fds),
        "keep_numbers": bundle.keep_numbers,
        "listener": bundle.listener[0] >= 0,
        "keyring": bundle.keyring,
        "pivot": bundle.pivot,
        "gates": frozenset(bundle.gates),
    }


def given(fds: Sequence[int], listener: tuple[int, int]) -> dict[str, int]:
    """The descriptors by the names that a program has for them."""
    found = {f"kept{position}": fd for position, fd in enumerate(fds)}
    if listener[0] >= 0:
        found |= {"listener": listener[0], "listener-state": listener[1]}
    return found


def open_namespace(kind: str, path: str, undo: ExitStack) -> int:
    """The namespace at `path`, closed by `undo`; Unsupported if it is none."""
    try:
        fd = namespaces.open_namespace(path)
    except OSError as error:
        raise Unsupported(f"{kind} namespace {path}: {error.strerror}") from None
    undo.callback(fd.close)
    return int(fd)
