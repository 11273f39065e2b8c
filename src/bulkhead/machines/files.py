"""Where disk images, firmware and machines' files are.

<root>/machines/
  images/NAME/       a disk image that machines are made from; ":" and "/" in NAME are escaped
    image.json         what is known of it (Image)
    disk.qcow2         never written once it is there
  firmware/          OVMF, when it was fetched and not installed
  work/              disks being made; emptied when the engine begins
<workload>/          of a machine (Home.workload)
  disk0.qcow2 …      its disks; those on an image hold only what differs
  nvram.fd           UEFI's variables
  seed.img           cloud-init's seed
  cd.iso             what is in the drive
"""

import contextlib
import os
import re
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterator

import msgspec

from bulkhead.errors import Conflict, Corrupt, Invalid, NotFound
from bulkhead.home import Home

_NAME = re.compile(r"[a-z0-9][a-z0-9._:/-]{0,127}")
DISK = "disk.qcow2"


class Image(msgspec.Struct, omit_defaults=True):
    """A disk image: `size` is what a machine sees, `stored` what it takes here, both in bytes."""

    name: str
    size: int
    firmware: str
    origin: str
    created_ns: int
    format: str = "qcow2"
    stored: int = 0
    user: str = ""
    """Whom cloud-init makes on it by default."""


def _folder(home: Home, name: str) -> str:
    return home.in_root("machines", "images", urllib.parse.quote(name, safe=""))


def check_name(name: str) -> str:
    """The name; Invalid if it is none."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise Invalid(
            f"invalid name of a disk image {name!r}: lower case letters, digits, . _ : / -"
        )
    return name


def disk_of(home: Home, name: str) -> str:
    """The path of an image's disk."""
    return f"{_folder(home, name)}/{DISK}"


def images(home: Home) -> list[Image]:
    """All disk images, by name."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(home.in_root("machines", "images")):
            with contextlib.suppress(FileNotFoundError):
                found.append(_load(entry.path))
    return sorted(found, key=lambda one: one.name)


def image(home: Home, name: str) -> Image:
    """One of them; NotFound says how to get some."""
    try:
        return _load(_folder(home, name))
    except FileNotFoundError:
        raise NotFound(
            f"No such disk image: {name}; bulkhead vm bootstrap debian:bookworm or "
            "bulkhead vm import FILE NAME makes one"
        ) from None


def _load(folder: str) -> Image:
    with open(f"{folder}/image.json", "rb") as file:
        data = file.read()
    try:
        found = msgspec.json.decode(data, type=Image)
    except msgspec.DecodeError as error:
        raise Corrupt(f"{folder}/image.json: {error}") from error
    found.stored = os.stat(f"{folder}/{DISK}").st_blocks * 512
    return found


def absent(home: Home, name: str) -> None:
    """Conflict if there is an image of that name."""
    if os.path.exists(_folder(home, check_name(name))):
        raise Conflict(f"the disk image {name} is there already: bulkhead vm rmi {name}")


@contextlib.contextmanager
def work(home: Home) -> Iterator[str]:
    """A directory for what is being made, on the file system of machines; gone afterwards."""
    parent = home.in_root("machines", "work")
    os.makedirs(parent, mode=0o711, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="w-") as folder:
        yield folder


def keep(home: Home, made: Image, folder: str) -> Image:
    """Put `folder`'s disk.qcow2 into the catalogue as `made`; Conflict if there is one already."""
    absent(home, made.name)
    target = _folder(home, made.name)
    os.makedirs(os.path.dirname(target), mode=0o711, exist_ok=True)
    fresh = f"{folder}/image"
    os.mkdir(fresh, 0o755)
    os.rename(f"{folder}/{DISK}", f"{fresh}/{DISK}")
    os.chmod(f"{fresh}/{DISK}", 0o444)
    os.chown(f"{fresh}/{DISK}", os.geteuid(), os.getegid())
    with open(f"{fresh}/image.json", "wb") as file:
        file.write(msgspec.json.encode(made))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.rename(fresh, target)
    except OSError as error:
        raise Conflict(f"the disk image {made.name} is there already") from error
    return _load(target)


def remove(home: Home, name: str) -> None:
    """Remove an image; who uses it is the caller's to know."""
    image(home, name)
    with work(home) as folder:
        os.rename(_folder(home, name), f"{folder}/image")


def sweep(home: Home) -> None:
    """Forget what an engine that was killed had begun."""
    # Should an mmdebstrap have lost its namespace, nothing that is mounted there is entered.
    command = ["rm", "-rf", "--one-file-system", "--", home.in_root("machines", "work")]
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
