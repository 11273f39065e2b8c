"""Tenants: who a workload is for, and what the policy says of them (choosing/policy.py).

`--tenant NAME` is a label. The policy ties a tenant to a least boundary, so that its workloads have
kernels of their own, or to a machine, which then is nobody else's. Workloads of different tenants
never share a guest or the namespaces of a container, with a policy or without.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bulkhead.boundaries.vmm.acceleration import acceleration
from bulkhead.choosing import policy
from bulkhead.engine import body
from bulkhead.engine.records import Record
from bulkhead.errors import Denied

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

LABEL = "bulkhead.tenant"
_HARDWARE = frozenset({"microvm", "vm"})
_STARTING = frozenset({"run", "create"})


def of(record: Record) -> str:
    """The tenant of a workload, "" for none."""
    return (record.config.labels or {}).get(LABEL, "")


def boundary(engine: "Engine", request: body.CreateBody) -> str:
    """What a workload gets for which nobody names a boundary: its tenant's least; "" for none."""
    name = (request.labels or {}).get(LABEL, "")
    if not name:
        return ""
    tenant = policy.load(engine.home).tenants.get(name)
    return tenant.boundary if tenant is not None else ""


def check(engine: "Engine", record: Record) -> None:
    """Denied, in words, for what the policy does not allow this workload."""
    rules = policy.load(engine.home)
    if rules.require_kvm and record.boundary in _HARDWARE and acceleration().name != "kvm":
        raise Denied(
            f"{rules.source}: require-kvm: this host has no /dev/kvm that works, and --boundary "
            f"{record.boundary} would be no wall of the hardware's"
        )
    name = of(record)
    if name:
        _check_tenant(rules, name, record)
    host = record.host
    for mode in (host.network_mode, host.pid_mode, host.ipc_mode):
        if not mode.startswith("container:"):
            continue
        other = engine.workloads.find(mode.removeprefix("container:")).record
        if of(other) != name:
            raise Denied(
                f"{other.name} is {_whose(of(other))}, this workload is {_whose(name)}: strangers "
                "do not share a kernel's namespaces"
            )


def _whose(name: str) -> str:
    return f"tenant {name}'s" if name else "no tenant's"


def _check_tenant(rules: policy.Policy, name: str, record: Record) -> None:
    tenant = rules.tenants.get(name)
    if tenant is None:
        if rules.tenants:
            known = ", ".join(sorted(rules.tenants))
            raise Denied(f"{rules.source}: there is no tenant {name!r} (there are: {known})")
        return
    if tenant.machine:
        raise Denied(
            f"{rules.source}: tenant {name} is tied to the machine {tenant.machine}: --boundary "
            f"vm:{tenant.machine}"
        )
    least = policy.BOUNDARIES.index(tenant.boundary) if tenant.boundary else 0
    if policy.BOUNDARIES.index(record.boundary) < least:
        raise Denied(
            f"{rules.source}: tenant {name} needs --boundary {tenant.boundary} at least, not "
            f"{record.boundary}"
        )


def admit(engine: "Engine", machine: str, name: str, argv: Sequence[str]) -> None:
    """Denied if tenant `name` ("" for none) may not start workloads in that machine."""
    if not argv or argv[0] not in _STARTING:
        return
    rules = policy.load(engine.home)
    owners = sorted(one for one, tenant in rules.tenants.items() if tenant.machine == machine)
    if owners and name not in owners:
        raise Denied(
            f"{rules.source}: the machine {machine} is {_whose(owners[0])}: --tenant {owners[0]}"
        )
    tenant = rules.tenants.get(name)
    if name and rules.tenants and (tenant is None or tenant.machine != machine):
        raise Denied(
            f"{rules.source}: tenant {name} is not tied to the machine {machine}: strangers never "
            "share one"
        )
