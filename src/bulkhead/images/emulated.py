"""Runs a command in which programs of another machine can run, too; nothing is registered outside.

    python -m bulkhead.images.emulated ARCHITECTURE COMMAND…

The command gets a user namespace in which every id is what it is outside, with a binfmt_misc of its
own (isolation/binfmt.py), and mount and PID namespaces. Its exit code is this process's.
"""

import os
import sys

from bulkhead.isolation import binfmt
from bulkhead.linux import mounts, namespaces

_MAP = "0 0 4294967295"


def main(words: list[str]) -> int:
    """Run `words[1:]` where programs for `words[0]` run."""
    architecture, command = words[0], words[1:]
    text = binfmt.registration(binfmt.MACHINES[architecture], binfmt.interpreter(architecture))
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go[1])
        namespaces.unshare(namespaces.NEWUSER | namespaces.NEWNS | namespaces.NEWPID)
        os.write(ready[1], b"1")
        os.read(go[0], 1)
        os._exit(_inside(text, command))
    os.read(ready[0], 1)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{child}/{name}", "w", encoding="ascii") as file:
            file.write(_MAP)
    os.write(go[1], b"1")
    return _wait(child)


def _inside(text: str, command: list[str]) -> int:
    """In the new namespaces: the first process of the new PID namespace runs the command."""
    first = os.fork()
    if first:
        return _wait(first)
    mounts.mount("none", "/", "none", mounts.MS_REC | mounts.MS_PRIVATE)
    mounts.mount("proc", "/proc", "proc")
    mounts.mount(binfmt.TYPE, binfmt.PLACE, binfmt.TYPE)
    with open(f"{binfmt.PLACE}/register", "w", encoding="ascii") as file:
        file.write(text)
    child = os.fork()
    if child == 0:
        os.execvp(command[0], command)
    while True:  # as its first process this one reaps all of the namespace
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
