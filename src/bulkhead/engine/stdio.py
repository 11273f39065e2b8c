"""Standard streams of workloads and where their output is logged."""

import os
from contextlib import AbstractContextManager

from bulkhead.boundary.seam import Stdio
from bulkhead.engine import options
from bulkhead.engine.records import Record
from bulkhead.home import Home
from bulkhead.keeper import client as keeper

LOG_SIZE = 10 << 20
LOG_FILES = 3
"""Bounds when none are given: ten megabytes, three files."""


def log_path(home: Home, record: Record) -> str:
    """The workload's log; rotated ones have .1, .2 … behind it."""
    return f"{home.workload(record.id)}/log/{record.id}-json.log"


def log_of(home: Home, record: Record) -> keeper.LogOptions:
    """Where and how its output is logged."""
    config = record.host.log_config
    given = (config.config if config else None) or {}
    size = given.get("max-size", "")
    return keeper.LogOptions(
        driver="none" if config and config.type_ == "none" else "json-file",
        path=log_path(home, record),
        max_size=0 if size == "-1" else options.size(size) if size else LOG_SIZE,
        max_file=int(given.get("max-file", LOG_FILES)),
    )


def make(home: Home, record: Record, rows: int, columns: int) -> AbstractContextManager[Stdio]:
    """The child's ends and the keeper's ends, closed here when the block ends."""
    config = record.config
    meta = keeper.StdioMeta(
        tty=config.tty,
        stdin_open=config.open_stdin,
        stdin_once=config.stdin_once,
        log=log_of(home, record),
    )
    return keeper.make_stdio(meta, rows=rows, columns=columns)


def writable_bytes(path: str) -> int:
    """Bytes on disk below `path`."""
    total = 0
    for parent, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(f"{parent}/{name}").st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def make_exec(
    *, tty: bool, stdin: bool, rows: int = 0, columns: int = 0
) -> AbstractContextManager[Stdio]:
    """Likewise for an exec, whose output is not logged."""
    meta = keeper.StdioMeta(tty=tty, stdin_open=stdin, stdin_once=True)
    return keeper.make_stdio(meta, rows=rows, columns=columns)
