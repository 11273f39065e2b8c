"""Commands as their users see them: when the first byte comes, when they end, what they say."""

import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO

LIMIT_S = 120.0
"""No single command of a comparison takes longer, unless it hangs."""

_SPOKEN = re.compile(rb"(?:^|[^0-9A-Za-z])1\r?\n")
"""The probe's line on a console that others write to as well."""


class FailedError(Exception):
    """A command did not do what it was to do; its text says which, and its last words."""


def complain(words: Sequence[str], status: int, errors: bytes) -> FailedError:
    """The exception for a command that ended with `status`."""
    said = errors.decode(errors="replace").strip().splitlines()
    last = said[-1] if said else "no message"
    return FailedError(f"{_short(words)}: exit status {status}: {last}")


def _short(words: Sequence[str]) -> str:
    """The program and what it is to do, for messages."""
    doing = next((word for word in words[1:] if not word.startswith("-")), "")
    return f"{os.path.basename(words[0])} {doing}".rstrip()


def said(words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """What a command prints; FailedError if it fails."""
    try:
        done = subprocess.run(
            words, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FailedError(f"{_short(words)}: no end after {LIMIT_S:.0f} s") from None
    except OSError as error:
        raise FailedError(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        raise complain(words, done.returncode, done.stderr)
    return done.stdout.decode(errors="replace")


def quietly(words: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run a command that may fail, as an undo does; its exit status, -1 if it has none."""
    try:
        done = subprocess.run(
            words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return -1
    return done.returncode


def elapsed(words: Sequence[str], env: Mapping[str, str] | None = None) -> float:
    """Milliseconds from spawn to end; FailedError if it fails."""
    start = time.perf_counter()
    said(words, env)
    return (time.perf_counter() - start) * 1e3


def timed(
    words: Sequence[str], env: Mapping[str, str] | None = None, *, console: bool = False
) -> tuple[float, float]:
    """Milliseconds from spawn to the first byte of output, and to the end.

    On a console (`console`) the first byte is that of the probe's own line. A command that prints
    nothing has its end for its first byte. FailedError if it fails or takes LIMIT_S.
    """
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        except OSError as error:
            raise FailedError(f"{words[0]}: {error.strerror}") from None
        assert process.stdout is not None
        try:
            first = _until_spoken(process.stdout, start, console, _short(words))
            while _piece(process.stdout, start, _short(words)):
                pass
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise FailedError(f"{_short(words)}: no end after {LIMIT_S:.0f} s") from None
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        end = time.perf_counter()
        if status:
            errors.seek(0)
            raise complain(words, status, errors.read())
    return (first - start) * 1e3, (end - start) * 1e3


def _piece(stream: IO[bytes], start: float, what: str) -> bytes:
    """The next piece, b"" at the end; FailedError once LIMIT_S have passed since `start`."""
    left = start + LIMIT_S - time.perf_counter()
    if left <= 0 or not select.select([stream], [], [], left)[0]:
        raise FailedError(f"{what}: no end after {LIMIT_S:.0f} s")
    return os.read(stream.fileno(), 1 << 16)


def _until_spoken(stream: IO[bytes], start: float, console: bool, what: str) -> float:
    text = b""
    while True:
        piece = _piece(stream, start, what)
        moment = time.perf_counter()
        text = text[-4096:] + piece
        if not console or _SPOKEN.search(text):
            return moment
        if not piece:
            raise FailedError(f"{what}: ended without a word of the workload")


def spoken(process: "subprocess.Popen[bytes]") -> None:
    """Wait for the probe's line on the output of `process`; FailedError if it ends before."""
    assert process.stdout is not None
    text, start = b"", time.perf_counter()
    while not _SPOKEN.search(text):
        piece = _piece(process.stdout, start, "it")
        if not piece:
            raise FailedError(f"it ended: {text[-200:].decode(errors='replace')}")
        text = text[-4096:] + piece
