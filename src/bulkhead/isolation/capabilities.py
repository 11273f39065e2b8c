"""Which capabilities a workload gets: Docker's default set and its rules for adding and dropping.

Pure, but for `held()`, which asks the kernel what this process may give away at all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from bulkhead.errors import Invalid, Unsupported
from bulkhead.linux import capabilities as kernel

DEFAULT: tuple[str, ...] = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""Docker's fourteen."""

ALL = "ALL"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to a thread: masks of its five sets, and the structures of capset(2).

    `drop` are the numbers to take out of the bounding set (prctl PR_CAPBSET_DROP), before the
    capset; `raise_ambient` those to raise (PR_CAP_AMBIENT_RAISE), after it.
    """

    effective: int
    permitted: int
    inheritable: int
    bounding: int
    ambient: int
    drop: tuple[int, ...]
    raise_ambient: tuple[int, ...]
    header: bytes
    data: bytes

    def describe(self) -> dict[str, list[str]]:
        """The sets by name, for people."""
        return {
            name: list(kernel.names(getattr(self, name)))
            for name in ("effective", "permitted", "inheritable", "bounding", "ambient")
        }


@cache
def held() -> frozenset[str]:
    """The capabilities this process can give away: permitted, bounding, and known by name.

    Looked up once: this process gives none of them up.
    """
    own = kernel.of_process()
    known = (1 << len(kernel.NAMES)) - 1
    return frozenset(kernel.names(own.permitted & own.bounding & known))


def normalize(name: str, option: str = "capability") -> str:
    """`name` in the form "CAP_CHOWN" ("chown" and "cap_chown" mean it too), or "ALL".

    Invalid, in Docker's words, for a name that is none; `option` says where it stood.
    """
    upper = name.strip().upper()
    if upper == ALL:
        return ALL
    full = upper if upper.startswith("CAP_") else f"CAP_{upper}"
    if full not in kernel.NUMBERS:
        raise Invalid(f'invalid {option}: unknown capability: "{full}"', capability=full)
    return full


def select(
    add: Iterable[str] = (),
    drop: Iterable[str] = (),
    *,
    privileged: bool = False,
    available: frozenset[str] | None = None,
) -> tuple[str, ...]:
    """The capabilities of a container with --cap-add `add` and --cap-drop `drop`, by number.

    Docker's rules: privileged is everything; `add` ALL is everything but `drop`; `drop` ALL is
    nothing but `add`; otherwise the default set without `drop` and with `add` (which wins).
    "Everything" and the default set are what `available` (by default `held()`) has of them;
    Unsupported if one added by name is not available.
    """
    adds = {normalize(name, "CapAdd") for name in add}
    drops = {normalize(name, "CapDrop") for name in drop}
    own = held() if available is None else available
    named = adds - {ALL}
    if privileged:
        chosen = own
    elif ALL in adds:
        chosen = own - drops
    else:
        lacking = sorted(named - own)
        if lacking:
            raise Unsupported(
                f"cannot give {', '.join(lacking)}: the engine itself does not hold it"
                " (start the engine with it, or leave out --cap-add)",
                capabilities=lacking,
            )
        if ALL in drops:
            chosen = frozenset(named)
        else:
            chosen = frozenset((own.intersection(DEFAULT) - drops) | named)
    return tuple(sorted(chosen, key=kernel.NUMBERS.__getitem__))


def plan(
    *,
    effective: Iterable[str],
    permitted: Iterable[str],
    inheritable: Iterable[str] = (),
    bounding: Iterable[str],
    ambient: Iterable[str] = (),
    available: frozenset[str] | None = None,
) -> Plan:
    """The sets of an OCI configuration as system call arguments.

    What `available` (by default `held()`) lacks is left out, as runtime-spec wants ("the runtime
    SHOULD log and ignore"); what the kernel forbids is Invalid here rather than EPERM in the
    child: effective beyond permitted, ambient beyond permitted or inheritable.
    """
    own = kernel.mask(held() if available is None else available)
    masks = {
        "effective": _mask(effective) & own,
        "permitted": _mask(permitted) & own,
        "inheritable": _mask(inheritable) & own,
        "bounding": _mask(bounding) & own,
        "ambient": _mask(ambient) & own,
    }
    _subset(masks, "effective", "permitted")
    _subset(masks, "ambient", "permitted")
    _subset(masks, "ambient", "inheritable")
    header, data = kernel.capset_arguments(
        masks["effective"], masks["permitted"], masks["inheritable"]
    )
    everything = (1 << kernel.last() + 1) - 1
    return Plan(
        **masks,
        drop=_numbers(everything & ~masks["bounding"]),
        raise_ambient=_numbers(masks["ambient"]),
        header=header,
        data=data,
    )


def _mask(names: Iterable[str]) -> int:
    return kernel.mask([_exact(name) for name in names])


def _exact(name: str) -> str:
    if name not in kernel.NUMBERS:
        raise Invalid(f"process.capabilities: unknown capability {name!r}")
    return name


def _numbers(bits: int) -> tuple[int, ...]:
    return tuple(number for number in range(bits.bit_length()) if bits >> number & 1)


def _subset(masks: dict[str, int], smaller: str, larger: str) -> None:
    beyond = kernel.names(masks[smaller] & ~masks[larger])
    if beyond:
        raise Invalid(
            f"process.capabilities: {', '.join(beyond)} is in the {smaller} set"
            f" but not in the {larger} set"
        )
