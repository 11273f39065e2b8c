"""qemu-img(1), always in a jail, with every format named; sizes in bytes.

The jail's user can read only what everybody can, and owns what it is to write.
In the jail the image at hand is /disks/0 and what it lies on /disks/1, which is also what its
header says; no other file of the host is there to be opened.
"""

import json
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from bulkhead.errors import Invalid, Unavailable
from bulkhead.machines import foreign

PROGRAM = "/usr/bin/qemu-img"
_QUICK_S = 120.0
_LONG_S = 3600.0
_FIRST, _SECOND, _THIRD = "/disks/0", "/disks/1", "/disks/2"


class Outcome(Protocol):
    """How a jailed program ended."""

    @property
    def code(self) -> int:
        """Its exit code."""
        ...

    @property
    def output(self) -> str:
        """What it wrote."""
        ...


Run = Callable[[Sequence[str], Sequence[tuple[str, bool]], float], Awaitable[Outcome]]
"""Runs a command line in a jail with files (path, writable) for so many seconds at most."""


class QemuImg:
    """What is done with disk images."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def _do(
        self, words: Sequence[str], files: Sequence[tuple[str, bool]], what: str,
        timeout_s: float = _QUICK_S,
    ) -> str:  # fmt: skip
        done = await self._run([PROGRAM, *words], files, timeout_s)
        if done.code != 0:
            said = done.output.strip().splitlines()
            text = said[-1].removeprefix("qemu-img: ") if said else f"exit code {done.code}"
            raise Invalid(f"{what}: {text[:400]}")
        return done.output

    async def size(self, path: str, kind: str) -> int:
        """What a machine would see of the image, which is of format `kind`; Invalid if damaged."""
        words = ["info", "--output=json", "-f", kind, _FIRST]
        text = await self._do(words, [(path, False)], os.path.basename(path))
        try:
            found = json.loads(text)
            size = int(found["virtual-size"])
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"qemu-img says nothing of use of {path}: {error}") from error
        if found.get("backing-filename") or found.get("full-backing-filename"):
            raise Invalid(f"{path} lies on another file: make it whole with qemu-img convert")
        if not 0 < size <= foreign.MOST_BYTES:
            raise Invalid(
                f"{path} says it has {size} bytes; at most {foreign.MOST_BYTES} are taken"
            )
        return size

    async def convert(self, path: str, kind: str, target: str, wanted: str = "qcow2") -> None:
        """A new image `target` of format `wanted` with the contents of `path`."""
        words = ["convert", "-f", kind, "-O", wanted, "-S", "64k"]
        if wanted == "vmdk":
            words += ["-o", "subformat=streamOptimized"]
        files = [(path, False), (_empty(target), True)]
        what = f"converting {os.path.basename(path)}"
        await self._do([*words, _FIRST, _SECOND], files, what, _LONG_S)

    async def flatten(self, path: str, base: str, target: str, wanted: str) -> None:
        """Like convert, of a machine's disk that lies on `base` ("" for none)."""
        words = ["convert", "--image-opts", "-O", wanted, "-S", "64k"]
        if wanted == "vmdk":
            words += ["-o", "subformat=streamOptimized"]
        files = [(path, False), (base or os.devnull, False), (_empty(target), True)]
        words += [_options(base, readonly=False), _THIRD]
        await self._do(words, files, "exporting", _LONG_S)

    async def create(self, target: str, size: int, base: str = "") -> None:
        """A new qcow2 image that is empty, or the same as `base` until it is written to."""
        under = ["-b", _SECOND, "-F", "qcow2"] if base else []
        words = ["create", "-q", "-f", "qcow2", *under, _FIRST, str(size)]
        await self._do(words, [(_empty(target), True), *_under(base)], "making a disk")

    async def resize(self, path: str, base: str, size: int) -> None:
        """Make it larger."""
        words = ["resize", "-q", "-f", "qcow2", _FIRST, str(size)]
        await self._do(words, [(path, True), *_under(base)], "resizing")

    async def snapshot(self, path: str, base: str, act: str, name: str) -> None:
        """`act` is -c (make), -a (go back to) or -d (remove), on the snapshot inside `path`."""
        words = ["snapshot", "-q", "--image-opts", act, name, _options(base, readonly=False)]
        await self._do(words, [(path, True), *_under(base)], f"the snapshot {name}")

    async def snapshots(self, path: str) -> list[dict[str, Any]]:
        """What snapshots are inside `path`, as qemu-img lists them."""
        words = ["info", "-U", "--output=json", "-f", "qcow2", _FIRST]
        text = await self._do(words, [(path, False)], "listing snapshots")
        found = json.loads(text).get("snapshots", [])
        return list(found) if isinstance(found, list) else []


def _options(base: str, *, readonly: bool) -> str:
    """A machine's disk for --image-opts: never what its header names."""
    words = f"driver=qcow2,file.driver=file,file.filename={_FIRST}"
    if base:
        words += f",backing.driver=qcow2,backing.file.driver=file,backing.file.filename={_SECOND}"
    return words + (",read-only=on" if readonly else "")


def _under(base: str) -> list[tuple[str, bool]]:
    return [(base, False)] if base else []


def _empty(path: str) -> str:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    os.fchmod(fd, 0o644)
    os.close(fd)
    return path
