"""Progress messages in the shape of Docker's JSON stream."""

import threading
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Progress = Callable[[Message], None]

_STEP_BYTES = 512 << 10
"""A transfer reports at most once per so many bytes: a message costs more than the copy."""


def silent(message: Message) -> None:
    """Progress for callers that want none."""


def serial(progress: Progress) -> Progress:
    """`progress` made safe to call from several threads."""
    lock = threading.Lock()

    def report(message: Message) -> None:
        with lock:
            progress(message)

    return report


def status(text: str, identity: str = "", **more: Any) -> Message:
    """One line about `identity` (a short layer id or a tag)."""
    message: Message = {"status": text}
    if identity:
        message["id"] = identity
    message.update(more)
    return message


def stream(text: str) -> Message:
    """One line of plain output."""
    return {"stream": text + "\n"}


def short(digest: str) -> str:
    """The twelve digits that docker shows of a digest."""
    return digest.rpartition(":")[2][:12]


def bar(current: int, total: int) -> str:
    """Docker's drawn progress, for clients that print it as it comes."""
    done = min(50, current * 50 // total) if total > 0 else 0
    arrow = "=" * done + (">" if done < 50 else "")
    return f"[{arrow:<50}] {human(current):>8}/{human(total)}"


def human(size: float) -> str:
    """Decimal units with four digits, as docker prints sizes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g}{unit}"
        size /= 1000
    return f"{size:.4g}TB"


class Meter:
    """Counts the bytes of one transfer and reports now and then."""

    def __init__(self, progress: Progress, text: str, identity: str, total: int) -> None:
        self._progress, self._text, self._identity = progress, text, identity
        self.total = total
        self.current = 0
        self._next = 0

    def add(self, count: int) -> None:
        """`count` more bytes went through."""
        self.current += count
        if self.current >= self._next:
            self._next = self.current + max(_STEP_BYTES, self.total // 100)
            self.show()

    def reach(self, current: int) -> None:
        """`current` bytes went through so far."""
        self.add(current - self.current)

    def show(self) -> None:
        """Report now."""
        detail = {"current": self.current, "total": self.total}
        drawn = bar(self.current, self.total)
        self._progress(status(self._text, self._identity, progressDetail=detail, progress=drawn))
