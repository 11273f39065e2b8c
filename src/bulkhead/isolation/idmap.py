"""User and group id maps: text for the kernel, questions about them. See user_namespaces(7)."""

from collections.abc import Sequence

from bulkhead.oci.runtime import IDMapping


def to_text(mappings: Sequence[IDMapping]) -> str:
    """What is written to /proc/PID/uid_map."""
    return "".join(f"{m.container_id} {m.host_id} {m.size}\n" for m in mappings)


def to_host(mappings: Sequence[IDMapping], inside: int) -> int | None:
    """The id on the host of `inside`; None if it is not mapped. No mappings: the same."""
    if not mappings:
        return inside
    for mapping in mappings:
        if mapping.container_id <= inside < mapping.container_id + mapping.size:
            return mapping.host_id + inside - mapping.container_id
    return None


def is_mapped(mappings: Sequence[IDMapping], inside: int) -> bool:
    """Whether `inside` exists in the namespace."""
    return to_host(mappings, inside) is not None
