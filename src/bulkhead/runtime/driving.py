"""Coroutines of the seam without a loop: a runtime does one thing and waits for nobody else.

`asyncio` costs more to import than the rest of a command; only what really suspends (threads, for
user namespaces) gets a loop.
"""

from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Suspended(RuntimeError):
    """The coroutine waits for a loop; it has been closed."""


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends; Suspended if it does."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close()
    raise Suspended("a coroutine waits, and there is no loop")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that may suspend, on a loop of its own."""
    import asyncio

    return asyncio.run(coroutine)
