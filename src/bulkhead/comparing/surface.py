"""The reachable surface of the host's kernel: filters in force, and calls that were seen."""

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from bulkhead.comparing import processes
from bulkhead.comparing.spawn import FailedError
from bulkhead.isolation.seccomp import describe
from bulkhead.linux import seccomp

_TRACING = "/sys/kernel/tracing"
_CALL = re.compile(rb"sys_enter: NR (\d+) ")
_ARCHITECTURE = "x86_64" if os.uname().machine == "x86_64" else "aarch64"


def known() -> int:
    """How many system calls this kernel has, as far as our table knows."""
    return len(seccomp.numbers(_ARCHITECTURE))


def _of_thread(thread: int) -> set[str] | None:
    """What that thread may call; None if it cannot be asked, since its own kernel traces it."""
    with open(f"/proc/{thread}/status", encoding="utf-8", errors="replace") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    if status.get("TracerPid", "0").strip() != "0":
        return None
    mode = status.get("Seccomp", "0").strip()
    everything = set(seccomp.numbers(_ARCHITECTURE))
    if mode == "0":
        return everything
    if mode == "1":
        return {"read", "write", "exit", "rt_sigreturn"}
    # The tracer is a thread that ends here in any case.
    with ThreadPoolExecutor(1, thread_name_prefix="surface") as tracer:
        filters = tracer.submit(seccomp.installed, thread).result()
    for program in filters:
        everything &= describe.passes(program, _ARCHITECTURE)
    return everything


def filtered(pids: Sequence[int]) -> set[str]:
    """What any thread of the processes may call, by the filters in force.

    Threads that are traced cannot be asked: they are a user-space kernel's own, forked by it, and
    have its filters (seccomp(2): inherited, never fewer).

    Needs CAP_SYS_ADMIN; FailedError where the kernel cannot be asked.
    """
    found: set[str] = set()
    asked = 0
    for thread in processes.threads(list(pids)):
        try:
            passed = _of_thread(thread)
            if passed is not None:
                found |= passed
                asked += 1
        except ProcessLookupError:
            continue
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FailedError(f"the filter cannot be read: {error.strerror}") from None
    if not asked:
        raise FailedError("it has no process on the host that could be asked")
    return found


@contextlib.contextmanager
def seen(pids: Sequence[int]) -> Generator[set[str]]:
    """The calls that the processes, and what they fork, make during the block.

    The set is complete when the block has ended. A tracing instance of its own (ftrace), removed
    afterwards: others' tracing is not touched. FailedError where there is none, or no right to it.
    """
    names = {number: name for name, number in seccomp.numbers(_ARCHITECTURE).items()}
    place = f"{_TRACING}/instances/bulkhead-compare-{uuid.uuid4().hex[:8]}"
    found: set[str] = set()
    try:
        os.mkdir(place)
    except OSError as error:
        raise FailedError(f"no tracing ({place}): {error.strerror}") from None
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, place)
        threads = processes.threads(list(pids))
        _put(f"{place}/options/event-fork", "1")
        _put(f"{place}/set_event_pid", " ".join(map(str, threads)))
        pipe = os.open(f"{place}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        undo.callback(os.close, pipe)
        done = threading.Event()
        reader = threading.Thread(target=_read, args=(pipe, done, names, found), daemon=True)
        _put(f"{place}/events/raw_syscalls/sys_enter/enable", "1")
        undo.callback(_put, f"{place}/events/raw_syscalls/sys_enter/enable", "0")
        reader.start()
        undo.callback(reader.join)
        undo.callback(done.set)
        yield found


def _read(pipe: int, done: threading.Event, names: dict[int, str], found: set[str]) -> None:
    rest = b""
    while True:
        last = done.is_set()
        try:
            piece = os.read(pipe, 1 << 16)
        except BlockingIOError:
            if last:
                return
            time.sleep(0.01)
            continue
        if not piece and last:
            return
        lines = (rest + piece).rsplit(b"\n", 1)
        rest = lines[-1]
        for number in _CALL.findall(lines[0] if len(lines) == 2 else b""):
            found.add(names.get(int(number), f"#{int(number)}"))


def _put(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise FailedError(f"{path}: {error.strerror}") from None


def _remove(place: str) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            os.rmdir(place)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
