"""CRIU for tests: the system's, that of the Debian guest, or a newer suite's, unpacked."""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.helpers import packages

SUITE = "trixie"
GUEST = Path("/run/host/criu")
"""Where the Debian guest has the packages' files (tests/guest/debian.py)."""
_WRAPPER = """\
#!/bin/sh
exec {root}/usr/lib64/ld-linux-x86-64.so.2 --library-path {root}/usr/lib/x86_64-linux-gnu \\
    {root}/usr/sbin/criu "$@"
"""


def tree() -> Path:
    """The files of CRIU and all that it needs; packages.NoPackages without a mirror."""
    return packages.unpacked("criu", suite=SUITE, dependencies=True)


@functools.cache
def program() -> str:
    """CRIU's path; packages.NoPackages if there is none."""
    installed = shutil.which("criu")
    if installed is not None:
        return installed
    root = GUEST if GUEST.exists() else tree()
    folder = tempfile.mkdtemp(prefix="bulkhead-criu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "criu")
    path.write_text(_WRAPPER.format(root=root))
    path.chmod(0o755)
    return str(path)


@functools.cache
def missing() -> str:
    """Why nothing can be checkpointed here, "" if it can; tries it."""
    if os.geteuid() != 0:
        return "needs root"
    if os.uname().machine != "x86_64":
        return "CRIU is unpacked for x86-64 only"
    try:
        command = [program(), "check"]
    except packages.NoPackages as error:
        return str(error)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        return f"criu check: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
    return ""
