"""Signal names as people write them."""

import re
import signal

from bulkhead.errors import Invalid

_RELATIVE = re.compile(r"(RTMIN|RTMAX)(?:([+-])(\d+))?")


def number(text: str) -> int:
    """The number of "TERM", "SIGTERM", "15", "RTMIN+3"; Invalid if there is none."""
    name = text.strip().upper()
    if name.isdecimal():
        value = int(name)
        if 1 <= value <= 64:
            return value
        raise Invalid(f"Invalid signal: {text}")
    name = name.removeprefix("SIG")
    relative = _RELATIVE.fullmatch(name)
    if relative is not None:
        base, sign, offset = relative.groups()
        value = (signal.SIGRTMIN if base == "RTMIN" else signal.SIGRTMAX) + int(
            f"{sign or '+'}{offset or 0}"
        )
        if signal.SIGRTMIN <= value <= signal.SIGRTMAX:
            return int(value)
    known = signal.Signals.__members__.get(f"SIG{name}")
    if known is None:
        raise Invalid(f"Invalid signal: {text}")
    return int(known)


def name(value: int) -> str:
    """ "SIGTERM" for 15, "SIGRTMIN+3" for 37, the number where there is no name."""
    try:
        return signal.Signals(value).name
    except ValueError:
        if signal.SIGRTMIN < value < signal.SIGRTMAX:
            return f"SIGRTMIN+{value - signal.SIGRTMIN}"
        return str(value)
