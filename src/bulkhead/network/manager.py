"""The network's face towards the engine: networks, attached workloads, published ports.

All methods belong on one thread (the engine's loop) and make system calls of some tenths of a
millisecond. On the way of a launch nothing is waited for: namespaces wait in the lobby, and a
workload on the default bridge without ports costs one small file.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from bulkhead.errors import Conflict, Denied, Invalid, NotFound, Unsupported
from bulkhead.home import Home
from bulkhead.linux import netns
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.network import attached as shapes
from bulkhead.network import doctor, files, host, inner, ports
from bulkhead.network.attached import Attached, Records
from bulkhead.network.bridges import DOCKER_EACH_S, Bridges, Endpoint
from bulkhead.network.catalog import NO_FILTERS, Catalog, DocumentStore
from bulkhead.network.handover import Handovers
from bulkhead.network.helperlink import HelperLink
from bulkhead.network.lobby import Lobby
from bulkhead.network.model import Attachment, AttachRequest, EndpointRequest, Finding
from bulkhead.network.records import Network
from bulkhead.network.reuse import Lent
from bulkhead.network.wiring import Wiring, default_routes

# The class has a method called list.
_Shapes = list[dict[str, Any]]
_Names = list[str]
_Findings = list[Finding]
_Processes = list[tuple[str, list[str], dict[str, str]]]
Sockets = shapes.Sockets
SETTLE_S = 2.0
"""How long the helper may take to close a port that is wanted again."""


class NetworkManager:
    """Everything about networks of one installation. See docs/network.md for the duties."""

    def __init__(self, home: Home, documents: DocumentStore) -> None:
        self._home = home
        self._catalog = Catalog(home, documents)
        self._bridges = Bridges(home, self._catalog.all)
        self._records = Records(home)
        self._lobby = Lobby()
        self._lent = Lent(self._lobby)
        self._wiring = Wiring(self._catalog, self._bridges, self._lobby)
        self._link = HelperLink(home)
        self._attached: dict[str, Attached] = {}
        self._namespaces: dict[str, OwnedFd] = {}
        self._pids: dict[str, int] = {}
        self.handovers = Handovers(
            self._attached, self._pids, self._bridges, self._records, self._link, self._namespace
        )

    # -- networks

    def create(self, body: Mapping[str, Any]) -> str:
        """A new network from Docker's NetworkCreate body; its id."""
        network = self._catalog.create(body, self._bridges.choose4, self._bridges.choose6)
        return network.id

    def remove(self, ref: str) -> None:
        """Remove a network; Denied while a workload is attached."""
        if self._catalog.pseudo(ref):
            raise Denied(f"{ref} is a pre-defined network and cannot be removed")
        network = self._catalog.find(ref)
        if self._users(network):
            raise Denied(
                f"error while removing network: network {network.name} id {network.id} has "
                "active endpoints"
            )
        active = self._bridges.active.get(network.id)
        if active is not None:
            if network.default:
                raise Denied(f"{network.name} is a pre-defined network and cannot be removed")
            self._bridges.down(active)
        self._catalog.remove(network)

    def inspect(self, ref: str, verbose: bool = False) -> dict[str, Any]:
        """Docker's Network map, with the attached workloads; `verbose` says no more."""
        found = self._catalog.pseudo(ref)
        if found is not None:
            return found
        return self._describe(self._catalog.find(ref))

    def list(self, filters: Mapping[str, Iterable[str]] = NO_FILTERS) -> _Shapes:
        """Docker's Network maps of what the filters let through."""
        chosen = self._catalog.select(filters, lambda one: bool(self._users(one)))
        return [one.describe() if isinstance(one, Network) else one for one in chosen]

    def prune(self, filters: Mapping[str, Iterable[str]] = NO_FILTERS) -> _Names:
        """Remove user-defined networks nobody uses; their names."""
        unused = self._catalog.select(
            {**filters, "dangling": ["true"]}, lambda n: bool(self._users(n))
        )
        removed = []
        for one in unused:
            if isinstance(one, Network):
                self.remove(one.id)
                removed.append(one.name)
        return removed

    def _users(self, network: Network) -> dict[str, Endpoint]:
        active = self._bridges.active.get(network.id)
        return active.endpoints if active else {}

    def _describe(self, network: Network) -> dict[str, Any]:
        shape = network.describe()
        for workload_id, endpoint in self._users(network).items():
            active = self._bridges.active[network.id]
            prefix = {version: pool.subnet.prefixlen for version, pool in active.pools.items()}
            shape["Containers"][workload_id] = {
                "Name": self._attached[workload_id].request.name,
                "EndpointID": endpoint.id,
                "MacAddress": endpoint.mac,
                "IPv4Address": f"{endpoint.ipv4}/{prefix[4]}" if endpoint.ipv4 else "",
                "IPv6Address": f"{endpoint.ipv6}/{prefix[6]}" if endpoint.ipv6 else "",
            }
        return shape

    # -- workloads

    def prepare(self, request: AttachRequest) -> Attachment:
        """Make ready what a launch needs; nothing of it stays if this fails.

        Errors: NotFound (network, container), Conflict (port, address), Invalid, Unsupported.
        """
        if request.workload_id in self._attached:
            raise Conflict(f"workload {request.workload_id} is attached to its networks already")
        mode = request.mode
        if request.guest and mode == "host":
            raise Unsupported("network mode host is not for virtual machines: use a bridge network")
        if mode in ("host", "none"):
            return self._prepare_simple(request, mode)
        if mode.startswith("container:"):
            return self._prepare_shared(request, mode.partition(":")[2])
        return self._prepare_bridged(request)

    def _prepare_simple(self, request: AttachRequest, kind: str) -> Attachment:
        made = Attached(request, kind)
        path = None
        if kind == "none":
            bare = self._lobby.take_bare()
            bare.netlink.close()
            self._namespaces[request.workload_id] = bare.netns
            path = f"/proc/self/fd/{bare.netns.fileno()}"
        self._attached[request.workload_id] = made
        self._records.write_first(made)
        return self._attachment(made, path)

    def _prepare_shared(self, request: AttachRequest, target: str) -> Attachment:
        if request.ports or request.publish_all:
            raise Invalid(
                "conflicting options: port publishing and the container type network mode"
            )
        pid = self._pids.get(target)
        if pid is None:
            raise Conflict(f"cannot join network of a non running container: {target}")
        if target in self._attached and self._attached[target].request.guest != request.guest:
            raise Unsupported(
                f"the network of a virtual machine can be joined from inside of it only: {target}"
            )
        self._lent.drop(target)
        made = Attached(request, "container", target=target)
        self._attached[request.workload_id] = made
        self._records.write_first(made)
        return self._attachment(made, f"/proc/{pid}/ns/net")

    def _prepare_bridged(self, request: AttachRequest) -> Attachment:
        wanted = self._wiring.wanted(request)
        made = Attached(request, "bridge")
        workload_id = request.workload_id
        with contextlib.ExitStack() as undo:
            bare = self._wiring.plug_all(made, wanted, undo)
            self._attached[workload_id] = made
            undo.callback(self._attached.pop, workload_id)
            sockets: Sockets = []
            undo.callback(shapes.close_all, sockets)
            if request.ports or request.publish_all:
                self._publish(made, sockets, undo)
            if self._needs_resolver(made):
                self._open_resolver(made, bare.netns.fileno(), sockets)
            self._records.write_first(made)
            undo.callback(self._records.remove, workload_id)
            if made.served:
                undo.callback(self._link.drop, workload_id)
                self._link.set(made, sockets)
            self._namespaces[workload_id] = bare.netns
            undo.callback(self._namespaces.pop, workload_id)
            attachment = self._attachment(made, f"/proc/self/fd/{bare.netns.fileno()}")
            undo.pop_all()
        self._lent.lend(made, bare)
        return attachment

    def _needs_resolver(self, made: Attached) -> bool:
        """Whether names are asked at 127.0.0.11: on user-defined networks, and where the host's
        own resolvers can be reached on its loopback only.
        """
        if any(one.names for one in made.endpoints):
            return True
        servers = made.request.dns or files.host_resolution().servers
        return bool(servers) and all(files.is_loopback(one) for one in servers)

    def _open_resolver(self, made: Attached, namespace: int, sockets: Sockets) -> None:
        guest = made.request.guest
        udp, tcp = netns.inside(namespace, inner.prepare_guest if guest else inner.prepare)
        sockets += [("udp", udp), ("tcp", tcp)]
        made.resolver_ports = [udp.getsockname()[1], tcp.getsockname()[1]]
        made.servers = list(made.request.dns)
        made.forward = bool(made.default_routes)

    def _publish(self, made: Attached, sockets: Sockets, undo: contextlib.ExitStack) -> None:
        """Bind the ports (the sockets are appended) and redirect them; undone by `undo`."""
        request = made.request
        actives = self._wiring.actives(made)
        routes = default_routes(actives)
        if not routes:
            raise Invalid(
                f"container {request.name}: ports cannot be published from internal networks"
            )
        binding = (routes.get(4) or routes[6]).network.host_binding
        wishes = ports.wishes(
            request.ports,
            request.exposed,
            publish_all=request.publish_all,
            default_address=binding,
        )
        try:
            taken = ports.take(wishes)
        except Conflict:
            # One of ours that was given up just now may still be in the helper's hands.
            if not self._link.settle(SETTLE_S):
                raise
            taken = ports.take(wishes)
        sockets += [(one.role, one.held) for one in taken]
        made.ports = shapes.port_records(taken)
        made.publishing = {}
        for version, active in routes.items():
            endpoint = active.endpoints[request.workload_id]
            address = endpoint.ipv4 if version == 4 else endpoint.ipv6
            made.publishing[str(version)] = address
            messages = [rt.hairpin_port(endpoint.host_name)]
            if not active.network.icc and host.bridges_are_filtered():
                # Redirected frames then never leave the bridge; who may send is decided by our
                # chains, which see all of them.
                messages.append(rt.isolate_port(endpoint.host_name, isolated=False))
            self._bridges.route.transact(messages)
        redirects = shapes.redirects(made)
        self._bridges.publish(redirects)
        undo.callback(self._bridges.unpublish, redirects)

    def _attachment(self, made: Attached, path: str | None) -> Attachment:
        request, hostname = made.request, made.request.hostname
        if not hostname and made.kind != "host":
            hostname = request.workload_id[:12]
        hosts, resolv_conf = self.files(request.workload_id)
        return Attachment(
            netns_path=path,
            settings=self.settings(request.workload_id),
            hosts=hosts,
            resolv_conf=resolv_conf,
            hostname=hostname,
        )

    def files(self, workload_id: str) -> tuple[str, str]:
        """The contents of /etc/hosts and /etc/resolv.conf now; `connect` may change them."""
        made = self._find(workload_id)
        if made.kind == "container" and made.target in self._attached:
            return self.files(made.target)
        gateways = [
            gateway
            for endpoint in made.endpoints[:1]
            for version in (4, 6)
            if (gateway := self._bridges.active[endpoint.network].gateway(version))
        ]
        hosts = shapes.hosts_file(made, ["127.0.0.1"] if made.kind == "host" else gateways)
        return hosts, shapes.resolv_conf(made)

    def _find(self, workload_id: str) -> Attached:
        try:
            return self._attached[workload_id]
        except KeyError:
            raise NotFound(f"workload {workload_id} is not attached to any network") from None

    def started(self, workload_id: str, pid: int) -> None:
        """The workload runs: its process keeps the namespace from now on."""
        made = self._find(workload_id)
        self._pids[workload_id] = pid
        held = self._namespaces.pop(workload_id, None)
        if held is not None:
            held.close()
        if made.served:
            # It may have ended already: then `release` follows.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._records.write_pid(workload_id, pid)
            self._link.started(workload_id, pid)

    def release(self, workload_id: str) -> None:
        """The workload has ended, or never started: give everything back. Idempotent."""
        if self.handovers.detained(workload_id):
            return
        made = self._attached.pop(workload_id, None)
        if made is None:
            return
        self._pids.pop(workload_id, None)
        held = self._namespaces.pop(workload_id, None)
        if held is not None:
            held.close()
        with contextlib.ExitStack() as all_of_it:
            all_of_it.callback(self._records.remove, workload_id)
            if any(one.target == workload_id for one in self._attached.values()):
                # Who joined its namespace keeps that alive, but not its addresses.
                for endpoint in made.endpoints:
                    all_of_it.callback(self._wiring.unplug, endpoint)
            waits = self._lent.take_back(made)
            for endpoint in made.endpoints:
                active = self._bridges.active.get(endpoint.network)
                if active is not None:
                    all_of_it.callback(active.leave, workload_id, keep=waits)
            if made.served:
                all_of_it.callback(self._link.drop, workload_id)
            all_of_it.callback(self._bridges.unpublish, shapes.redirects(made))

    # -- while it runs

    def keep_apart(self, workload_id: str) -> None:
        """Others get at what is inside: its namespace is for nobody after it."""
        self._lent.drop(workload_id)

    def connect(self, workload_id: str, network: str, endpoint: EndpointRequest) -> dict[str, Any]:
        """Put a running workload on one more network; its settings afterwards.

        `files` may say something new then. Errors: NotFound, Conflict, Denied, Invalid.
        """
        made = self._find(workload_id)
        if made.kind != "bridge":
            raise Denied(f"container cannot be connected to another network: it has {made.kind}")
        if self._catalog.pseudo(network):
            raise Denied(f"container cannot be connected to network {network}")
        found = self._catalog.find(network)
        if any(one.network == found.id for one in made.endpoints):
            raise Denied(
                f"endpoint with name {made.request.name} already exists in network {found.name}"
            )
        wanted = dict(made.request.endpoints)
        wanted[found.id] = endpoint
        with self._namespace(workload_id) as namespace:
            self._wiring.plug_live(made, found, endpoint, namespace)
            made.request = replace(made.request, endpoints=wanted)
            sockets: Sockets = []
            if not made.resolver_ports and self._needs_resolver(made):
                self._open_resolver(made, namespace, sockets)
        self._changed(made, sockets)
        return self.settings(workload_id)

    def cables(self, workload_id: str) -> shapes.Cables:
        """The interfaces of a running workload."""
        return shapes.cables(self._find(workload_id), self._bridges.active)

    def disconnect(self, workload_id: str, network: str, force: bool = False) -> dict[str, Any]:
        """Take a running workload from a network; its settings afterwards.

        NotFound if it is not on it, unless `force`.
        """
        made = self._find(workload_id)
        found = self._catalog.find(network)
        endpoint = next((one for one in made.endpoints if one.network == found.id), None)
        if endpoint is None:
            if force:
                return self.settings(workload_id)
            raise Denied(f"container {workload_id} is not connected to network {found.name}")
        with self._namespace(workload_id) as namespace:
            self._wiring.unplug_live(made, endpoint, namespace)
        kept = {
            ref: one
            for ref, one in made.request.endpoints.items()
            if self._catalog.find(ref).id != found.id
        }
        made.request = replace(made.request, endpoints=kept)
        self._changed(made, [])
        return self.settings(workload_id)

    def _changed(self, made: Attached, sockets: Sockets) -> None:
        """After connect or disconnect: redirections, record and helper follow."""
        made.forward = bool(made.default_routes)
        before = shapes.redirects(made)
        made.publishing = {}
        for version, network in made.default_routes.items():
            endpoint = next(one for one in made.endpoints if one.network == network)
            made.publishing[version] = endpoint.ipv4 if version == "4" else endpoint.ipv6
        after = shapes.redirects(made)
        if before != after:
            self._bridges.unpublish(before)
            self._bridges.publish(after)
        self._records.write(made)
        if made.served:
            self._link.set(made, sockets)
            pid = self._pids.get(made.request.workload_id)
            if pid is not None:
                self._records.write_pid(made.request.workload_id, pid)
                self._link.started(made.request.workload_id, pid)

    def publish(
        self,
        workload_id: str,
        wanted: Mapping[str, Iterable[Mapping[str, str]]],
        *,
        publish_all: bool = False,
    ) -> dict[str, Any]:
        """Replace the published ports of a running workload; its settings afterwards.

        Ports published before and still asked for stay open throughout. On Conflict nothing has
        changed.
        """
        made = self._find(workload_id)
        if made.kind != "bridge":
            raise Invalid(f"ports cannot be published with network mode {made.request.mode}")
        listed = {port: tuple(bindings) for port, bindings in wanted.items()}
        request = replace(made.request, ports=listed, publish_all=publish_all)
        old = Attached(made.request, "bridge", ports=made.ports, publishing=made.publishing)
        kept, fresh = shapes.keep_ports(made, request)
        sockets: Sockets = []
        with contextlib.ExitStack() as undo:
            undo.callback(shapes.close_all, sockets)
            trial = Attached(fresh, "bridge", endpoints=made.endpoints)
            if fresh.ports or fresh.publish_all:
                self._publish(trial, sockets, undo)
            undo.pop_all()
        gone = Attached(made.request, "bridge", publishing=old.publishing)
        gone.ports = [one for one in old.ports if one not in kept]
        moved = Attached(made.request, "bridge", publishing=old.publishing)
        moved.ports = [one for one in kept if one not in old.ports]
        self._bridges.unpublish(shapes.redirects(gone))
        self._bridges.publish(shapes.redirects(moved))
        made.request = request
        made.ports = [*kept, *trial.ports]
        made.publishing = trial.publishing or made.publishing
        self._records.write(made)
        self._link.set(made, sockets)
        pid = self._pids.get(workload_id)
        if pid is not None and made.served:
            self._records.write_pid(workload_id, pid)
            self._link.started(workload_id, pid)
        return self.settings(workload_id)

    def rename(self, workload_id: str, name: str) -> None:
        """The workload has another name: it is found by that one from now on."""
        made = self._attached.get(workload_id)
        if made is None:
            return
        made.request = replace(made.request, name=name.lstrip("/"))
        for endpoint in made.endpoints:
            if endpoint.names:
                endpoint.names = shapes.dns_names(made.request, endpoint.request)
        self._records.write(made)
        if made.served:
            self._link.set(made, [])

    @contextlib.contextmanager
    def _namespace(self, workload_id: str) -> Iterator[int]:
        """A descriptor of a workload's network namespace, for the time of a `with`."""
        self._lent.drop(workload_id)
        held = self._namespaces.get(workload_id)
        if held is not None:
            yield held.fileno()
            return
        pid = self._pids.get(workload_id)
        if pid is None:
            raise Conflict(f"container {workload_id} is not running")
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Conflict(f"container {workload_id} is not running") from None
        try:
            yield fd
        finally:
            os.close(fd)

    def settings(self, workload_id: str) -> dict[str, Any]:
        """Docker's NetworkSettings; the empty shape for what is not attached."""
        shape = shapes.empty_settings()
        made = self._attached.get(workload_id)
        if made is None:
            return shape
        shape["SandboxID"] = workload_id
        pid = self._pids.get(workload_id)
        shape["SandboxKey"] = f"/proc/{pid}/ns/net" if pid else ""
        if made.kind in ("host", "none"):
            identity = self._catalog.pseudo_id(made.kind)
            shape["Networks"][made.kind] = shapes.pseudo_endpoint(identity)
            return shape
        shape["Ports"] = shapes.port_map(made)
        for endpoint in made.endpoints:
            active = self._bridges.active[endpoint.network]
            one = shapes.endpoint_settings(endpoint, active)
            shape["Networks"][active.network.name] = one
            if active.network.default:
                shape.update({key: one[key] for key in shape if key in one})
        return shape

    # -- duties

    def refill(self) -> float | None:
        """What can wait until nobody waits. Never blocks long.

        Returns after how many seconds it wants to be called again, None if not at all.
        """
        soon: float | None = None
        if not self._link.flush():
            if self.helpers():
                soon = 0.02
            else:
                # Only that it may forget, and it is gone.
                self._link.close()
        elif self._link.busy:
            soon = 0.02
        default = self._bridges.active.get(self._catalog.default.id)
        if default is not None and self._bridges.is_idle(default):
            if self._lobby.filling:
                return 0.01
            self._lobby.unwire(self._wiring.spare)
            default = None
        wait = self._bridges.sweep()
        self._bridges.recheck_docker()
        plan = self._wiring.plan_default if default is not None else None
        waits = [wait, soon, self._lobby.fill(plan, self._wiring.spare)]
        if self._bridges.active:
            waits.append(DOCKER_EACH_S)
        return min((one for one in waits if one is not None), default=None)

    def helpers(self) -> _Processes:
        """The processes the holder must supervise now: (name, argv, environment)."""
        if self._link.busy or any(made.served for made in self._attached.values()):
            return [self._link.process()]
        return []

    def helper_dismissed(self) -> None:
        """What `helpers` no longer lists is about to be ended: nothing more is said to it."""
        self._link.forget()

    def doctor(self) -> _Findings:
        """What stands in the way of networks on this host."""
        return doctor.examine(self._bridges.filter, self._bridges.firewall.name)

    def reconcile(self, live: Mapping[str, tuple[AttachRequest, int]]) -> None:
        """Take over what an earlier engine of this installation left: once, at the start.

        `live` are the running workloads; whatever belongs to nobody of them is removed.
        """
        for workload_id, (request, pid) in live.items():
            made = self._records.read(workload_id)
            if made is None:
                # It ran before this boundary's records, or they were deleted: it keeps running,
                # and its addresses are unknown to us.
                made = Attached(request, "unknown")
            known = {network.id for network in self._catalog.all()}
            made.endpoints = [one for one in made.endpoints if one.network in known]
            self._attached[workload_id] = made
            self._pids[workload_id] = pid
        used = {
            endpoint.network: self._catalog.by_id(endpoint.network)
            for made in self._attached.values()
            for endpoint in made.endpoints
        }
        self._bridges.remove_leftovers([one.link for one in used.values()])
        redirects = [one for made in self._attached.values() for one in shapes.redirects(made)]
        if used:
            self._bridges.adopt(used.values(), redirects)
        for workload_id, made in self._attached.items():
            for endpoint in made.endpoints:
                self._bridges.active[endpoint.network].enter(workload_id, endpoint)
        for workload_id in self._records.known() - set(live):
            self._link.drop(workload_id)
        self._records.sweep(set(live))
        for workload_id, made in self._attached.items():
            if made.served:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    self._records.write_pid(workload_id, self._pids[workload_id])

    def close(self) -> None:
        """The engine ends: the lobby empties; what live workloads use stays, nothing else does."""
        self._lent.close()
        self._lobby.close(self._wiring.spare)
        for held in self._namespaces.values():
            held.close()
        self._namespaces.clear()
        for active in list(self._bridges.active.values()):
            if not active.endpoints:
                self._bridges.down(active)
        if self.helpers():
            self._link.close()
        else:
            self._link.forget()
        self._bridges.close()
