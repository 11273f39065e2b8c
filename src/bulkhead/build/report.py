"""Progress of a build, as events: maps that cross the wire.

{"event": "start", "id": N, "name": "[stage 2/4] RUN make", "stage", "text", "line"}
{"event": "output", "id": N, "stream": 1|2, "data": BYTES}
{"event": "status", "id": N, "message": one of docker's progress messages}
{"event": "done", "id": N, "cached": BOOL, "seconds": F, "layer": diff_id or ""}
{"event": "failed", "id": N, "error": TEXT}
{"event": "plan", "total": how many steps there will be}
{"event": "stage", "stage": INDEX}    it is finished
{"event": "warning", "text": TEXT}
{"event": "image", "id": ID, "names": [NAME…], "digest": DIGEST}
"""

import threading
import time
from collections.abc import Callable
from typing import Any

Sink = Callable[[dict[str, Any]], None]


class Reporter:
    """Sends events to a sink; safe for threads."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._count = 0

    def send(self, **event: Any) -> None:
        """One event."""
        with self._lock:
            self._sink(event)

    def step(self, name: str, **more: Any) -> "Step":
        """Something begins."""
        with self._lock:
            self._count += 1
            step = Step(self, self._count)
            self._sink({"event": "start", "id": step.id, "name": name, **more})
        return step

    def warn(self, text: str) -> None:
        """Something the user should know."""
        self.send(event="warning", text=text)


class Step:
    """One thing that is being done."""

    def __init__(self, reporter: Reporter, identity: int) -> None:
        self._reporter = reporter
        self.id = identity
        self.cached = False
        self.layer = ""
        self._began = time.monotonic()

    def output(self, stream: int, data: bytes) -> None:
        """What its process wrote."""
        self._reporter.send(event="output", id=self.id, stream=stream, data=data)

    def status(self, message: dict[str, Any]) -> None:
        """Progress of a transfer."""
        self._reporter.send(event="status", id=self.id, message=message)

    def done(self) -> None:
        """It is finished."""
        seconds = time.monotonic() - self._began
        self._reporter.send(
            event="done", id=self.id, cached=self.cached, seconds=seconds, layer=self.layer
        )

    def failed(self, error: str) -> None:
        """It came to nothing."""
        self._reporter.send(event="failed", id=self.id, error=error)
