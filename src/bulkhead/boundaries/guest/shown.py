"""The files of a guest that does not run: its disks are given to a kernel that runs nothing else.

The host's own kernel never mounts a file system that a guest has written: it could have been made
to harm whoever does. So the same boundary boots a guest for it, in a jail, without a network.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator

from bulkhead.boundaries.guest.instance import Guest, GuestBoundary
from bulkhead.boundaries.guest.interior import Interior
from bulkhead.boundary.seam import Bundle, Stdio
from bulkhead.errors import BulkheadError, Conflict
from bulkhead.linux.fds import OwnedFd

PREFIX = "look-"
"""Of the identities of such guests."""
_END_S = 20.0
_FORGET_S = 30.0


@contextlib.asynccontextmanager
async def shown(boundary: GuestBoundary, bundle: Bundle) -> AsyncIterator[Interior]:
    """Boot a guest with the root of `bundle` (layers and disk) and end it after the block.

    What was written is on the disk then. Nobody else may use the disk meanwhile (Conflict).
    """
    async with contextlib.AsyncExitStack() as undo:
        os.makedirs(bundle.directory, mode=0o711, exist_ok=True)
        guest = await boundary.create(bundle)
        undo.push_async_callback(_discard, boundary, guest)
        reading, writing = (undo.enter_context(OwnedFd(fd)) for fd in os.pipe2(os.O_CLOEXEC))
        null = undo.enter_context(OwnedFd(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)))
        await guest.show(Stdio(stdin=int(reading), stdout=int(null), stderr=int(null)))
        reading.close()
        try:
            yield guest.interior(shown=True)
        finally:
            writing.close()
            await _ended(guest, _END_S)


async def _ended(guest: Guest, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while guest.state().status == "running" and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


async def _discard(boundary: GuestBoundary, guest: Guest) -> None:
    with contextlib.suppress(BulkheadError):
        await guest.delete(force=True)
    deadline = time.monotonic() + _FORGET_S
    while True:
        try:
            await boundary.launcher.forget(guest.bundle.id)
            return
        except Conflict:  # its end has not been noticed yet
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.01)
        except BulkheadError:
            return  # it never ran
