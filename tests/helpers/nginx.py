"""A Debian image with nginx, made by our own bootstrap and kept for every test that wants one.

    here.cli("load", "-i", str(nginx_archive())).ok()       # the image NGINX

The archive lies in ~/.cache/bulkhead-tests, named by the hash of what it is made from: suite,
packages, and the code that makes it.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from bulkhead.images import apt
from tests.helpers.installation import SOURCE, installation

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bulkhead-tests"
SUITE = "debian:bookworm"
PACKAGES = ("nginx-light",)
NGINX = "debian-nginx:bookworm"
MAKERS = ("apt.py", "bootstrap.py")


def _key(packages: Sequence[str], name: str) -> str:
    code = [(SOURCE / "bulkhead/images" / file).read_text() for file in MAKERS]
    return hashlib.sha256("\0".join([SUITE, *packages, name, *code]).encode()).hexdigest()[:16]


def can_bootstrap() -> None:
    """Skip, with the reason, where no image can be made."""
    for program in ("mmdebstrap", "apt-get"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed here (apt-get install mmdebstrap)")
    host = apt.sources_for("debian", "bookworm", None)[0].uri.partition("://")[2].partition("/")[0]
    try:
        socket.create_connection((host.partition(":")[0], 80), timeout=30).close()
    except OSError as error:
        pytest.skip(f"the package mirror {host} cannot be reached: {error}")


def nginx_archive() -> Path:
    """An OCI archive of the image NGINX; made if it is not there (about a minute)."""
    return archive("nginx", PACKAGES, NGINX)


def archive(kind: str, packages: Sequence[str], name: str) -> Path:
    """An OCI archive of the image `name`, Debian with `packages`; made if it is not there."""
    target = CACHE / f"{kind}-{_key(packages, name)}.tar"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            can_bootstrap()
            with tempfile.TemporaryDirectory(prefix=f"bh-{kind}-", dir="/var/tmp") as folder:
                made = Path(folder, "image.tar")
                with installation(Path(folder)) as here:
                    here.cli("image", "bootstrap", SUITE, "--include", ",".join(packages)).ok()
                    here.cli("tag", SUITE, name).ok()
                    here.cli("save", "-o", str(made), name).ok()
                near = target.with_suffix(".new")
                shutil.copyfile(made, near)
                near.rename(target)
    return target
