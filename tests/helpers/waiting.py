"""Waiting for a condition, with a deadline that only a hang reaches."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

DEADLINE_S = 60.0


def until(condition: Callable[[], T], what: str, timeout_s: float = DEADLINE_S) -> T:
    """Poll until `condition()` is true and return its value; AssertionError names `what`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what} (last: {value!r})")
        time.sleep(0.01)
