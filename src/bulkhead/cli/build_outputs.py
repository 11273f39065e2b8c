"""`build --output`: where the result goes on the client's side, and what unpacks it there."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bulkhead.cli import copying
from bulkhead.cli.command import Context
from bulkhead.cli.options import UsageError
from bulkhead.errors import Invalid

_KINDS = ("local", "tar", "oci", "docker", "image", "registry")


@dataclass(slots=True)
class Outputs:
    """Descriptors for the engine, and what becomes of them here."""

    fds: list[int] = field(default_factory=list)
    unpacking: list["_Unpacking"] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)
    """(where it is written, where it belongs)."""
    spoken: bool = False
    """Whether standard output has one of them."""

    def finish(self) -> None:
        """After success: wait for what is unpacked, and give files their names."""
        self._shut()
        for one in self.unpacking:
            one.join()
        while self.files:
            fresh, path = self.files.pop()
            os.rename(fresh, path)

    def close(self) -> None:
        """After failure, too: nothing half-written stays."""
        self._shut()
        for fresh, _ in self.files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh)
        for one in self.unpacking:
            one.thread.join()

    def _shut(self) -> None:
        """Close our ends: the engine has its own."""
        while self.fds:
            os.close(self.fds.pop())


class _Unpacking:
    """A thread that unpacks what comes through a pipe."""

    def __init__(self, read: int, folder: str) -> None:
        self._read = read
        self._folder = folder
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with open(self._read, "rb") as stream:
            try:
                if stream.peek(1):  # a build that failed says nothing
                    place = copying.Place(self._folder, None, self._folder, whole=True)
                    copying.extract(stream, place, keep_owner=False)
            except Exception as error:
                self._error = error
            while stream.read(1 << 20):  # so that the engine can end
                pass

    def join(self) -> None:
        """Wait; what went wrong is raised here."""
        self.thread.join()
        if self._error is not None:
            raise Invalid(f"cannot write to {self._folder}: {self._error}") from self._error


def fields(text: str) -> dict[str, str]:
    """`type=KIND,dest=PATH`, or a folder's path, or `-`. UsageError."""
    if "=" not in text:
        return {"type": "tar" if text == "-" else "local", "dest": text}
    found = {k: v for k, _, v in (part.partition("=") for part in text.split(","))}
    kind = found.get("type", "")
    if kind not in _KINDS:
        raise UsageError(f"--output {text}: type is one of {', '.join(_KINDS)}")
    if unknown := set(found) - {"type", "dest", "name", "push"}:
        raise UsageError(f"--output {text}: unknown member {sorted(unknown)[0]}; dest, name, push")
    if kind == "local" and not found.get("dest"):
        raise UsageError(f"--output {text}: it needs a folder: dest=FOLDER")
    return found


@contextlib.contextmanager
def opened(given: Sequence[str], context: Context, options: dict[str, Any]) -> Iterator[Outputs]:
    """The places of `given`; `options` are completed."""
    found = Outputs()
    kinds: list[str] = []
    keep = not given
    options["push"] = False
    try:
        for text in given:
            one = fields(text)
            kind = one["type"]
            if one.get("name"):
                options["tags"] = [*options["tags"], one["name"]]
            if kind in ("image", "registry") or (kind == "docker" and not one.get("dest")):
                keep = True
                pushed = one.get("push", "").lower() in ("true", "1")
                options["push"] = options["push"] or kind == "registry" or pushed
                continue
            kinds.append("tar" if kind == "local" else kind)
            _open(found, kind, one.get("dest") or "-")
        options["outputs"], options["store"] = kinds, keep
        yield found
    finally:
        found.close()


def _open(found: Outputs, kind: str, path: str) -> None:
    if kind == "local":
        os.makedirs(path, exist_ok=True)
        read, write = os.pipe2(os.O_CLOEXEC)
        found.fds.append(write)
        found.unpacking.append(_Unpacking(read, path))
    elif path == "-":
        if sys.stdout.isatty():
            raise UsageError(f"--output type={kind}: a terminal is no place for an archive: dest=")
        sys.stdout.flush()
        found.fds.append(os.dup(1))
        found.spoken = True
    else:
        folder, _, name = os.path.abspath(path).rpartition("/")
        fresh = f"{folder}/.{name}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        found.fds.append(os.open(fresh, flags, 0o644))
        found.files.append((fresh, os.path.abspath(path)))
