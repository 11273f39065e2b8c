"""A guest without a virtual machine: a network namespace behind a `GuestNic`'s tap.

Its own end is a tap too; a thread carries the frames from one descriptor to the other, as a
virtual machine's monitor would.
"""

import contextlib
import functools
import os
import select
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_interface, ip_network
from typing import TypeVar

from bulkhead.linux import netns
from bulkhead.linux import rtnetlink as rt
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.tap import open_tap
from bulkhead.network.tap import GuestNic

T = TypeVar("T")


class FakeGuest:
    """The namespace; `inside` runs something there."""

    def __init__(self, namespace: OwnedFd, taps: dict[int, int]) -> None:
        self._netns = namespace
        self._taps = taps

    def inside(self, work: Callable[[], T]) -> T:
        return netns.inside(self._netns.fileno(), work)

    def pump(self, ending: int) -> None:
        """Carry frames both ways until `ending` is readable."""
        poll = select.poll()
        for fd in (*self._taps, ending):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == ending:
                    return
                with contextlib.suppress(BlockingIOError):
                    os.write(self._taps[fd], os.read(fd, 65536))


def _set_up(nic: GuestNic) -> OwnedFd:
    """The guest's own interface as `nic` says; in the guest's namespace."""
    tap = open_tap(nic.name)
    with rt.connect() as route:
        index = rt.link(route, nic.name).index
        route.transact(
            [
                rt.no_link_local(index),
                rt.set_link(index, mac=rt.mac_bytes(nic.mac), mtu=nic.mtu),
                rt.set_link(index, up=True),
                *(rt.add_address(index, ip_interface(one)) for one in nic.addresses),
            ]
        )
        for one in nic.routes:
            prefix = ip_network(one.destination)
            route.transact([rt.add_route(index=index, gateway=one.gateway, prefix=prefix)])
    return tap


@contextlib.contextmanager
def fake_guest(nics: list[GuestNic]) -> Iterator[FakeGuest]:
    """A guest with these interfaces, whose taps it closes."""
    with contextlib.ExitStack() as undo:
        for nic in nics:
            undo.callback(nic.tap_fd.close)
        namespace = undo.enter_context(netns.create())
        with netns.inside(namespace.fileno(), rt.connect) as route:
            route.transact([rt.set_link(1, up=True)])
        taps: dict[int, int] = {}
        for nic in nics:
            own = netns.inside(namespace.fileno(), functools.partial(_set_up, nic))
            undo.callback(own.close)
            taps[own.fileno()] = nic.tap_fd.fileno()
            taps[nic.tap_fd.fileno()] = own.fileno()
        guest = FakeGuest(namespace, taps)
        ended, end = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, ended)
        thread = threading.Thread(target=guest.pump, args=(ended,))
        thread.start()
        undo.callback(thread.join)
        undo.callback(os.close, end)
        yield guest
