"""Control groups of `--cgroup-parent` that were missing: made by us, removed by us when empty."""

import logging
from typing import TYPE_CHECKING

from bulkhead.engine.records import Record
from bulkhead.errors import BulkheadError
from bulkhead.isolation.cgroups import manager as cgroups

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")


def _path(record: Record) -> str:
    return f"/{record.host.cgroup_parent.strip('/')}"


def claim(engine: "Engine", record: Record) -> None:
    """Note the topmost group above the workload's that its start will have to make.

    What another workload of ours has made counts as made by this one too: the last of them to end
    removes it.
    """
    record.parent_made = ""
    if not record.host.cgroup_parent.strip("/"):
        return
    path = f"{_path(record)}/"
    for other in engine.workloads:
        made = other.record.parent_made
        if made and path.startswith(f"{made}/"):
            record.parent_made = made
            return
    hierarchy = cgroups.detect()
    above = ""
    for part in path.strip("/").split("/"):
        above = f"{above}/{part}"
        if not hierarchy.open(above).exists():
            record.parent_made = above
            return


def give_back(record: Record) -> None:
    """Remove those groups again, from the bottom up, as far as nobody else is in them."""
    if not record.parent_made:
        return
    path = _path(record)
    try:
        while f"{path}/".startswith(f"{record.parent_made}/"):
            if not cgroups.detect().remove_parent(path):
                return
            path = path.rpartition("/")[0]
    except (BulkheadError, OSError) as error:
        log.warning("cannot remove the control group %s: %s", path, error)
