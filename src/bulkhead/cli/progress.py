"""Progress messages of pull, push, load and bootstrap: bars on a terminal, plain lines in a pipe.

Messages are docker's JSON ones: {"status", "id", "progressDetail": {"current", "total"}, "stream",
"error"}. On a terminal each id keeps its line; in a pipe a line is printed when a status changes,
without numbers.
"""

import time
from typing import Any, TextIO

from bulkhead.cli.terminal import width
from bulkhead.cli.units import human_size

_REDRAW_S = 0.05


class Progress:
    """Shows messages on `stream`; `update` each, then `close`."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._bars = not quiet and stream.isatty()
        self._lines: list[str] = []
        self._places: dict[str, int] = {}
        self._said: dict[str, str] = {}
        self._drawn = 0.0
        self._dirty = False
        self._height = 0
        self.said: set[str] = set()
        """The texts without an id that were shown."""

    def update(self, message: dict[str, Any]) -> None:
        """Show one message."""
        if self._quiet:
            return
        identity = str(message.get("id") or "")
        detail = message.get("progressDetail") or {}
        text = str(message.get("status") or message.get("stream") or "").rstrip("\n")
        if not text:
            return
        if not identity:
            self.said.add(text)
        if not self._bars:
            self._plain(identity, text)
        elif identity:
            self._place(identity, f"{identity}: {text}{bar(detail)}", bool(detail.get("current")))
        else:
            self._lines.append(text)
            self._draw(force=True)

    def _plain(self, identity: str, text: str) -> None:
        if identity and self._said.get(identity) == text:
            return
        self._said[identity] = text
        self._stream.write(f"{identity}: {text}\n" if identity else f"{text}\n")
        self._stream.flush()

    def _place(self, identity: str, line: str, moving: bool) -> None:
        at = self._places.get(identity)
        if at is None:
            self._places[identity] = len(self._lines)
            self._lines.append(line)
        else:
            self._lines[at] = line
        self._draw(force=not moving)

    def _draw(self, *, force: bool) -> None:
        now = time.monotonic()
        self._dirty = True
        if not force and now - self._drawn < _REDRAW_S:
            return
        self._drawn, self._dirty = now, False
        columns = width(self._stream.fileno())
        up = f"\x1b[{self._height}A\r" if self._height else ""
        body = "".join(f"\x1b[2K{line[: columns - 1]}\n" for line in self._lines)
        self._height = len(self._lines)
        self._stream.write(up + body)
        self._stream.flush()

    def close(self) -> None:
        """Draw what is still to be drawn."""
        if self._bars and self._dirty:
            self._draw(force=True)


def bar(detail: dict[str, Any]) -> str:
    """` [====>    ]  1.5MB/3MB` of {"current", "total"}; "" without numbers."""
    current, total = detail.get("current") or 0, detail.get("total") or 0
    if not current and not total:
        return ""
    if total <= 0:
        return f"  {human_size(current)}"
    done = min(int(50 * current / total), 50)
    arrow = "=" * done + (">" if done < 50 else "")
    return f" [{arrow:<50}]  {human_size(current)}/{human_size(total)}"
