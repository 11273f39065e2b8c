"""Who uses which volume, and that one kernel at a time writes it.

Two kernels that write the same files would each go by what they remember of them. Workloads of the
host's kernel (containers) are one writer together; every guest is one of its own. A volume that is
a disk is stricter: while one kernel writes it no other may even look.
"""

from dataclasses import dataclass

from bulkhead.errors import Conflict

HOST = ""
"""The host's kernel."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A workload that uses a volume: its id and name, its kernel (HOST, or an id of its own)."""

    user: str
    name: str
    kernel: str
    boundary: str
    writes: bool


class Leases:
    """All holders; kept in memory, and found again from what runs."""

    def __init__(self) -> None:
        self._holders: dict[str, list[Holder]] = {}

    def take(self, volume: str, holder: Holder, *, disk: bool, known: bool = False) -> None:
        """Conflict in one line if another kernel's use forbids it; `known`: it runs already."""
        held = self._holders.get(volume, [])
        for other in () if known else held:
            if other.kernel == holder.kernel:
                continue
            where = f"{other.name} (boundary {other.boundary})"
            if holder.writes and other.writes:
                raise Conflict(
                    f"volume {volume} is written by {where}, and one kernel at a time writes a "
                    f"volume: stop {other.name}, or mount it read-only (:ro)"
                )
            if disk and (holder.writes or other.writes):
                raise Conflict(
                    f"volume {volume} is a disk that {where} uses: stop {other.name}, or mount it "
                    "read-only (:ro) in both"
                )
        self._holders.setdefault(volume, []).append(holder)

    def release(self, user: str) -> None:
        """Forget every use of a workload."""
        for volume, held in list(self._holders.items()):
            left = [one for one in held if one.user != user]
            if left:
                self._holders[volume] = left
            else:
                del self._holders[volume]

    def holders(self, volume: str) -> tuple[Holder, ...]:
        """Who uses it now."""
        return tuple(self._holders.get(volume, ()))
