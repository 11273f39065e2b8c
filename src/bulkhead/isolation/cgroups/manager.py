"""Finding out which control groups this host has: version 1, 2 or a hybrid of both.

A hybrid host (v1 controllers, and a v2 hierarchy without them) is version 1 to us. With no v1
controller mounted, version 2.
"""

from collections.abc import Sequence
from functools import cache

from bulkhead.errors import Unsupported
from bulkhead.isolation.cgroups.group import Group as Group
from bulkhead.isolation.cgroups.v1 import JOINED, ON_REQUEST, HierarchyV1, MountV1
from bulkhead.isolation.cgroups.v2 import HierarchyV2
from bulkhead.linux import mountinfo

Hierarchy = HierarchyV1 | HierarchyV2

DEFAULT_PARENT = "/bulkhead"

_KNOWN = frozenset((*JOINED, *ON_REQUEST, "perf_event", "misc"))


@cache
def detect() -> Hierarchy:
    """This host's hierarchy, looked up once; Unsupported if nothing is mounted."""
    return find(mountinfo.read())


def find(mounts: Sequence[mountinfo.MountPoint]) -> Hierarchy:
    """The hierarchy among `mounts`."""
    found: dict[frozenset[str], MountV1] = {}
    unified: list[str] = []
    for mount in mounts:
        if mount.fstype == "cgroup":
            controllers = _KNOWN.intersection(mount.super_options)
            if controllers:
                found.setdefault(controllers, MountV1(mount.target, controllers))
        elif mount.fstype == "cgroup2":
            unified.append(mount.target)
    hierarchy = HierarchyV1(tuple(found.values()), _kernel_controllers())
    if hierarchy.mounts:
        return hierarchy
    if unified:
        return HierarchyV2(unified[0])
    raise Unsupported(
        "no control groups are mounted; mend it with: mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    )


def trim(most: int = 8) -> None:
    """Keep no more than `most` parents open, for a process that lives long."""
    hierarchy = detect()
    if isinstance(hierarchy, HierarchyV1):
        hierarchy.trim(most)


def _kernel_controllers() -> frozenset[str]:
    """Enabled controllers by /proc/cgroups; empty where a kernel without v1 lacks the file."""
    try:
        with open("/proc/cgroups", encoding="ascii") as file:
            rows = [line.split() for line in file if not line.startswith("#")]
    except FileNotFoundError:
        return frozenset()
    return frozenset(name for name, _, _, enabled in rows if enabled == "1")


def describe() -> dict[str, str]:
    """For doctor and explain: what was found."""
    hierarchy = detect()
    facts = {
        "version": str(hierarchy.version),
        "controllers": " ".join(sorted(hierarchy.controllers)),
    }
    if isinstance(hierarchy, HierarchyV1):
        facts["mounts"] = " ".join(m.target for m in (*hierarchy.mounts, *hierarchy.extra))
    else:
        facts["mounts"] = hierarchy.mount
    return facts
