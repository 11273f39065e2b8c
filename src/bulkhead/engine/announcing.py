"""Events of what a run takes and gives back: its networks and volumes, as Docker tells them."""

from typing import TYPE_CHECKING, Any

from bulkhead.engine.records import Workload

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine

_DRIVERS = {"host": "host", "none": "null"}
"""Networks that are not bridges, by name."""


def begun(engine: "Engine", workload: Workload) -> None:
    """A run has its volumes and networks."""
    for point in workload.record.mounts:
        if point.type_ == "volume":
            facts = {
                "driver": "local",
                "container": workload.id,
                "destination": point.destination,
                "read/write": "true" if point.rw else "false",
                "propagation": point.propagation,
            }
            engine.events.emit("volume", "mount", point.name, facts)
    _networks(engine, workload, "connect")


def ended(engine: "Engine", workload: Workload) -> None:
    """A run lets go of them; its settings must still be there."""
    _networks(engine, workload, "disconnect")
    for point in workload.record.mounts:
        if point.type_ == "volume":
            facts = {"driver": "local", "container": workload.id}
            engine.events.emit("volume", "unmount", point.name, facts)


def _networks(engine: "Engine", workload: Workload, action: str) -> None:
    found: dict[str, dict[str, Any]] = (workload.settings or {}).get("Networks") or {}
    for name, endpoint in found.items():
        facts = {"container": workload.id, "name": name, "type": _DRIVERS.get(name, "bridge")}
        engine.events.emit("network", action, endpoint["NetworkID"], facts)
