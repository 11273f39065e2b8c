"""Times as images carry them: RFC 3339 in UTC."""

import time


def now() -> str:
    """The present time with nanoseconds, as Docker writes it."""
    return of_nanoseconds(time.time_ns())


def of_nanoseconds(since_epoch: int) -> str:
    """`since_epoch` nanoseconds after 1970."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since_epoch // 10**9))
    fraction = since_epoch % 10**9
    return f"{seconds}.{fraction:09d}Z" if fraction else f"{seconds}Z"
