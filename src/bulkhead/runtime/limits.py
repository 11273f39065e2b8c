"""update, pause, resume."""

import sys

import msgspec

from bulkhead.errors import Conflict, Invalid, Unsupported
from bulkhead.oci.runtime import CPU, BlockIO, Memory, Pids, Resources
from bulkhead.runtime import lifecycle, scopes
from bulkhead.runtime.main import Context


def update(context: Context) -> int:
    """Change limits of a container."""
    for name in ("l3-cache-schema", "mem-bw-schema"):
        if context.text(name):
            raise Unsupported(f"--{name} is not supported: this runtime does not use intelRdt")
    record = context.records.load(context.arguments[0])
    if context.records.status(record) == "stopped":
        raise Conflict("container not running")
    path = context.text("resources")
    resources = _read(path) if path else _given(context)
    lifecycle.load(context.records, record).group.apply(resources)
    if record.unit:
        scopes.update(record.unit, resources)
    return 0


def _read(path: str) -> Resources:
    try:
        data = sys.stdin.buffer.read() if path == "-" else _bytes(path)
        return msgspec.json.decode(data, type=Resources)
    except msgspec.MsgspecError as error:
        raise Invalid(f"--resources {path}: {error}") from None


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Invalid(f"--resources {path}: {error.strerror}") from None


def _given(context: Context) -> Resources:
    """The limits that the options name; 0 leaves one as it is."""

    def number(name: str) -> int | None:
        return context.number(name) or None

    weight = number("blkio-weight")
    pids = number("pids-limit")
    return Resources(
        memory=Memory(
            limit=_bytes_of(context, "memory"),
            reservation=_bytes_of(context, "memory-reservation"),
            swap=_bytes_of(context, "memory-swap"),
        ),
        cpu=CPU(
            shares=number("cpu-share"),
            quota=number("cpu-quota"),
            period=number("cpu-period"),
            realtime_runtime=number("cpu-rt-runtime"),
            realtime_period=number("cpu-rt-period"),
            cpus=context.text("cpuset-cpus"),
            mems=context.text("cpuset-mems"),
        ),
        block_io=BlockIO(weight=weight) if weight else None,
        pids=Pids(pids) if pids else None,
    )


_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def _bytes_of(context: Context, name: str) -> int | None:
    text = context.text(name)
    if not text or text == "0":
        return None
    if text == "-1":
        return -1
    digits = text.rstrip("bBkKmMgGtT")
    unit = text[len(digits) :].lower()
    unit = unit[0] if unit else ""
    if not digits.isdecimal():
        raise Invalid(f"--{name} {text!r} is not a size in bytes")
    return int(digits) * _UNITS[unit]


def pause(context: Context) -> int:
    """Freeze a container."""
    record = context.records.load(context.arguments[0])
    status = context.records.status(record)
    if status not in ("running", "created"):
        raise Conflict("container not running" if status == "stopped" else f"container {status}")
    lifecycle.load(context.records, record).group.freeze()
    return 0


def resume(context: Context) -> int:
    """Let a paused container go on."""
    record = context.records.load(context.arguments[0])
    if context.records.status(record) != "paused":
        raise Conflict("container not paused")
    lifecycle.load(context.records, record).group.thaw()
    return 0
