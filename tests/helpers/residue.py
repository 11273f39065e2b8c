"""What a test leaves on the machine: everything of the kernel's that we could forget.

    with residue(str(tmp_path)):
        ...                         # AssertionError afterwards if anything is left

Compared before and after: mounts, control groups, network and mount namespaces (by the processes
in them), links, nft tables, processes, and the given folders' neighbours in /run, /tmp and
/var/lib. The kernel tears some of it down asynchronously: what is left is looked at again until it
is gone or the deadline passes.

Where other engines or test runs share the machine, the comparison would blame us for theirs: with
BULKHEAD_RESIDUE_SHARED=1 only what names the scope (a path or an identifier) counts.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

SHARED = os.environ.get("BULKHEAD_RESIDUE_SHARED") == "1"
SETTLE_S = 30.0
Snapshot = dict[str, set[str]]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _parent(pid: str) -> str:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[1] if fields else "0"


def _processes() -> set[str]:
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        stat = _read(f"/proc/{entry}/stat")
        if not stat:
            continue
        fields = stat.rpartition(")")[2].split()
        # Kernel threads and zombies (their parent is not always ours) are not residue.
        if fields[0] in "ZX" or int(fields[6]) & 0x00200000:
            continue
        command = _read(f"/proc/{entry}/cmdline").replace("\0", " ").strip()
        found.add(f"{entry} {command or stat.partition('(')[2].partition(')')[0]}")
    return found


def _of_another(process: str, before: set[str]) -> bool:
    """Whether it was started by somebody who was there before: not init, not this test, none of us.

    What outlives its parents is init's child, and what our own long-lived processes start is ours.
    Only a shell or service beside the test has children of its own.
    """
    old = {pid: command for pid, _, command in (entry.partition(" ") for entry in before)}
    pid = process.partition(" ")[0]
    while pid not in old and pid not in ("0", "1"):
        pid = _parent(pid)
    return pid not in ("0", "1", str(os.getpid())) and "bulkhead" not in old[pid]


def _namespaces() -> set[str]:
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            for kind in ("net", "mnt", "pid", "user"):
                with contextlib.suppress(OSError):
                    found.add(os.readlink(f"/proc/{entry}/ns/{kind}"))
    return found


def _cgroups() -> set[str]:
    found = set()
    for line in _read("/proc/self/mountinfo").splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind in ("cgroup", "cgroup2"):
            found |= {folder for folder, _, _ in os.walk(fields[4])}
    return found


def _links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def _tables() -> set[str]:
    done = subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, check=False)
    if done.returncode != 0:
        return set()
    listed = json.loads(done.stdout)["nftables"]
    return {f"{i['table']['family']} {i['table']['name']}" for i in listed if "table" in i}


def _files() -> set[str]:
    found = set()
    for folder in ("/run", "/tmp", "/var/tmp", "/var/lib", "/dev/shm", "/etc"):
        with contextlib.suppress(OSError):
            found |= {f"{folder}/{n}" for n in os.listdir(folder) if "bulkhead" in n or "bh-" in n}
    return found


def snapshot() -> Snapshot:
    """Everything that is compared, by kind."""
    return {
        "mounts": set(_read("/proc/self/mountinfo").splitlines()),
        "cgroups": _cgroups(),
        "namespaces": _namespaces(),
        "links": _links(),
        "tables": _tables(),
        "processes": _processes(),
        "files": _files(),
    }


def _ours(kind: str, entry: str, scopes: tuple[str, ...]) -> bool:
    if not SHARED:
        return True
    return kind != "namespaces" and any(scope in entry for scope in scopes)


def left(before: Snapshot, scopes: tuple[str, ...]) -> dict[str, list[str]]:
    """What is there now and was not `before`."""
    now = snapshot()
    new = {k: sorted(e for e in now[k] - before[k] if _ours(k, e, scopes)) for k in now}
    new["processes"] = [p for p in new["processes"] if not _of_another(p, before["processes"])]
    return {kind: entries for kind, entries in new.items() if entries}


def _derived(folder: str) -> tuple[str, ...]:
    """What the installation below `folder` calls its control groups, tables and links."""
    root = os.path.join(folder, "root").encode()
    short = hashlib.sha1(root, usedforsecurity=False).hexdigest()
    long = hashlib.sha256(root).hexdigest()
    return f"bulkhead-{long[:8]}", f"bulkhead_{short[:16]}", f"bh0-{short[:8]}"


@contextlib.contextmanager
def residue(*scopes: str, settle_s: float = SETTLE_S) -> Iterator[None]:
    """Fail if the block leaves anything on the machine; `scopes` are our paths and names."""
    before = snapshot()
    scopes = tuple(name for scope in scopes for name in (scope, *_derived(scope)))
    yield
    deadline = time.monotonic() + settle_s
    while remains := left(before, scopes):
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind: {json.dumps(remains, indent=1)}")
        time.sleep(0.05)
