"""Network namespaces in a process with threads: made and entered by threads of their own.

unshare(2), setns(2), network_namespaces(7). A thread's namespace is its own affair, so that a
short-lived thread never disturbs the rest of the process.
"""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from bulkhead.linux import syscall
from bulkhead.linux.fds import OwnedFd

CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def current() -> OwnedFd:
    """A descriptor of the calling thread's network namespace."""
    return OwnedFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))


def unshare() -> None:
    """Move the calling thread (only) into a new, empty network namespace."""
    syscall.call("unshare", CLONE_NEWNET)


def enter(fd: int) -> None:
    """Move the calling thread (only) into the network namespace `fd`."""
    syscall.call("setns", fd, CLONE_NEWNET)


def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a new thread and give its result or exception; waits for it."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def inside(fd: int, work: Callable[[], T]) -> T:
    """Run `work` in a thread that has entered the network namespace `fd`."""

    def run() -> T:
        enter(fd)
        return work()

    return in_thread(run)


def create() -> OwnedFd:
    """A new network namespace, alive as long as the descriptor (or anything in it)."""

    def run() -> OwnedFd:
        unshare()
        return current()

    return in_thread(run)
