"""Reservations: what is promised to a workload, kept in its record, never promised twice.

    create, update    `claim` adds it up against every other record, in one step of the loop
    start             `prepare` makes room among those that run; `shape` sets its own limits
    end, removal      `rebalance` gives the others back what they had

A record holds its reservation from its creation to its removal, whether it runs or not, so that a
start never fails for want of what was promised. Nothing else is written down: an engine that
begins reads the records, and what it set in control groups it sets anew. Those of other
installations (roots) on the same machine are not known.

How it is enforced: docs/limits-and-filters.md.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.engine import body, shares
from bulkhead.engine.options import cpus_in
from bulkhead.engine.records import Record
from bulkhead.errors import BulkheadError, Conflict, Invalid, Unsupported
from bulkhead.isolation.capabilities import held
from bulkhead.isolation.cgroups import convert
from bulkhead.isolation.cgroups import manager as cgroups
from bulkhead.oci import runtime as oci

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

log = logging.getLogger("bulkhead.engine")

NANO = 1_000_000_000
PAGE = 4096
OOM_SCORE = -500
"""What processes with reserved memory begin with: the kernel kills others first."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What one workload reserves: billionths of a processor, bytes, percent of disk time."""

    nano_cpus: int = 0
    memory: int = 0
    io: int = 0

    def __bool__(self) -> bool:
        return bool(self.nano_cpus or self.memory or self.io)


def claim_of(host: body.Resources) -> Claim:
    """What a request reserves."""
    return Claim(host.reserve_cpus, host.reserve_memory, host.reserve_io)


def check(host: body.Resources) -> None:
    """Mistakes that need no other state; Invalid."""
    claim = claim_of(host)
    if not claim:
        return
    if min(claim.nano_cpus, claim.memory, claim.io) < 0:
        raise Invalid("a reservation cannot be negative")
    if 0 < claim.nano_cpus < NANO // 100:
        raise Invalid("--reserve-cpus: the least is 0.01")
    if claim.io > shares.IO_SELLABLE:
        raise Invalid(f"--reserve-io is a percentage of the disk's time: 1 to {shares.IO_SELLABLE}")
    if host.cgroup_parent:
        raise Invalid("--cgroup-parent: a reservation holds among the engine's own groups alone")
    if claim.nano_cpus:
        if host.cpuset_cpus:
            raise Invalid("--cpuset-cpus: with --reserve-cpus the engine chooses the processors")
        if host.cpu_shares:
            raise Invalid("--cpu-shares: with --reserve-cpus the engine sets the weight")
        if _quota(host) and claim.nano_cpus > _quota(host):
            raise Invalid("--reserve-cpus is more than the workload may use (--cpus)")
    if claim.memory and host.memory and claim.memory > host.memory:
        raise Invalid("--reserve-memory is more than the workload may use (--memory)")
    if claim.io and (host.blkio_weight or host.blkio_weight_device):
        raise Invalid("--blkio-weight: with --reserve-io the engine sets the weight")


def _quota(host: body.Resources) -> int:
    if host.nano_cpus:
        return host.nano_cpus
    return host.cpu_quota * NANO // (host.cpu_period or 100_000) if host.cpu_quota > 0 else 0


def cpus_text(nano: int) -> str:
    """ "1.5"."""
    return f"{nano / NANO:.2f}".rstrip("0").rstrip(".")


def bytes_text(count: int) -> str:
    """ "1.5 GiB"."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f}".rstrip("0").rstrip(".") + " GiB"
    return f"{count / (1 << 20):.1f}".rstrip("0").rstrip(".") + " MiB"


class Reservations:
    """Admission and enforcement; for the loop's thread."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._pending: dict[str, Claim] = {}
        """Of updates that are under way: the larger of the old and the new is taken."""
        self._starting: set[str] = set()
        self._applied: dict[str, oci.Resources] = {}
        """What was set beyond a workload's own limits, by id; "" is the group above them."""
        self._held = -1
        self.processors = sorted(os.sched_getaffinity(0))
        self.memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    # --- what there is, what is taken

    def _claims(self, besides: str = "") -> dict[str, Claim]:
        found = {}
        for workload in self._engine.workloads:
            if workload.id == besides:
                continue
            claim = claim_of(workload.record.host)
            pending = self._pending.get(workload.id)
            if pending is not None:
                claim = Claim(
                    max(claim.nano_cpus, pending.nano_cpus),
                    max(claim.memory, pending.memory),
                    max(claim.io, pending.io),
                )
            if claim:
                found[workload.id] = claim
        return found

    def _active(self) -> bool:
        """Whether anything is reserved: counted once, then whenever it may have changed."""
        if self._held < 0:
            self._held = len(self._claims())
        return self._held > 0

    def free(self, besides: str = "") -> Claim:
        """What can still be reserved, by a workload that reserves what `besides` does now."""
        taken = self._claims(besides).values()
        return Claim(
            shares.cpu_sellable(len(self.processors)) - sum(one.nano_cpus for one in taken),
            shares.memory_sellable(self.memory) - sum(one.memory for one in taken),
            shares.IO_SELLABLE - sum(one.io for one in taken),
        )

    def _pinned(self, besides: str = "") -> set[int]:
        found: set[int] = set()
        for workload in self._engine.workloads:
            if workload.record.pinned and workload.id != besides:
                found |= cpus_in(workload.record.pinned)
        return found

    # --- admission

    def claim(self, record: Record, host: body.Resources) -> None:
        """Admit what `host` reserves for `record`, or Conflict with what is free.

        To be followed, without giving way to other tasks, by the record's being known to the
        engine (or, in `changing`, by its change).
        """
        check(host)
        claim = claim_of(host)
        if not claim:
            record.pinned = ""
            return
        self._admit(claim, record.id)
        record.pinned = self._choose(claim, record.id)
        self._held = -1

    def _admit(self, claim: Claim, identity: str) -> None:
        free = self.free(identity)
        count = len(self.processors)
        sellable = shares.cpu_sellable(count)
        if claim.nano_cpus > free.nano_cpus:
            raise Conflict(
                f"cannot reserve {cpus_text(claim.nano_cpus)} CPUs: {cpus_text(free.nano_cpus)} "
                f"are free ({cpus_text(sellable)} of {count} can be reserved"
                f"{self._holders('nano_cpus', identity)})"
            )
        if claim.memory > free.memory:
            raise Conflict(
                f"cannot reserve {bytes_text(claim.memory)} of memory: {bytes_text(free.memory)} "
                f"are free ({bytes_text(shares.memory_sellable(self.memory))} of "
                f"{bytes_text(self.memory)} can be reserved{self._holders('memory', identity)})"
            )
        if claim.io:
            scheduler, remedy = disk_scheduler(self._engine.home.root)
            if remedy:
                raise Unsupported(
                    f"--reserve-io: the disk's scheduler ({scheduler}) does not share by weight; "
                    f"{remedy}"
                )
            if claim.io > free.io:
                raise Conflict(
                    f"cannot reserve {claim.io}% of the disk's time: {free.io}% are free "
                    f"({shares.IO_SELLABLE}% can be reserved{self._holders('io', identity)})"
                )

    def _holders(self, member: str, besides: str) -> str:
        found = []
        for identity, claim in self._claims(besides).items():
            workload = self._engine.workloads.by_id(identity)
            if getattr(claim, member) and workload is not None:
                found.append(workload.record.name)
        return f"; held by {', '.join(sorted(found))}" if found else ""

    def _choose(self, claim: Claim, identity: str) -> str:
        """Processors of its own for a whole number of them, as far as there are; else ""."""
        count, rest = divmod(claim.nano_cpus, NANO)
        if not count or rest:
            return ""
        taken = self._pinned(identity)
        own = shares.own_processors(count, self.processors, taken)
        left = len(self.processors) - len(taken) - len(own)
        shared = sum(
            one.nano_cpus
            for key, one in self._claims(identity).items()
            if (found := self._engine.workloads.by_id(key)) and not found.record.pinned
        )
        # The others' reservations must fit what is left to share, and nobody be left without.
        if not own or shared > shares.cpu_sellable(left) or self._excludes(taken | set(own)):
            return ""
        return shares.as_list(own)

    def _excludes(self, pinned: set[int]) -> bool:
        """Whether some workload's --cpuset-cpus has nothing outside `pinned`."""
        sets = (w.record.host.cpuset_cpus for w in self._engine.workloads)
        return any(text and cpus_in(text) <= pinned for text in sets)

    def check_processors(self, record: Record) -> None:
        """Conflict if --cpuset-cpus names nothing but processors of others' own."""
        wanted = record.host.cpuset_cpus
        if wanted and self._active() and cpus_in(wanted) <= self._pinned(record.id):
            raise Conflict(
                f"--cpuset-cpus {wanted}: these processors are reserved by others; "
                f"free are {shares.as_list(set(self.processors) - self._pinned())}"
            )

    @contextlib.contextmanager
    def changing(self, record: Record, wanted: body.HostConfig) -> Iterator[None]:
        """Admission of an update; what it takes is held while the block runs, whatever follows."""
        old = record.pinned
        if claim_of(wanted) == claim_of(record.host):
            check(wanted)
            yield
            return
        self.claim(record, wanted)
        self._pending[record.id] = claim_of(wanted)
        try:
            yield
        except BaseException:
            record.pinned = old
            raise
        finally:
            del self._pending[record.id]
            self._held = -1

    def released(self, record: Record) -> None:
        """The record is gone."""
        if claim_of(record.host):
            self._held = -1
        self._applied.pop(record.id, None)

    # --- enforcement

    def prepare(self, record: Record) -> None:
        """Make room for a workload that starts."""
        if not self._active():
            return
        self._starting.add(record.id)
        self.rebalance()

    def settled(self, record: Record) -> None:
        """Its start has come to an end, one or the other."""
        self._starting.discard(record.id)

    def shape(self, record: Record, spec: oci.Spec) -> None:
        """Put what is reserved, and what others have reserved, into a start's configuration."""
        if not self._active():
            return
        claim = claim_of(record.host)
        settings = self._settings().get(record.id)
        given = spec.linux.resources or oci.Resources()
        if settings is not None:
            spec.linux.resources = _merged(given, settings)
            self._applied[record.id] = settings
        # Both need a capability that engines in containers often lack.
        if claim.memory and spec.process is not None and "CAP_SYS_RESOURCE" in held():
            process = spec.process
            if process.oom_score_adj is None:
                process.oom_score_adj = OOM_SCORE
            if not any(one.type_ == "RLIMIT_MEMLOCK" for one in process.rlimits):
                limit = oci.Rlimit("RLIMIT_MEMLOCK", claim.memory, claim.memory)
                process.rlimits = [*process.rlimits, limit]

    def rebalance(self) -> None:
        """Set the weights and processors of everything that runs, where they differ."""
        if not self._applied and not self._active():
            return
        wanted = self._settings()
        for identity, settings in wanted.items():
            if self._applied.get(identity) == settings or identity in self._starting:
                continue
            workload = self._engine.workloads.by_id(identity)
            path = self._engine.cgroup_parent
            if workload is not None:
                path = self._engine.cgroup_path(workload.record)
            group = cgroups.detect().open(path)
            if not group.exists():
                continue
            try:
                group.apply(settings)
            except (BulkheadError, OSError) as error:
                log.warning("reservations: cannot set the limits of %s: %s", path, error)
                continue
            self._applied[identity] = settings
        if not self._active():
            self._applied.clear()
        for identity in [one for one in self._applied if one not in wanted]:
            del self._applied[identity]

    def _up(self) -> list[Record]:
        return [
            workload.record
            for workload in self._engine.workloads
            if workload.running or workload.id in self._starting
        ]

    def _settings(self) -> dict[str, oci.Resources]:
        """What every workload that is up is to have; "" is the group above all."""
        records = self._up()
        claims = {record.id: claim_of(record.host) for record in records}
        second = cgroups.detect().version == 2
        cpu = self._cpu_weights(records, claims, shares.CPU_V2 if second else shares.CPU_V1)
        io = self._io_weights(records, claims)
        pinned = set[int]()
        for record in records:
            pinned |= cpus_in(record.pinned) if record.pinned else set()
        memory = sum(one.memory for one in claims.values())
        found = {}
        for record in records:
            host = record.host
            if record.pinned:
                own = record.pinned
            else:
                chosen = cpus_in(host.cpuset_cpus) if host.cpuset_cpus else set(self.processors)
                own = shares.as_list(chosen - pinned or chosen)
            found[record.id] = _resources(
                second, cpu[record.id], own, io.get(record.id),
                _soft_limit(host, claims[record.id], memory),
                claims[record.id].memory,
            )  # fmt: skip
        usual = shares.CPU_V2.usual if second else shares.CPU_V1.usual
        reserved = sum(one.nano_cpus for one in claims.values()) / NANO
        found[""] = _resources(second, round(usual * (1 + 8 * reserved)), "", None, None, memory)
        return found

    def _cpu_weights(
        self, records: Sequence[Record], claims: dict[str, Claim], scale: shares.Scale
    ) -> dict[str, int]:
        reserved, others = {}, {}
        alone = 0
        for record in records:
            claim = claims[record.id]
            if record.pinned:
                alone += len(cpus_in(record.pinned))
            elif claim.nano_cpus:
                reserved[record.id] = claim.nano_cpus / NANO
            else:
                own = record.host.cpu_shares or shares.CPU_V1.usual
                second = scale is shares.CPU_V2
                others[record.id] = convert.shares_to_weight(own) if second else own
        found = shares.weights(reserved, others, len(self.processors) - alone, scale)
        for record in records:
            found.setdefault(record.id, scale.usual)
        return found

    def _io_weights(self, records: Sequence[Record], claims: dict[str, Claim]) -> dict[str, int]:
        reserved = {r.id: float(claims[r.id].io) for r in records if claims[r.id].io}
        if not reserved and not any(one.block_io for one in self._applied.values()):
            return {}
        usual = shares.IO.usual
        others = {r.id: r.host.blkio_weight or usual for r in records if r.id not in reserved}
        return shares.weights(reserved, others, shares.IO_WHOLE, shares.IO)

    # --- for people

    def describe(self) -> dict[str, Any]:
        """What there is, what is taken, what is free; and by whom."""
        claims, free = self._claims(), self.free()
        sellable = shares.cpu_sellable(len(self.processors))
        most = shares.memory_sellable(self.memory)
        pinned = self._pinned()
        scheduler, remedy = disk_scheduler(self._engine.home.root)
        holders = []
        for identity, claim in claims.items():
            workload = self._engine.workloads.by_id(identity)
            assert workload is not None
            holders.append(
                {
                    "Id": identity, "Name": workload.record.name, "State": workload.record.status,
                    "NanoCpus": claim.nano_cpus, "Pinned": workload.record.pinned,
                    "Memory": claim.memory, "Io": claim.io,
                }
            )  # fmt: skip
        return {
            "Cpus": {
                "Present": len(self.processors), "Capacity": sellable,
                "Reserved": sellable - free.nano_cpus, "Free": free.nano_cpus,
                "Pinned": shares.as_list(pinned),
                "Shared": shares.as_list(set(self.processors) - pinned),
            },
            "Memory": {
                "Present": self.memory, "Capacity": most, "Reserved": most - free.memory,
                "Free": free.memory,
            },
            "Io": {
                "Capacity": shares.IO_SELLABLE if not remedy else 0,
                "Reserved": shares.IO_SELLABLE - free.io, "Free": free.io if not remedy else 0,
                "Scheduler": scheduler, "Remedy": remedy,
            },
            "Enforcement": f"cgroup v{cgroups.detect().version}",
            "Workloads": sorted(holders, key=lambda one: str(one["Name"])),
        }  # fmt: skip


def _soft_limit(host: body.HostConfig, claim: Claim, reserved: int) -> int | None:
    """memory.soft_limit_in_bytes (v1): what is above it goes first when memory is short."""
    if claim.memory:
        return max(claim.memory, host.memory_reservation)
    if host.memory_reservation:
        return host.memory_reservation
    return PAGE if reserved else -1


def _resources(
    second: bool, weight: int, cpus: str, io: int | None, soft: int | None, memory: int
) -> oci.Resources:
    """Limits for a hierarchy of version 2 (`second`) or 1."""
    block = oci.BlockIO(weight=io) if io is not None else None
    if second:
        unified = {"cpu.weight": str(weight)}
        if "memory" in cgroups.detect().controllers:
            unified["memory.min"] = str(memory)
        return oci.Resources(
            cpu=oci.CPU(cpus=cpus) if cpus else None, block_io=block, unified=unified
        )
    return oci.Resources(
        cpu=oci.CPU(shares=weight, cpus=cpus),
        memory=oci.Memory(reservation=soft) if soft is not None else None,
        block_io=block,
    )


def _merged(given: oci.Resources, settings: oci.Resources) -> oci.Resources:
    """`given` with what `settings` has."""
    parts: dict[str, Any] = {"unified": {**given.unified, **settings.unified}}
    if "cpu.weight" in settings.unified and given.cpu is not None:
        given = msgspec.structs.replace(given, cpu=msgspec.structs.replace(given.cpu, shares=None))
    if settings.cpu is not None:
        cpu = given.cpu or oci.CPU()
        parts["cpu"] = msgspec.structs.replace(
            cpu, shares=settings.cpu.shares or cpu.shares, cpus=settings.cpu.cpus or cpu.cpus
        )
    if settings.memory is not None:
        memory = given.memory or oci.Memory()
        parts["memory"] = msgspec.structs.replace(memory, reservation=settings.memory.reservation)
    if settings.block_io is not None:
        block = given.block_io or oci.BlockIO()
        parts["block_io"] = msgspec.structs.replace(block, weight=settings.block_io.weight)
    return msgspec.structs.replace(given, **parts)


def disk_scheduler(path: str) -> tuple[str, str]:
    """(scheduler of the disk that `path` is on, what makes it share by weight; "" if it does)."""
    device = os.stat(path).st_dev
    place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not os.path.exists(place):
        return "none", "the store is on no disk"
    place = os.path.realpath(place)
    if not os.path.exists(f"{place}/queue"):
        place = os.path.dirname(place)  # a partition
    name = os.path.basename(place)
    try:
        with open(f"{place}/queue/scheduler", encoding="ascii") as file:
            words = file.read().split()
    except OSError:
        return "unknown", f"{name} has no scheduler"
    chosen = next((word.strip("[]") for word in words if word.startswith("[")), "none")
    if chosen == "bfq":
        return chosen, ""
    if "bfq" in words:
        return chosen, f"mend it with: echo bfq > /sys/block/{name}/queue/scheduler"
    return chosen, "mend it with: modprobe bfq, then choose it as the disk's scheduler"
