"""The machine as a whole: its memory in use, its caches, what it is."""

import os
import platform
import shutil
import time
from pathlib import Path

from bulkhead.boundaries.vmm.acceleration import acceleration
from bulkhead.comparing.spawn import FailedError, said


def meminfo() -> dict[str, int]:
    """/proc/meminfo in KiB. proc_meminfo(5)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = (line.partition(":") for line in file)
        return {name: int(rest.split()[0]) for name, _, rest in lines}


def drop_caches() -> None:
    """Write back and drop page cache, dentries and inodes; FailedError without the right to."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3")
    except OSError as error:
        raise FailedError(f"the page cache cannot be dropped: {error.strerror}; be root") from None


def used_mib(settle_s: float = 0.5) -> float:
    """Memory in use on the whole machine, caches dropped; shared memory counts as used."""
    time.sleep(settle_s)
    drop_caches()
    found = meminfo()
    cached = found["Cached"] - found["Shmem"]
    return (found["MemTotal"] - found["MemFree"] - found["Buffers"] - cached) / 1024


def free_mib() -> float:
    """Memory that new workloads can have without swapping."""
    return meminfo()["MemAvailable"] / 1024


def processor() -> str:
    """The processor's name."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, text = line.partition(":")
            if name.strip() in ("model name", "Model", "cpu model"):
                return text.strip()
    return platform.machine()


def facts() -> dict[str, str]:
    """What a reader has to know of this host."""
    memory = meminfo()["MemTotal"] / 1024 / 1024
    found = {
        "processor": processor(),
        "CPUs": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.1f} GiB",
        "kernel": f"Linux {platform.release()} {platform.machine()}",
        "KVM": "usable" if acceleration().name == "kvm" else "not usable: guests are emulated",
        "load at start": f"{os.getloadavg()[0]:.2f}",
    }
    if shutil.which("systemd-detect-virt"):
        try:
            found["virtualised by"] = said(["systemd-detect-virt"]).strip()
        except FailedError:
            found["virtualised by"] = "nothing that says so"
    vulnerabilities = Path("/sys/devices/system/cpu/vulnerabilities")
    if vulnerabilities.is_dir():
        exposed = [
            place.name
            for place in sorted(vulnerabilities.iterdir())
            if place.read_text().startswith("Vulnerable")
        ]
        found["unmitigated"] = ", ".join(exposed) or "none"
    return found
