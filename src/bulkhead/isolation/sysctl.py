"""Kernel parameters of a container: only those a namespace of its own keeps apart."""

from collections.abc import Mapping

from bulkhead.errors import Invalid
from bulkhead.linux.program import Program, Slot

_IPC = frozenset(
    {
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    }
)


def normalize(name: str) -> str:
    """`name` with dots; "net/ipv4/conf/eth0.1/forwarding" keeps the dot of an interface."""
    if "/" not in name:
        return name
    dot, slash = name.find("."), name.find("/")
    if 0 <= dot < slash:
        return name
    return name.translate(str.maketrans("./", "/."))


def path(name: str) -> str:
    """The file of parameter `name` below /proc; Invalid for names that leave /proc/sys."""
    parts = normalize(name).translate(str.maketrans("./", "/.")).split("/")
    if not all(parts) or any(part in (".", "..") for part in parts) or "\0" in name:
        raise Invalid(f"linux.sysctl: {name!r} is not a setting's name")
    return "sys/" + "/".join(parts)


def check(settings: Mapping[str, str], own: "frozenset[str] | set[str]") -> None:
    """Refuse, with Invalid, a setting that is not of one of the namespaces in `own` (kinds)."""
    for given in settings:
        name = normalize(given)
        path(given)
        if name in _IPC or name.startswith("fs.mqueue."):
            needs = "ipc"
        elif name.startswith("net."):
            needs = "network"
        elif name in ("kernel.domainname", "kernel.hostname"):
            needs = "uts"
        elif name.startswith("user."):
            needs = "user"
        else:
            raise Invalid(f'sysctl "{given}" is not in a separate kernel namespace')
        if needs not in own:
            raise Invalid(
                f'sysctl "{given}" is not allowed: the container shares the {needs} namespace'
            )


def plan(program: Program, settings: Mapping[str, str], proc: Slot) -> None:
    """Write the settings through `proc`, a proc file system of the container's own."""
    for name, value in settings.items():
        program.write(f"set {normalize(name)}", proc, path(name), value)
