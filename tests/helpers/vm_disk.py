"""A Debian disk for machines in tests, made once from packages and kept.

~/.cache/bulkhead-tests/
  machines/firmware/          OVMF, as `bulkhead vm firmware` fetches it
  vm-HASH/                    the disk image, as `bulkhead vm bootstrap` makes it
"""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from bulkhead.errors import BulkheadError
from bulkhead.home import Home
from bulkhead.machines import bootstrap, build, firmware
from tests.helpers.guest_kernel import CACHE
from tests.helpers.installation import Installation

NAME = "debian:bookworm"
_NO_MIRROR = ("Failed to fetch", "Could not resolve", "Temporary failure", "Could not connect")
_ESCAPED = "debian%3Abookworm"


def missing() -> str:
    """Why no machine can boot here, "" if one can; fetches the firmware at the first call."""
    if os.geteuid() != 0:
        return "needs root"
    for program, package in (
        ("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils"),
        ("mke2fs", "e2fsprogs"), ("mmdebstrap", "mmdebstrap"),
    ):  # fmt: skip
        if shutil.which(program) is None:
            return f"{program} is missing (apt-get install {package})"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "firmware.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            firmware.pull(Home(str(CACHE), str(CACHE)))
        except BulkheadError as error:
            return f"no UEFI firmware: {error.message}"
    return ""


def firmware_for(here: Installation) -> None:
    """Give the installation the firmware, if this system has none."""
    kept = CACHE / "machines/firmware"
    if kept.exists():
        shutil.copytree(kept, here.root / "machines/firmware", dirs_exist_ok=True)


def provide(here: Installation) -> None:
    """Give the installation firmware and disk image; bootstraps that if it is not kept yet."""
    firmware_for(here)
    sources = [Path(str(module.__file__)).read_bytes() for module in (bootstrap, build)]
    key = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    place = CACHE / f"vm-{key}"
    with (CACHE / "vm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            done = here.cli("vm", "bootstrap", NAME, "--size", "3g", "--quiet")
            if done.code != 0 and any(word in done.err for word in _NO_MIRROR):
                pytest.skip(f"no packages to make a disk of: {done.err.strip()[-300:]}")
            done.ok()
            for old in CACHE.glob("vm-*"):
                shutil.rmtree(old)
            fresh = CACHE / "vm.new"
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(here.root / "machines/images" / _ESCAPED, fresh)
            fresh.rename(place)
            return
    target = here.root / "machines/images" / _ESCAPED
    target.parent.mkdir(parents=True, mode=0o711, exist_ok=True)
    shutil.copytree(place, target)
    (target / "disk.qcow2").chmod(0o444)
