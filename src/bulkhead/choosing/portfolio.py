"""An assessment: what there is, where each of it belongs, and in which order it gets there.

Everything is derived from items, advice and the last comparison; nothing is measured or changed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bulkhead.choosing import runs
from bulkhead.choosing.advice import Advice, advise
from bulkhead.choosing.costs import NOTHING, Comparison, host_memory
from bulkhead.choosing.facts import Facts, Statement
from bulkhead.choosing.items import Item, statements
from bulkhead.choosing.policy import Policy

MACHINE_OVERHEAD = 256 << 20
"""What a machine's own system is given beside its containers, in bytes: a choice, not a measure."""
_APART = ("tenancy", "compliance", "separation")
"""Facts that ask for a wall around a tenant, not around each of its workloads."""
_BLOCKING = (
    "has to be built", "from the cluster", "no disk", "have to be run", "host devices",
    "includes others", "shares a pod", "Secure Boot",
)  # fmt: skip
"""Notes that stand in the way, not only beside it."""
WAVES = {
    1: "stateless containers",
    2: "stateless, behind kernels of their own",
    3: "with volumes: stopped, copied, started",
    4: "databases and what is regulated: rehearsed, with backups",
    5: "whole machines: imported as they are",
    6: "what reaches into the host",
}
"""In this order; waves in which nobody goes are left out, and the others numbered from 1."""


@dataclass(slots=True)
class Placed:
    """One item with its advice and its place."""

    item: Item
    advice: Advice
    machine: str = ""
    """The machine its containers go into, "" for the host itself."""
    wave: int = 0
    """0: it stays where it is."""
    blockers: list[str] = field(default_factory=list)
    risks: list[str] = field(default_factory=list)

    @property
    def behind(self) -> str:
        """Where it goes, as `--boundary` takes it."""
        return f"vm:{self.machine}" if self.machine else self.advice.boundary

    @property
    def commands(self) -> list[list[str]]:
        """What brings it there."""
        if not self.advice.boundary:
            return []
        if not self.machine:
            return runs.commands(self.item, self.advice.boundary)
        inside = [
            ["bulkhead", "machine", "run", self.machine, *words[1:]]
            for words in [*runs.networks(self.item), *runs.volumes(self.item)]
        ]
        names = runs.instances(self.item)
        return inside + [
            runs.run(self.item, self.behind, name, first=name == names[0]) for name in names
        ]

    @property
    def undo(self) -> list[list[str]]:
        """What takes it away again."""
        if not self.advice.boundary:
            return []
        if not self.machine:
            return runs.undo(self.item, self.advice.boundary)
        names = runs.instances(self.item)
        return [["bulkhead", "machine", "run", self.machine, "rm", "-f", *names]]


@dataclass(slots=True)
class Machine:
    """A machine for one tenant, or for those that the policy puts together."""

    name: str
    tenants: list[str]
    members: list[str]
    memory: int
    why: str

    @property
    def commands(self) -> list[list[str]]:
        """What makes it."""
        return [
            ["bulkhead", "machine", "create", "--memory", str(self.memory), "--start", self.name]
        ]


@dataclass(slots=True)
class Step:
    """A wave: who goes, and the dry run of it."""

    number: int
    title: str
    members: list[Placed]
    commands: list[str]
    undo: list[str]


@dataclass(slots=True)
class Density:
    """Sums before and after; 0 where nothing is known."""

    before_machines: int
    before_memory: int
    after_memory: int
    overhead: int
    uncounted: int
    """Workloads without a stated size."""
    fits: int
    """How many of the average workload the host's memory holds afterwards."""
    disk: int
    told: list[str]


@dataclass(slots=True)
class Assessment:
    """The whole."""

    placed: list[Placed]
    machines: list[Machine]
    waves: list[Step]
    density: Density
    staying: list[Placed]
    edition: int


def assess(
    items: Sequence[Item],
    given: Iterable[Statement],
    policy: Policy,
    measured: Comparison | None,
    machine: str = "",
) -> Assessment:
    """The assessment of these items; `given` are facts that hold for all of them."""
    shared = list(given)
    placed = [
        Placed(
            item,
            advise([*statements(item, machine), *shared], policy.of(item.tenant), changes=False),
        )
        for item in items
    ]
    _names(placed)
    machines = _machines(placed, policy)
    for one in placed:
        _judge(one)
    _waves(placed)
    edition = placed[0].advice.edition if placed else 0
    staying = [one for one in placed if not one.wave]
    density = _density(placed, machines, measured)
    return Assessment(placed, machines, _steps(placed, machines), density, staying, edition)


def _names(placed: Sequence[Placed]) -> None:
    """Names that two items would have here are made different."""
    seen: dict[str, int] = {}
    for one in placed:
        name = runs.instances(one.item)[0]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            one.item.called = f"{name}-{seen[name]}"
            one.item.notes.append(f"called {one.item.called} here: another one is {name}")


def _machines(placed: Sequence[Placed], policy: Policy) -> list[Machine]:
    """A machine for every tenant whose containers need a wall only as a group."""
    groups: dict[str, list[Placed]] = {}
    whys: dict[str, str] = {}
    for one in placed:
        tenant = one.item.tenant
        told = policy.tenants.get(tenant)
        if not tenant or not one.item.image or not one.advice.boundary:
            continue
        if told is not None and told.machine:
            name, why = told.machine, f"the policy puts {tenant} there"
        elif one.advice.boundary in ("microvm", "vm") and _alone(one, policy) == "container":
            name, why = f"tenant-{tenant}", "one wall around the tenant, containers inside"
        else:
            continue
        groups.setdefault(name, []).append(one)
        whys[name] = why
    found = []
    for name, members in groups.items():
        if len(members) < 2 and not whys[name].startswith("the policy"):
            continue  # a microVM of its own is less than a machine with one container
        for one in members:
            one.machine = name
        size = sum(one.item.memory * one.item.replicas for one in members) or runs.MACHINE_MEMORY
        tenants = sorted({one.item.tenant for one in members})
        inside = [one.item.name for one in members]
        found.append(Machine(name, tenants, inside, size + MACHINE_OVERHEAD, whys[name]))
    return found


def _alone(one: Placed, policy: Policy) -> str:
    """Its boundary if nobody else were on the machine."""
    values = {k: v for k, v in one.advice.facts.values.items() if k not in _APART}
    alone: Facts = Facts(values)
    return advise(alone.values.values(), policy, changes=False).boundary


def _judge(one: Placed) -> None:
    """Blockers, risks, and the wave by its own nature."""
    item, answer = one.item, one.advice
    if not answer.boundary:
        one.blockers += answer.conflicts
    odd = runs.strange(item)
    if odd:
        one.blockers.append(f"{odd!r} is no name: it begins as an option does")
    for note in item.notes:
        (one.blockers if _blocks(note) else one.risks).append(note)
    one.risks += answer.warnings
    facts = answer.facts
    if item.kind in ("domain", "disk"):
        one.wave = 5
        if facts.value("os") == "windows":
            one.risks.append(
                "Windows wants virtio drivers, or --sata; licences may follow hardware"
            )
    elif not item.image:
        one.blockers.append("no image is named")
    elif facts.value("state") == "database" or facts.value("compliance") != "none":
        one.wave = 4
        one.risks.append("rehearse with a copy; take a backup first")
    elif facts.value("state") in ("volumes", "root"):
        one.wave = 3
        one.risks.append("its volumes are copied while it is stopped")
    else:
        one.wave = 1 if one.behind == "container" else 2
    if item.kind != "domain" and not item.memory:
        one.risks.append("no memory limit: its share of the host is unknown")
    if facts.value("host") == "reach":
        one.wave = 6
    if one.blockers:
        one.wave = 0


def _blocks(note: str) -> bool:
    return any(words in note for words in _BLOCKING)


def _waves(placed: Sequence[Placed]) -> None:
    """Nothing goes before what it depends on; what depends on something that stays, stays."""
    known = {(one.item.source, one.item.name): one for one in placed}
    for _ in placed:
        moved = False
        for one in placed:
            for name in one.item.depends:
                other = known.get((one.item.source, name))
                if other is None or not one.wave:
                    continue
                if not other.wave:
                    one.wave = 0
                    one.blockers.append(f"it depends on {name}, which stays")
                    moved = True
                elif other.wave > one.wave:
                    one.wave = other.wave
                    one.risks.append(f"it goes with {name}, which it depends on")
                    moved = True
        if not moved:
            break


def _in_order(members: Sequence[Placed]) -> list[Placed]:
    """Those that others depend on first; circles as they come."""
    left, done, names = list(members), [], {one.item.name for one in members}
    while left:
        ready = [
            one
            for one in left
            if not any(
                name in names and any(name == other.item.name for other in left if other is not one)
                for name in one.item.depends
            )
        ] or left[:1]
        done += ready
        left = [one for one in left if all(one is not other for other in ready)]
    return done


def _steps(placed: Sequence[Placed], machines: Sequence[Machine]) -> list[Step]:
    found: list[Step] = []
    made: set[str] = set()
    for number, title in WAVES.items():
        members = _in_order([one for one in placed if one.wave == number])
        if not members:
            continue
        words: list[list[str]] = []
        for machine in machines:
            if machine.name not in made and any(one.machine == machine.name for one in members):
                made.add(machine.name)
                words += machine.commands
        for one in members:
            words += one.commands
        lines: list[str] = []
        for line in map(runs.line, words):
            shared = " network create " in line or " volume create " in line
            if shared and line in made:
                continue
            made.add(line)
            lines.append(line)
        undo = [runs.line(words) for one in reversed(members) for words in one.undo]
        found.append(Step(len(found) + 1, title, members, lines, undo))
    return found


def _density(
    placed: Sequence[Placed], machines: Sequence[Machine], measured: Comparison | None
) -> Density:
    whole = [one for one in placed if one.item.kind in ("domain", "disk")]
    sized = [one for one in placed if one.item.memory]
    before = sum(one.item.memory * one.item.replicas for one in sized)
    overhead, unknown = 0.0, set()
    for one in placed:
        if not one.advice.boundary:
            continue
        kind = "container" if one.machine else one.advice.boundary
        each = measured.figure(kind, "memory_mib") if measured else None
        if each is None:
            unknown.add(kind)
        else:
            overhead += each * (1 << 20) * one.item.replicas
    overhead += len(machines) * MACHINE_OVERHEAD
    count = sum(one.item.replicas for one in sized)
    after = before + int(overhead)
    told = []
    if measured is None:
        told.append(f"what boundaries cost themselves is not in these sums: {NOTHING}")
    elif unknown:
        told.append(f"not measured, and not in these sums: {', '.join(sorted(unknown))}")
    if machines:
        told.append(f"each machine is given {MACHINE_OVERHEAD >> 20} MiB for its own system")
    return Density(
        before_machines=len(whole),
        before_memory=before,
        after_memory=after,
        overhead=int(overhead),
        uncounted=len(placed) - len(sized),
        fits=int(host_memory() // (after / count)) if count and after else 0,
        disk=sum(one.item.disk_bytes for one in placed),
        told=told,
    )
