"""A user-mode-linux guest: another kernel (6.1, cgroup v2) as an ordinary process of this machine.

Its root is this machine's own, read-only through hostfs, with a disk over what is written to: the
checkout and the interpreter are those of the tests, nothing is copied or built.
The exchange folder, `job.sh` going in and the results coming out, is a second hostfs mount.

UML has no cpuset, io or hugetlb controllers and no 32-bit calls; it is one processor.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.guest import job

DISK = 4 << 30
"""Bytes of the sparse disk for what is written, thrown away with the folder."""
INIT = job.ROOT / "tests/guest/inside/uml-init.sh"


def missing() -> str:
    """Why it cannot run here, "" if it can."""
    if shutil.which("linux.uml") is None:
        return "user-mode-linux is not installed"
    if shutil.which("mkfs.ext4") is None:
        return "e2fsprogs is not installed"
    if os.geteuid() != 0:
        return "hostfs as root needs root"
    return ""


def _memory(folder: Path, mib: int) -> str:
    """Where the guest's memory is a nameless file: in the host's, if there is room."""
    with contextlib.suppress(OSError):
        space = os.statvfs("/dev/shm")
        if space.f_bavail * space.f_frsize > 2 * mib << 20:
            return "/dev/shm"
    return str(folder)


def run(tests: Sequence[str], folder: Path, *, memory_mib: int = 768, timeout_s: int = 300) -> str:
    """Boot, run `tests`, end; returns the console's log. Results are in `folder`/exchange.

    `timeout_s` bounds the whole; the guest is killed then.
    """
    exchange = folder / "exchange"
    exchange.mkdir()
    text = job.script(tests, sys.executable, "/mnt/exchange", max(timeout_s - 30, 10))
    (exchange / "job.sh").write_text(text)
    disk = folder / "scratch.ext4"
    with disk.open("wb") as file:
        file.truncate(DISK)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", disk], check=True)
    command = [
        "setarch", "-R", "linux.uml", f"mem={memory_mib}M", f"uml_dir={folder}/uml", "umid=guest",
        f"ubd0={disk}",
        "rootfstype=hostfs", "rootflags=/", "ro", "pty.legacy_count=0", "panic=-1",
        "initcall_blacklist=raid6_select_algo", "con=null", "con0=null,fd:1", "ssl=null",
        "init=/bin/sh", "--", str(INIT), str(job.ROOT), str(exchange),
    ]  # fmt: skip
    log = folder / "console"
    with log.open("wb") as console:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                "PATH": os.environ["PATH"],
                "TMPDIR": _memory(folder, memory_mib),
                "HOME": str(folder),
            },
        )
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            console.write(b"\n--- killed: over its time\n")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace")
