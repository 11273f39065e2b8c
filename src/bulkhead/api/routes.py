"""Paths to handlers.

    @ROUTES.add("GET", "/containers/{id}/json")
    async def inspect(x: Exchange) -> object: …

A variable part matches within one segment, `{name*}` across several (images have slashes in their
names). A handler returns a value (200 and JSON), a `Reply`, or `SENT` when it has answered itself.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from bulkhead.api.exchange import Exchange

SENT: Final = object()
Handler = Callable[[Exchange], Awaitable[Any]]
_PART = re.compile(r"\{(\w+)(\*?)\}")


class Route(NamedTuple):
    """One path of one method."""

    method: str
    path: str
    pattern: re.Pattern[str]
    handler: Handler


def _pattern(path: str) -> re.Pattern[str]:
    found, at = "", 0
    for match in _PART.finditer(path):
        found += re.escape(path[at : match.start()])
        found += f"(?P<{match[1]}>{'.*' if match[2] else '[^/]+'})"
        at = match.end()
    return re.compile(found + re.escape(path[at:]), re.DOTALL)


class Routes:
    """All of them, found by method and first segment."""

    def __init__(self) -> None:
        self.all: list[Route] = []
        self._by_start: dict[tuple[str, str], list[Route]] = {}

    def add(self, method: str, path: str) -> Callable[[Handler], Handler]:
        """Register the decorated coroutine function; earlier ones win."""

        def register(handler: Handler) -> Handler:
            route = Route(method, path, _pattern(path), handler)
            self.all.append(route)
            self._by_start.setdefault((method, path.split("/")[1]), []).append(route)
            return handler

        return register

    def find(self, method: str, path: str) -> tuple[Handler, dict[str, str]] | None:
        """The handler for a path without its version, and the path's variable parts."""
        start = path[1:].partition("/")[0]
        for route in self._by_start.get((method, start), ()):
            match = route.pattern.fullmatch(path)
            if match is not None:
                return route.handler, match.groupdict()
        return None


ROUTES = Routes()
