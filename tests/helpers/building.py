"""A Debian image to build from: compiler, Python, Node and nginx; made once and kept.

here.cli("load", "-i", str(base_archive())).ok()       # the image BASE
"""

import fcntl
import hashlib
import shutil
import tempfile
from pathlib import Path

from tests.helpers.installation import installation
from tests.helpers.nginx import CACHE, can_bootstrap

SUITE = "debian:bookworm"
PACKAGES = ("gcc", "libc6-dev", "make", "python3-minimal", "nodejs", "nginx-light")
BASE = "debian-build:bookworm"


def base_archive() -> Path:
    """An OCI archive of the image BASE; made if it is not there (about two minutes)."""
    key = hashlib.sha256("\0".join([SUITE, *PACKAGES, BASE]).encode()).hexdigest()[:16]
    target = CACHE / f"build-{key}.tar"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            can_bootstrap()
            with tempfile.TemporaryDirectory(prefix="bh-base-", dir="/var/tmp") as folder:
                made = Path(folder, "image.tar")
                with installation(Path(folder)) as here:
                    packages = ",".join(PACKAGES)
                    here.cli("image", "bootstrap", SUITE, "--include", packages).ok()
                    here.cli("tag", SUITE, BASE).ok()
                    here.cli("save", "-o", str(made), BASE).ok()
                near = target.with_suffix(".new")
                shutil.copyfile(made, near)
                near.rename(target)
    return target
