"""Labels of Linux security modules, where the kernel has them: AppArmor profiles, SELinux contexts.

The label of the next execve(2) is written to a file of the process's own in /proc (proc(5),
apparmor(7), setexeccon(3)). It goes through a descriptor of the host's /proc that was opened before
the pivot, because the workload's own /proc may hide or fake the file.
"""

import errno
import os
from functools import cache

from bulkhead.errors import Invalid, Unsupported
from bulkhead.linux.program import Argument, Program

UNCONFINED = "unconfined"


@cache
def apparmor() -> bool:
    """Whether AppArmor is there and enabled."""
    try:
        with open("/sys/module/apparmor/parameters/enabled", encoding="ascii") as file:
            return file.read().strip() == "Y"
    except FileNotFoundError:
        return False


@cache
def selinux() -> bool:
    """Whether SELinux is there, with a policy loaded."""
    return os.path.exists("/sys/fs/selinux/enforce")


def profiles() -> frozenset[str]:
    """The AppArmor profiles that are loaded; empty where they cannot be read."""
    try:
        with open("/sys/kernel/security/apparmor/profiles", encoding="utf-8") as file:
            return frozenset(line.rpartition(" (")[0] for line in file)
    except OSError:
        return frozenset()


def check(profile: str, label: str) -> None:
    """Refuse labels this kernel cannot give: Unsupported, or Invalid for a profile not loaded."""
    if profile and profile != UNCONFINED:
        if not apparmor():
            raise Unsupported(
                f"apparmor profile {profile!r}: this kernel runs without AppArmor"
                " (use apparmor=unconfined, or boot with apparmor=1 security=apparmor)"
            )
        loaded = profiles()
        if loaded and profile not in loaded:
            raise Invalid(
                f"apparmor profile {profile!r} is not loaded; load it with apparmor_parser -r FILE"
            )
    if label and not selinux():
        raise Unsupported(f"SELinux label {label!r}: this kernel runs without SELinux")
    for text in (profile, label):
        if "\0" in text or "\n" in text:
            raise Invalid("a security label contains a NUL or a line break")


def plan_exec_label(program: Program, proc: Argument, profile: str, label: str) -> None:
    """Write the labels of the next execve; `proc` is the host's /proc. Last but for the filter.

    "" leaves the label as it is inherited. The errors of `check`.
    """
    check(profile, label)
    if profile and apparmor():
        text = f"exec {profile}"
        # The directory of its own came with 5.8 (stacked modules); before, the files are shared.
        own = program.call(
            f"open the label file for AppArmor profile {profile}",
            "openat", proc, "self/attr/apparmor/exec", os.O_WRONLY | os.O_CLOEXEC, 0,
            ok=(errno.ENOENT,),
        )  # fmt: skip
        data = text.encode()
        with program.when(own):
            program.call(f"set AppArmor profile {profile}", "write", own, data, len(data))
        with program.when(own, failed=True):
            program.write(f"set AppArmor profile {profile}", proc, "self/attr/exec", text)
    if label and selinux():
        program.write(f"set SELinux label {label}", proc, "self/attr/exec", label)


def current(pid: int) -> dict[str, str]:
    """The labels of process `pid` by module, for explanations; empty without any module."""
    found: dict[str, str] = {}
    for name, path in (("apparmor", "attr/apparmor/current"), ("selinux", "attr/current")):
        if name == "selinux" and not selinux():
            continue
        try:
            with open(f"/proc/{pid}/{path}", encoding="utf-8", errors="replace") as file:
                found[name] = file.read().strip("\0\n")
        except OSError:
            continue
    return found
