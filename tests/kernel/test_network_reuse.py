"""Namespaces that are used again: only those of confined workloads in which nothing was sent."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from bulkhead.network import reuse
from tests.helpers.network_lab import HOST4, OUTSIDE4, EndpointRequest, Lab, Workload, in_lab


def _namespace(workload: Workload) -> int:
    def inode() -> int:
        return os.stat("/proc/thread-self/ns/net").st_ino

    return workload.inside(inode)


@contextlib.contextmanager
def _lab(folder: Path) -> Iterator[tuple[Lab, reuse.Lent]]:
    """A lab in which one namespace waits at a time, so that the next workload must get it."""
    with Lab(folder) as lab:
        lab.manager._lobby._want_wired = 1
        first = lab.run("first")
        lab.settle()
        try:
            yield lab, lab.manager._lent
        finally:
            lab.stop(first)


def _waiting(lab: Lab) -> int:
    return len(lab.manager._lobby._wired)


@in_lab
def test_an_untouched_namespace_is_used_again(tmp_path: Path) -> None:
    with _lab(tmp_path) as (lab, _):
        one = lab.run("one", confined=True)
        inode, address = _namespace(one), one.address()
        endpoint = one.settings["Networks"]["bridge"]["EndpointID"]
        assert _waiting(lab) == 0
        lab.stop(one)
        assert _waiting(lab) == 1
        two = lab.run("two", confined=True)
        assert (_namespace(two), two.address()) == (inode, address)
        assert two.settings["Networks"]["bridge"]["EndpointID"] != endpoint
        lab.serve_outside(7000)
        assert two.ask(OUTSIDE4, 7000) == f"outside {HOST4}"
        lab.stop(two)
        assert _waiting(lab) == 0  # it has been used


def _speak() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", 9))


@in_lab
def test_one_in_which_something_was_sent_is_not(tmp_path: Path) -> None:
    with _lab(tmp_path) as (lab, _):
        one = lab.run("one", confined=True)
        one.inside(_speak)
        lab.stop(one)
        assert _waiting(lab) == 0


@in_lab
def test_one_that_others_reached_is_not(tmp_path: Path) -> None:
    with _lab(tmp_path) as (lab, lent):
        open_ = lab.run("open")
        assert not lent._kept
        lab.stop(open_)
        lab.settle()
        shown = lab.run("shown", confined=True)
        assert list(lent._kept) == [shown.id]
        lab.manager.keep_apart(shown.id)
        lab.stop(shown)
        assert _waiting(lab) == 0
        lab.settle()
        joined = lab.run("joined", confined=True)
        guest = lab.run("guest", f"container:{joined.id}")
        lab.stop(guest)
        lab.stop(joined)
        assert _waiting(lab) == 0
        lab.settle()
        moved = lab.run("moved", confined=True)
        lab.network("other")
        lab.manager.connect(moved.id, "other", EndpointRequest())
        lab.manager.disconnect(moved.id, "other")
        lab.stop(moved)
        assert _waiting(lab) == 0
