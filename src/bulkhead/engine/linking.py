"""Links of the default bridge (`docker run --link`): names that one workload alone has for others.

They become lines of /etc/hosts at every start; Docker's environment variables for them do not come
along. Links on networks of one's own are the resolver's.
"""

from typing import TYPE_CHECKING

from bulkhead.engine import body
from bulkhead.engine.records import Record
from bulkhead.errors import Conflict, Invalid, NotFound

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_DEFAULT = frozenset({"", "default", "bridge"})
_BRIDGE = "bridge"


def settle(engine: "Engine", host: body.HostConfig) -> None:
    """Make the links of a request "name:alias"; Invalid for what cannot be linked to."""
    if not host.links:
        return
    mode = host.network_mode
    for kind in ("host", "container"):
        if mode.partition(":")[0] == kind:
            what = "host type networking" if kind == "host" else "container type network"
            raise Invalid(
                f"conflicting options: {what} can't be used with links. "
                "This would result in undefined behavior"
            )
    if mode not in _DEFAULT:
        return
    settled = []
    for text in host.links:
        target, _, alias = text.partition(":")
        target, alias = target.removeprefix("/"), alias.rpartition("/")[2]
        try:
            other = engine.workloads.find(target)
        except NotFound as error:
            # Not "not found": clients would take the image to be missing.
            raise Invalid(f"could not get container for {target}: {error.message}") from None
        settled.append(f"{other.record.name}:{alias or target}")
    host.links = settled


def hosts(engine: "Engine", record: Record) -> tuple[str, ...]:
    """Further lines of /etc/hosts for a start, as "name:address"; Conflict if one does not run."""
    links = record.host.links
    if not links or record.host.network_mode not in _DEFAULT:
        return ()
    found: list[str] = []
    for text in links:
        target, _, alias = text.partition(":")
        try:
            other = engine.workloads.find(target)
        except NotFound:
            raise Conflict(f"Cannot link to a container that is gone: /{target}") from None
        if not other.running:
            raise Conflict(
                f"Cannot link to a non running container: /{target} AS /{record.name}/{alias}"
            )
        networks = (other.settings or {}).get("Networks") or {}
        address = (networks.get(_BRIDGE) or {}).get("IPAddress")
        if not address:
            raise Conflict(
                f"Cannot link to /{target}, as it does not belong to the default network"
            )
        names = dict.fromkeys((alias, target, other.id[:12]))
        found += [f"{name}:{address}" for name in names]
    return tuple(found)


def shown(record: Record) -> list[str] | None:
    """HostConfig.Links as `inspect` says it."""
    if not record.host.links or record.host.network_mode not in _DEFAULT:
        return record.host.links
    pairs = (text.partition(":") for text in record.host.links)
    return [f"/{target}:/{record.name}/{alias}" for target, _, alias in pairs]
