"""The distribution's cloud kernel for microVMs in tests, pulled once and kept.

~/.cache/bulkhead-tests/kernels/cloud      as `bulkhead kernel pull cloud` makes it
"""

import fcntl
import os
import shutil
from pathlib import Path

from bulkhead.boundaries.guest import kernels
from bulkhead.boundaries.vmm import qemu
from bulkhead.errors import BulkheadError
from bulkhead.home import Home

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bulkhead-tests"


def missing() -> str:
    """Why there is no microVM here, "" if there is one; pulls the kernel at the first call."""
    if os.geteuid() != 0:
        return "needs root"
    for program, package in ((qemu.BINARY, "qemu-system-x86"), ("mke2fs", "e2fsprogs")):
        if shutil.which(program) is None:
            return f"{program} is missing (apt-get install {package})"
    CACHE.mkdir(parents=True, exist_ok=True)
    home = Home(str(CACHE), str(CACHE))
    with (CACHE / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / "kernels" / kernels.CLOUD).exists():
            try:
                kernels.pull(home, kernels.CLOUD)
            except BulkheadError as error:
                return f"the cloud kernel could not be pulled: {error}"
    return ""


def provide(root: Path) -> None:
    """Put the kernel into the installation at `root`, by links where that is possible."""
    shutil.copytree(
        CACHE / "kernels" / kernels.CLOUD,
        root / "kernels" / kernels.CLOUD,
        copy_function=_link,
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
