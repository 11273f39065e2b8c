"""Network namespaces made before they are needed.

Two kinds wait here: *bare* ones (loopback up, a netlink socket inside), seen by nobody, and, while
the default bridge is up, *wired* ones that hang on it with an address and a route already, so that
taking one costs no system call. Only this process's descriptors keep them alive: when it dies they
vanish, and their cables with them.

Filling happens in a thread of its own, as unshare(2) moves the thread that calls it.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bulkhead.linux import netns
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.netlink import Netlink
from bulkhead.network.ipam import Interface


@dataclass(slots=True)
class Bare:
    """An empty namespace with loopback up."""

    netns: OwnedFd
    netlink: Netlink

    def close(self) -> None:
        """Let go of it."""
        self.netlink.close()
        self.netns.close()


@dataclass(frozen=True, slots=True)
class Cable:
    """How one interface of a workload is to be: both ends' names, addresses, bridge."""

    endpoint: str
    host_name: str
    name: str
    mac: str
    addresses: tuple[Interface, ...]
    gateways: tuple[str, ...]
    mtu: int
    bridge: int
    isolated: bool = False


@dataclass(slots=True)
class Wired:
    """A namespace whose first interface hangs on the default bridge."""

    bare: Bare
    cable: Cable


def make_bare() -> Bare:
    """A new namespace, from any thread; the calling thread stays where it is."""
    return netns.in_thread(_make_here)


def _make_here() -> Bare:
    """A new namespace; the calling thread is in it afterwards."""
    netns.unshare()
    made = Bare(netns.current(), rt.connect())
    try:
        made.netlink.transact([rt.set_link(1, up=True)])
    except BaseException:
        made.close()
        raise
    return made


def plug(host: Netlink, bare: Bare, cable: Cable) -> None:
    """Make the cable between the bridge and the namespace, and its inner end ready for use.

    On failure nothing of it stays.
    """
    six = any(one.version == 6 for one in cable.addresses)
    messages = rt.add_veth(
        cable.host_name,
        master=cable.bridge,
        mtu=cable.mtu,
        peer_name=cable.name,
        peer_netns_fd=bare.netns.fileno(),
        peer_mac=rt.mac_bytes(cable.mac),
        isolated=cable.isolated,
    )
    host.transact(messages)
    try:
        inner = rt.link(bare.netlink, cable.name).index
        batch = [] if six else [rt.no_link_local(inner)]
        batch.append(rt.set_link(inner, up=True))
        batch += [rt.add_address(inner, one) for one in cable.addresses]
        batch += [rt.add_route(gateway=one, index=inner) for one in cable.gateways]
        bare.netlink.transact(batch)
    except BaseException:
        host.transact([rt.delete_link(name=cable.host_name)])
        raise


class Lobby:
    """The waiting namespaces. Methods are for one thread; filling runs beside it."""

    def __init__(self, bare: int = 4, wired: int = 4) -> None:
        self._want_bare = bare
        self._want_wired = wired
        self._bare: deque[Bare] = deque()
        self._wired: deque[Wired] = deque()
        self._plans: list[Cable] = []
        self._filler: threading.Thread | None = None
        self._failure: BaseException | None = None

    def take_bare(self) -> Bare:
        """A waiting namespace, or else a new one."""
        if self._bare:
            return self._bare.popleft()
        return make_bare()

    def take_wired(self) -> Wired | None:
        """A waiting wired namespace, if there is one."""
        return self._wired.popleft() if self._wired else None

    @property
    def filling(self) -> bool:
        """Whether the filling thread runs."""
        return self._filler is not None and self._filler.is_alive()

    def fill(self, cable: Callable[[], Cable] | None, spare: Callable[[Cable], None]) -> None:
        """Start filling up, unless that is under way; `cable` (None: no wired ones) plans one more.

        Both functions are called on this thread only: plans that came to nothing go to `spare`.
        """
        if self.filling:
            return
        self.settle(spare)
        bare = self._want_bare - len(self._bare)
        plans = []
        if cable is not None:
            plans = [cable() for _ in range(self._want_wired - len(self._wired))]
        if bare <= 0 and not plans:
            return
        self._plans = plans
        self._filler = threading.Thread(target=self._run, args=(bare, plans), name="network-lobby")
        self._filler.start()

    def _run(self, bare: int, plans: list[Cable]) -> None:
        try:
            with rt.connect() as host:
                while plans:
                    made = _make_here()
                    try:
                        plug(host, made, plans[0])
                    except BaseException:
                        made.close()
                        raise
                    made.netlink.close()
                    self._wired.append(Wired(made, plans.pop(0)))
                for _ in range(bare):
                    self._bare.append(_make_here())
        except Exception as error:
            # Told at the next take or settle: who then needs a namespace makes it himself, and
            # meets the same error with a name to it.
            self._failure = error

    def settle(self, spare: Callable[[Cable], None]) -> BaseException | None:
        """Wait for the filler; the error it met, if any. Plans it did not come to go to `spare`."""
        if self._filler is None:
            return None
        self._filler.join()
        self._filler = None
        while self._plans:
            spare(self._plans.pop())
        failure, self._failure = self._failure, None
        return failure

    def unwire(self, spare: Callable[[Cable], None]) -> None:
        """Let the wired ones go, with their cables."""
        self.settle(spare)
        while self._wired:
            one = self._wired.popleft()
            spare(one.cable)
            one.bare.close()

    def close(self, spare: Callable[[Cable], None]) -> None:
        """Let everything go."""
        self.unwire(spare)
        while self._bare:
            self._bare.popleft().close()
