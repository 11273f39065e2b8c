"""What happened: Docker's events, kept in a ring in memory and sent to those who listen."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Mapping
from typing import Any

from bulkhead.errors import Invalid

KEPT = 1024
"""Events that `since` can still see; they do not survive the engine."""
BACKLOG = 4096
"""Events a slow listener may be behind before it is cut off."""
_FILTERS = frozenset({
    "container", "daemon", "event", "image", "label", "network", "scope", "type", "volume",
    "config", "node", "plugin", "secret", "service",
})  # fmt: skip
_EXEC_EVENTS = ("exec_create", "exec_start", "health_status")

Filters = Mapping[str, Collection[str]]
Event = dict[str, Any]
_Kept = tuple[str, str, str, dict[str, str], int]
"""(type, action, id, attributes, nanoseconds): an event in a quarter of the memory."""


def _event(kept: _Kept) -> Event:
    """As Docker tells it."""
    kind, action, identity, known, moment = kept
    event: Event = {
        "Type": kind,
        "Action": action,
        "Actor": {"ID": identity, "Attributes": known},
        "scope": "local",
        "time": moment // 10**9,
        "timeNano": moment,
    }
    if kind == "container":
        event |= {"status": action, "id": identity, "from": known.get("image")}
    elif kind == "image":
        event |= {"status": action, "id": identity}
    return event


def matches(event: Event, filters: Filters) -> bool:
    """Whether `event` passes: any value of a key, every key."""
    return all(_passes(event, key, values) for key, values in filters.items() if values)


def _passes(event: Event, key: str, values: Collection[str]) -> bool:
    kind, action = event["Type"], event["Action"]
    actor: dict[str, str] = event["Actor"]["Attributes"]
    identity: str = event["Actor"]["ID"]
    if key == "type":
        return kind in values
    if key == "scope":
        return event["scope"] in values
    if key == "event":
        # "exec_start" stands for "exec_start: sh -c …" too.
        return any(action == v or action.partition(":")[0] == v for v in values)
    if key == "label":
        return all(
            (value.partition("=")[0] in actor)
            and ("=" not in value or actor[value.partition("=")[0]] == value.partition("=")[2])
            for value in values
        )
    if key == "image":
        if kind == "image":
            return any(v in {identity, actor.get("name")} for v in values)
        return any(_same_image(actor.get("image", ""), v) for v in values)
    if kind != key and not (kind == "network" and key == "container"):
        return False
    if kind == "network" and key == "container":
        identity, name = actor.get("container", ""), ""
    else:
        name = actor.get("name", "")
    return any(identity == v or name == v or (v and identity.startswith(v)) for v in values)


def _same_image(image: str, wanted: str) -> bool:
    return image == wanted or (":" not in wanted and image.rpartition(":")[0] == wanted)


class Events:
    """The ring and its listeners; for the loop only."""

    def __init__(self) -> None:
        self._kept: deque[_Kept] = deque(maxlen=KEPT)
        self._listeners: set[asyncio.Queue[Event | None]] = set()
        self._last_ns = 0

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return len(self._listeners)

    def emit(
        self, kind: str, action: str, identity: str, attributes: Mapping[str, str] | None = None
    ) -> None:
        """Say that it happened, now."""
        moment = max(time.time_ns(), self._last_ns + 1)
        self._last_ns = moment
        kept = kind, action, identity, dict(attributes or {}), moment
        self._kept.append(kept)
        if not self._listeners:
            return
        event = _event(kept)
        for queue in list(self._listeners):
            if queue.qsize() >= BACKLOG:
                self._listeners.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    async def stream(
        self, since_ns: int | None, until_ns: int | None, filters: Filters
    ) -> AsyncGenerator[Event, None]:
        """Kept events since `since_ns` (if given), then new ones up to `until_ns` (or for ever)."""
        for key in filters:
            if key not in _FILTERS:
                raise Invalid(f"invalid filter '{key}'")
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        old = list(self._kept) if since_ns is not None else []
        self._listeners.add(queue)
        try:
            for kept in old:
                if kept[-1] < (since_ns or 0):
                    continue
                if until_ns is not None and kept[-1] > until_ns:
                    return
                event = _event(kept)
                if matches(event, filters):
                    yield event
            async with contextlib.aclosing(_until(queue, until_ns)) as new:
                async for event in new:
                    if matches(event, filters):
                        yield event
        finally:
            self._listeners.discard(queue)


async def _until(
    queue: "asyncio.Queue[Event | None]", until_ns: int | None
) -> AsyncGenerator[Event, None]:
    while True:
        timeout = None
        if until_ns is not None:
            timeout = (until_ns - time.time_ns()) / 1e9
            if timeout <= 0:
                return
        try:
            event = await asyncio.wait_for(queue.get(), timeout)
        except TimeoutError:
            return
        if event is None or (until_ns is not None and event["timeNano"] > until_ns):
            return
        yield event
