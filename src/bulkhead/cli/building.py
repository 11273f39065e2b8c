"""Progress of a build: plain lines, or a list that is redrawn on a terminal."""

import time
from typing import Any, TextIO

from bulkhead.cli.progress import bar
from bulkhead.cli.terminal import size

_REDRAW_S = 0.08
_TAIL = 6
_ABOVE = 4


class Plain:
    """`#3 [build 2/4] RUN make`, then its output with the same number in front."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began: dict[int, float] = {}
        self._rest: dict[tuple[int, int], str] = {}
        self._said: dict[tuple[int, str], str] = {}
        self._last = 0

    def _line(self, identity: int, text: str) -> None:
        if self._last and self._last != identity:
            self._stream.write("\n")
        self._last = identity
        self._stream.write(f"#{identity} {text}\n")

    def event(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind, identity = event["event"], event.get("id", 0)
        if kind == "start":
            self._began[identity] = time.monotonic()
            self._line(identity, event["name"])
        elif kind == "output":
            self._output(identity, event["stream"], event["data"])
        elif kind == "status":
            self._status(identity, event["message"])
        elif kind in ("done", "failed"):
            self._flush(identity)
            if kind == "failed":
                self._line(identity, f"ERROR: {event['error'].splitlines()[0]}")
            elif event["cached"]:
                self._line(identity, "CACHED")
            else:
                self._line(identity, f"DONE {event['seconds']:.1f}s")
        elif kind == "warning":
            self._stream.write(f"WARNING: {event['text']}\n")
        self._stream.flush()

    def _output(self, identity: int, stream: int, data: bytes) -> None:
        text = self._rest.pop((identity, stream), "") + data.decode("utf-8", "replace")
        lines = text.split("\n")
        if lines[-1]:
            self._rest[identity, stream] = lines[-1]
        since = time.monotonic() - self._began.get(identity, time.monotonic())
        for line in lines[:-1]:
            self._line(identity, f"{since:.3f} {line.rstrip()}")

    def _flush(self, identity: int) -> None:
        for stream in (1, 2):
            if (identity, stream) in self._rest:
                self._output(identity, stream, b"\n")

    def _status(self, identity: int, message: dict[str, Any]) -> None:
        text, what = str(message.get("status") or ""), str(message.get("id") or "")
        if text and self._said.get((identity, what)) != text:
            self._said[identity, what] = text
            self._line(identity, f"{what}: {text}" if what else text)

    def close(self) -> None:
        """The end."""
        self._stream.flush()


class _Step:
    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.monotonic()
        self.mark = ""
        self.seconds = 0.0
        self.tail: list[str] = []
        self.rest = ""
        self.status: dict[str, str] = {}


class Terminal:
    """Every step a line; below those that run, the end of their output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._steps: dict[int, _Step] = {}
        self._height = 0
        self._drawn = 0.0
        self._fixed = 0
        self._warnings: list[str] = []

    def event(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind, identity = event["event"], event.get("id", 0)
        step = self._steps.get(identity)
        if kind == "start":
            self._steps[identity] = _Step(event["name"])
        elif kind == "warning":
            self._warnings.append(event["text"])
        elif step is None:
            return
        elif kind == "output":
            lines = (step.rest + event["data"].decode("utf-8", "replace")).split("\n")
            step.rest = lines.pop()
            step.tail = [*step.tail, *lines][-_TAIL:]
        elif kind == "status":
            message = event["message"]
            text = f"{message.get('status') or ''}{bar(message.get('progressDetail') or {})}"
            step.status[str(message.get("id") or "")] = text
        elif kind == "done":
            step.mark = "CACHED" if event["cached"] else "done"
            step.seconds = event["seconds"]
        elif kind == "failed":
            step.mark = "ERROR"
            step.seconds = time.monotonic() - step.began
        self._draw(force=kind in ("done", "failed"))

    def _lines(self, step: _Step, columns: int) -> list[str]:
        seconds = step.seconds if step.mark else time.monotonic() - step.began
        mark = {"CACHED": "CACHED ", "ERROR": "ERROR "}.get(step.mark, "")
        timing = f" {seconds:.1f}s"
        name = f" => {mark}{step.name}".replace("\n", " ")
        room = columns - len(timing) - 1
        lines = [f"{name[:room]:<{room}}{timing}"]
        if step.mark in ("", "ERROR"):
            lines += [f" => => {k + ': ' if k else ''}{v}"[:columns - 1]
                      for k, v in list(step.status.items())[-_TAIL:] if not step.mark]  # fmt: skip
            tail = step.tail if step.mark else [*step.tail, step.rest][-_TAIL:]
            lines += [f" => => # {line.rstrip()}"[: columns - 1] for line in tail if line.strip()]
        return lines

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self._drawn < _REDRAW_S:
            return
        self._drawn = now
        rows, columns = size(self._stream.fileno())
        rows, columns = rows or 24, columns or 80
        steps = list(self._steps.values())
        settled = []
        while self._fixed < len(steps) and steps[self._fixed].mark in ("done", "CACHED"):
            settled += self._lines(steps[self._fixed], columns)
            self._fixed += 1
        live = [line for step in steps[self._fixed :] for line in self._lines(step, columns)]
        live = live[-max(1, rows - _ABOVE) :]
        up = f"\x1b[{self._height}A\r" if self._height else ""
        body = "".join(f"\x1b[2K{line}\n" for line in (*settled, *live))
        self._stream.write(f"{up}\x1b[J{body}")
        self._stream.flush()
        self._height = len(live)

    def close(self) -> None:
        """Draw the last state."""
        self._draw(force=True)
        for text in self._warnings:
            self._stream.write(f"WARNING: {text}\n")
        self._stream.flush()


class Quiet:
    """Nothing."""

    def event(self, event: dict[str, Any]) -> None:
        """Ignored."""

    def close(self) -> None:
        """Nothing."""


Shown = Plain | Terminal | Quiet
