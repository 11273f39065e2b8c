"""The host's own settings that bridges need, and giving them back.

`<run>/network/host.json` remembers, per file below /proc/sys, the value found and the value set.
When the last network goes down each is restored, unless somebody else changed it meanwhile, or
another user of forwarding (Docker, a second installation of ours) is there.
"""

import contextlib
import json
import os

from bulkhead.errors import Unsupported
from bulkhead.home import Home

_SYS = "/proc/sys/net/"
FORWARD4 = "ipv4/ip_forward"
FORWARD6 = "ipv6/conf/all/forwarding"


def read(key: str) -> str | None:
    """A setting below /proc/sys/net, None if this kernel has it not."""
    try:
        with open(_SYS + key, encoding="ascii") as file:
            return file.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write(key: str, value: str) -> None:
    """Change a setting; OSError as the kernel says."""
    fd = os.open(_SYS + key, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def bridges_are_filtered() -> bool:
    """Whether frames that stay on a bridge pass the firewall's IP chains too (br_netfilter)."""
    keys = ("bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables")
    return all(read(key) == "1" for key in keys)


class HostSettings:
    """What we changed on this host."""

    def __init__(self, home: Home) -> None:
        self._path = home.in_run("network", "host.json")
        self._changed: dict[str, list[str]] = {}
        with contextlib.suppress(FileNotFoundError), open(self._path, encoding="ascii") as file:
            self._changed = json.loads(file.read() or "{}")

    def forward(self, version: int) -> None:
        """Let the host forward packets; Unsupported if it cannot be switched on."""
        key = FORWARD4 if version == 4 else FORWARD6
        if read(key) == "1":
            return
        if version == 6:
            # A host that forwards IPv6 ignores router advertisements, and with them loses its own
            # default route, unless accept_ra is 2.
            for name in sorted(os.listdir(_SYS + "ipv6/conf")):
                if name != "all" and read(f"ipv6/conf/{name}/accept_ra") == "1":
                    self._set(f"ipv6/conf/{name}/accept_ra", "1", "2")
        self._set(key, "0", "1")

    def _set(self, key: str, old: str, new: str) -> None:
        self._changed.setdefault(key, [old, new])
        self._save()
        try:
            write(key, new)
        except OSError as error:
            raise Unsupported(
                f"network: cannot set {_SYS}{key} to {new}: {error.strerror}; set it yourself "
                f"(sysctl -w net/{key}={new})"
            ) from error

    def _save(self) -> None:
        if not self._changed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            return
        temporary = self._path + ".new"
        with open(temporary, "w", encoding="ascii") as file:
            file.write(json.dumps(self._changed))
        os.replace(temporary, self._path)

    def restore(self, *, shared: bool) -> None:
        """Give back what was changed; with `shared` somebody else relies on it, and it stays."""
        if not self._changed:
            return
        for key, (old, new) in reversed(self._changed.items()):
            if not shared and read(key) == new:
                write(key, old)
        self._changed.clear()
        self._save()
