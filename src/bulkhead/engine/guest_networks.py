"""Networks of workloads with a kernel of their own, changed while they run.

The host's end is as for containers: an interface in the namespace of the guest's monitor. It
becomes a port of a bridge with a tap (network/tap.py), the machine gets that tap on a spare card,
and the guest sets the card up (boundaries/guest/cards.py).
"""

import asyncio
import contextlib
from typing import TYPE_CHECKING

from bulkhead.boundaries.guest import cards
from bulkhead.boundaries.guest.instance import Guest
from bulkhead.boundary.seam import Nic
from bulkhead.engine.records import Workload
from bulkhead.errors import BulkheadError, Unsupported
from bulkhead.linux.fds import OwnedFd
from bulkhead.network import tap
from bulkhead.network.model import EndpointRequest

if TYPE_CHECKING:
    from bulkhead.engine.core import Engine


def _guest(workload: Workload) -> Guest:
    instance: object = workload.instance
    if not isinstance(instance, Guest):
        raise Unsupported(
            f"the networks of a running workload behind the boundary {workload.record.boundary} "
            f"with its kernel cannot change: stop {workload.record.name} first"
        )
    return instance


async def connect(
    engine: "Engine", workload: Workload, network: str, request: EndpointRequest
) -> None:
    """Put a running guest on one more network; as it was before if that fails."""
    running = _guest(workload).wires()
    number = await asyncio.to_thread(running.free)
    engine.networks.connect(workload.id, network, request)
    try:
        cables = engine.networks.cables(workload.id)
        name = cables.names[engine.networks.inspect(network)["Id"]]
        await asyncio.to_thread(_plug, workload, running, number, name, cables.gateways)
    except BaseException:
        with contextlib.suppress(BulkheadError, OSError):
            await disconnect(engine, workload, network)
        raise


def _plug(
    workload: Workload, running: cards.Running, number: int, name: str, gateways: cards.Gateways
) -> None:
    with contextlib.ExitStack() as undo:
        spare: OwnedFd | None = running.cards.spare_tap(number)
        if spare is not None:
            undo.callback(spare.close)
        made = tap.guest_tap(_namespace(workload), name, spare)
        undo.callback(made.tap_fd.close)
        routes = tuple((route.destination, route.gateway) for route in made.routes)
        nic = Nic(made.name, made.tap_fd, made.mac, made.addresses, routes, made.mtu)
        running.connect(number, nic, gateways)


def _namespace(workload: Workload) -> str:
    return f"/proc/{workload.record.pid}/ns/net"


async def disconnect(engine: "Engine", workload: Workload, network: str) -> None:
    """Take a running guest off a network."""
    running = _guest(workload).wires()
    identity = engine.networks.inspect(network)["Id"]
    name = engine.networks.cables(workload.id).names[identity]
    bridge = tap.bridge_of(_namespace(workload), name)
    engine.networks.disconnect(workload.id, network)
    gateways = engine.networks.cables(workload.id).gateways
    await asyncio.to_thread(running.disconnect, name, gateways)
    tap.let_go(_namespace(workload), bridge, name)


async def follow(engine: "Engine", workload: Workload) -> None:
    """The guest's files of /etc, and those of the others in it, are those of the host again."""
    shared = f"container:{workload.id}"
    for other in engine.workloads:
        instance: object = other.instance
        concerned = other is workload or other.record.host.network_mode == shared
        if concerned and other.running and isinstance(instance, Guest):
            with contextlib.suppress(BulkheadError):
                await asyncio.to_thread(instance.rewrite_files)
