"""CRIU as a child of ours: one request over a socket (`criu swrk`), answered by notes and a reply.

The messages are images/rpc.proto of CRIU, in protocol buffers' wire format; field numbers below are
its own. While it works CRIU reports points of time by name and waits for our answer.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bulkhead.errors import Internal, Unavailable, Unsupported
from bulkhead.linux.fds import OwnedFd

DUMP, RESTORE, PRE_DUMP, _NOTIFY = 1, 2, 4, 6
_KINDS = {DUMP: "dump", RESTORE: "restore", PRE_DUMP: "pre-dump"}
_OPTIONS = {
    "images_dir_fd": 1, "pid": 2, "leave_running": 3, "ext_unix_sk": 4, "tcp_established": 5,
    "shell_job": 7, "file_locks": 8, "log_level": 9, "log_file": 10, "ps": 11, "notify_scripts": 12,
    "root": 13, "parent_img": 14, "track_mem": 15, "auto_dedup": 16, "work_dir_fd": 17,
    "link_remap": 18, "cg_root": 25, "rst_sibling": 26, "inherit_fd": 27, "manage_cgroups": 24,
    "manage_cgroups_mode": 34, "external": 37, "empty_ns": 38, "freeze_cgroup": 44,
    "tcp_skip_in_flight": 46, "status_fd": 49, "orphan_pts_master": 50, "tcp_close": 52,
    "lsm_profile": 53, "network_lock": 64,
}  # fmt: skip
_MESSAGE = 1 << 16
_END_S = 30.0

Value = bool | int | str | bytes
Given = Value | Sequence[Value]
Note = Callable[[str, int, "OwnedFd | None"], None]
"""Called with the point's name, the process it is about, and a descriptor that came along."""


class Malformed(ValueError):
    """Not a message of CRIU's."""


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: Value) -> bytes:
    """One field of a message; numbers are not negative."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(int(value))
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def fields(data: bytes) -> dict[int, "int | bytes"]:
    """A message's fields by number, the last one of each; Malformed for what is none."""
    found: dict[int, int | bytes] = {}
    position = 0

    def number() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 70, 7):
            if position >= len(data):
                raise Malformed("it ends too early")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise Malformed("a number without an end")

    while position < len(data):
        key = number()
        if key & 7 == 0:
            found[key >> 3] = number()
        elif key & 7 == 2:
            size = number()
            if position + size > len(data):
                raise Malformed("it ends too early")
            found[key >> 3] = data[position : position + size]
            position += size
        else:
            raise Malformed(f"a field of kind {key & 7}")
    return found


def pair(first: tuple[int, Value], second: tuple[int, Value]) -> bytes:
    """A message of two fields: inherit_fd {key = 1, fd = 2}, cgroup_root {ctrl = 1, path = 2}."""
    return field(*first) + field(*second)


def options(given: Mapping[str, Given]) -> bytes:
    """criu_opts; what is False or empty is left out."""
    out = b""
    for name, value in given.items():
        values = [value] if isinstance(value, int | str | bytes) else value
        out += b"".join(field(_OPTIONS[name], one) for one in values if one)
    return out


@dataclass(frozen=True, slots=True)
class Criu:
    """The program, found by name or path."""

    program: str = "criu"

    def run(
        self,
        kind: int,
        given: Mapping[str, Given],
        note: Note,
        *,
        fds: Sequence[int] = (),
        log: str = "",
    ) -> None:
        """One request to its end; `fds` are lent under their own numbers.

        Unsupported if there is no such program, Internal if CRIU fails: `log` is named then. What
        `note` raises ends CRIU's work too.
        """
        path = shutil.which(self.program)
        if path is None:
            raise Unsupported(
                f"{self.program} is not there: checkpoints are made by CRIU (apt-get install criu)"
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = field(1, kind) + field(2, options(given))
        with ours:
            with theirs:
                child = subprocess.Popen(
                    [path, "swrk", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), *fds],
                )
            try:
                ours.send(request)
                _converse(ours, kind, note, log)
            except OSError as error:
                raise Unavailable(f"criu: {error.strerror}; see {log}") from error
            finally:
                ours.close()
                _end(child)


def _end(child: "subprocess.Popen[bytes]") -> None:
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _converse(sock: socket.socket, kind: int, note: Note, log: str) -> None:
    while True:
        data, received, _, _ = socket.recv_fds(sock, _MESSAGE, 1)
        kept = OwnedFd(received[0]) if received else None
        try:
            if not data:
                raise Internal(f"criu ended while it made the {_KINDS[kind]}; see {log}")
            try:
                reply = fields(data)
                notes = fields(_bytes(reply.get(5, b"")))
            except Malformed as error:
                raise Internal(f"criu: {error}") from error
            if not reply.get(2):
                raise Internal(_failure(kind, reply, log))
            if reply.get(1) != _NOTIFY:
                return
            note(_bytes(notes.get(1, b"")).decode(), _int(notes.get(2, 0)), kept)
            sock.send(field(1, _NOTIFY) + field(3, True))
        finally:
            if kept is not None:
                kept.close()


def _failure(kind: int, reply: Mapping[int, "int | bytes"], log: str) -> str:
    said = _first_error(log) or _bytes(reply.get(9, b"")).decode(errors="replace").strip()
    number = _int(reply.get(7, 0))
    parts = [f"criu failed: type {_KINDS[kind]} errno {number}"]
    parts += [os.strerror(number)] if number else []
    parts += [said] if said else []
    return ": ".join(parts) + f"; log file: {log}"


def _first_error(log: str) -> str:
    """The first error in CRIU's log that is one: that it cannot raise a limit is none."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            found = (line.partition("Error (")[2] for line in file)
            return next((text.strip() for text in found if text and "rlimit:" not in text), "")
    except OSError:
        return ""


def _bytes(value: "int | bytes") -> bytes:
    if isinstance(value, int):
        raise Malformed("a number in place of a text")
    return value


def _int(value: "int | bytes") -> int:
    if isinstance(value, bytes):
        raise Malformed("a text in place of a number")
    return value
