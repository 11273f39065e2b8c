"""spec and features: what can be asked of this runtime."""

import json
import os
from typing import get_args

from bulkhead.errors import Conflict, Unsupported
from bulkhead.isolation import lsm, mounts
from bulkhead.isolation.masks import MASKED_PATHS, READONLY_PATHS
from bulkhead.isolation.seccomp import compile as seccomp
from bulkhead.linux import capabilities, namespaces
from bulkhead.oci import runtime
from bulkhead.runtime.main import VERSION, Context

_HOOKS = (
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
)
_FILTER_FLAGS = tuple(
    f"SECCOMP_FILTER_FLAG_{name}" for name in ("LOG", "SPEC_ALLOW", "TSYNC", "WAIT_KILLABLE_RECV")
)
_CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")


def features(_context: Context) -> int:
    """The Features structure of the runtime specification (features.md)."""
    architectures = sorted(seccomp.ARCHITECTURES)
    shown = {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": runtime.VERSION,
        "hooks": _HOOKS,
        "mountOptions": mounts.option_names(),
        "linux": {
            "namespaces": sorted(namespaces.supported()),
            "capabilities": capabilities.NAMES,
            "cgroup": {
                "v1": True,
                "v2": True,
                "systemd": True,
                "systemdUser": False,
                "rdma": True,
            },
            "seccomp": {
                "enabled": True,
                "actions": sorted(seccomp.ACTIONS),
                "operators": sorted(get_args(runtime.SeccompOperator)),
                "archs": architectures,
                "knownFlags": list(_FILTER_FLAGS),
                "supportedFlags": list(_FILTER_FLAGS),
            },
            "apparmor": {"enabled": lsm.apparmor()},
            "selinux": {"enabled": lsm.selinux()},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}},
        },
        "annotations": {"io.bulkhead.version": VERSION},
    }
    print(json.dumps(shown, indent=2))
    return 0


def spec(context: Context) -> int:
    """Write an example configuration into the bundle."""
    if context.flag("rootless"):
        raise Unsupported("spec --rootless: this runtime does not run without privileges yet")
    path = os.path.join(context.text("bundle") or ".", "config.json")
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(example(), file, indent=2)
            file.write("\n")
    except FileExistsError:
        raise Conflict(f"File {path} exists. Remove it first") from None
    return 0


def example() -> dict[str, object]:
    """A configuration that runs a shell in ./rootfs."""
    sets = list(_CAPABILITIES)
    return {
        "ociVersion": runtime.VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": {"bounding": sets, "effective": sets, "permitted": sets},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "bulkhead",
        "mounts": _mounts(),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [
                {"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")
            ],
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
        },
    }


def _mounts() -> list[dict[str, object]]:
    strict = ["nosuid", "noexec", "nodev"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": [*strict, "mode=1777", "size=65536k"],
        },
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": strict},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*strict, "ro"]},
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": [*strict, "relatime", "ro"],
        },
    ]
