"""Network namespaces made before they are needed.

Two kinds wait here: *bare* ones (loopback up, a netlink socket inside), seen by nobody, and, while
the default bridge is up, *wired* ones that hang on it with an address and a route already, so that
taking one costs no system call. Only this process's descriptors keep them alive: when it dies they
vanish, and their cables with them.

Filling happens in a thread of its own, as unshare(2) moves the thread that calls it. It begins with
the first order and ends with the lobby, or when it is waited for.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue

from bulkhead.linux import netns
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.netlink import Netlink
from bulkhead.network.ipam import Interface

QUIET_S = 0.03
"""How long after a taking the replacement waits: the workload that took starts meanwhile."""


@dataclass(slots=True)
class Bare:
    """An empty namespace with loopback up."""

    netns: OwnedFd
    netlink: Netlink
    cable: "Cable | None" = None
    """How it hangs on the default bridge, if it came so."""

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
    """0: to none yet; the outer end is down."""
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
        up=bool(cable.bridge),
        isolated=cable.isolated and bool(cable.bridge),
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

    def __init__(self, bare: int = 4, wired: int = 8) -> None:
        self._want_bare = bare
        self._want_wired = wired
        self._bare: deque[Bare] = deque()
        self._wired: deque[Wired] = deque()
        self._orders: SimpleQueue[Cable | _Stop | None] = SimpleQueue()
        """Cables of wired namespaces to make, None for a bare one."""
        self._ordered: list[Cable | None] = []
        """What the filler has not come to; it takes out what it has made."""
        self._filler: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._taken = 0.0

    def take_bare(self) -> Bare:
        """A waiting namespace, or else a new one."""
        self._taken = time.monotonic()
        if self._bare:
            return self._bare.popleft()
        return make_bare()

    def take_wired(self) -> Wired | None:
        """A waiting wired namespace, if there is one."""
        self._taken = time.monotonic()
        return self._wired.popleft() if self._wired else None

    def put_back(self, one: Wired) -> bool:
        """Let a wired namespace wait again, if there is room; it is as it was when it was taken."""
        waiting = len(self._wired) + sum(order is not None for order in self._ordered)
        if waiting >= self._want_wired:
            return False
        one.bare.cable = one.cable = replace(one.cable, endpoint=os.urandom(32).hex())
        self._wired.append(one)
        return True

    def _rest_s(self, *, wired: bool) -> float:
        """How long filling can wait: 0 when little is left, or nobody takes any more."""
        if len(self._bare) < 2 or (wired and len(self._wired) < self._want_wired // 2):
            return 0.0
        return max(0.0, self._taken + QUIET_S - time.monotonic())

    @property
    def filling(self) -> bool:
        """Whether something is being made."""
        return bool(self._ordered)

    def fill(
        self, cable: Callable[[], Cable] | None, spare: Callable[[Cable], None]
    ) -> float | None:
        """Order what lacks, or say in how many seconds it should be; `cable` plans one more.

        Without `cable` none are wired. Both functions are called on this thread only: plans that
        came to nothing go to `spare`.
        """
        if self._failure is not None:
            self.settle(spare)
        rest_s = self._rest_s(wired=cable is not None)
        if rest_s:
            return rest_s
        orders: list[Cable | None] = []
        ordered = list(self._ordered)
        if cable is not None:
            waiting = len(self._wired) + sum(one is not None for one in ordered)
            # A quarter of the places is for what is put back.
            orders += [cable() for _ in range(self._want_wired - self._want_wired // 4 - waiting)]
        orders += [None] * (self._want_bare - len(self._bare) - ordered.count(None))
        if not orders:
            return None
        self._ordered += orders
        for order in orders:
            self._orders.put(order)
        if self._filler is None:
            self._filler = threading.Thread(target=self._run, name="network-lobby")
            self._filler.start()
        return None

    def _run(self) -> None:
        home = netns.current()
        host: Netlink | None = None
        try:
            while not isinstance(order := self._orders.get(), _Stop):
                if self._failure is None:
                    try:
                        host = host or rt.connect()
                        self._make(order, host)
                    except Exception as error:
                        # Told at the next fill or settle: who needs a namespace meanwhile makes
                        # it himself, and meets the same error with a name to it.
                        self._failure = error
                    # Back, so that the thread keeps no namespace alive while it waits.
                    netns.enter(home.fileno())
        finally:
            home.close()
            if host is not None:
                host.close()

    def _make(self, order: Cable | None, host: Netlink) -> None:
        made = _make_here()
        if order is None:
            self._bare.append(made)
        else:
            try:
                plug(host, made, order)
            except BaseException:
                made.close()
                raise
            made.cable = order
            self._wired.append(Wired(made, order))
        self._ordered.remove(order)

    def settle(self, spare: Callable[[Cable], None]) -> BaseException | None:
        """Wait for the filler; the error it met, if any. Plans it did not come to go to `spare`."""
        if self._ordered:
            self._end()
        for order in self._ordered:
            if order is not None:
                spare(order)
        self._ordered.clear()
        failure, self._failure = self._failure, None
        return failure

    def _end(self) -> None:
        if self._filler is not None:
            self._orders.put(_Stop())
            self._filler.join()
            self._filler = None

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
        self._end()
        while self._bare:
            self._bare.popleft().close()


class _Stop:
    """The filler's last order."""
