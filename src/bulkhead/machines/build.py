"""A tree of files becomes a bootable disk: GPT, an EFI system partition, an ext4 root.

    1 MiB      EFI system partition (FAT16)   systemd-boot, its entry, kernel, initramfs
    97 MiB …   root (ext4)                    grows at the first boot when the disk has grown

Kernel and initramfs lie where kernel-install(8) puts them, so that the disk's own package manager
replaces them later. No loop device and no mount is used: mke2fs(8) fills the file system from the
tree, the rest is written here.
"""

import glob
import os
import re
import subprocess
import uuid
from dataclasses import dataclass

from bulkhead.errors import Invalid, Unavailable, Unsupported
from bulkhead.machines import fat, gpt

ESP_BYTES = 96 << 20
_LOADER = "usr/lib/systemd/boot/efi/systemd-bootx64.efi"
DISTRIBUTION = "debian"
"""What kernel-install(8) calls the entries of this system (its entry token)."""
_LEAST_FREE = 64 << 20
_MAKE_S = 1800.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What a disk calls itself, made of a seed so that the same seed gives the same disk."""

    seed: str

    def uuid(self, what: str) -> uuid.UUID:
        """The identity of one part."""
        return uuid.uuid5(uuid.NAMESPACE_URL, f"bulkhead:{self.seed}:{what}")


def command_line(root: uuid.UUID) -> str:
    """The kernel's: the last console is the one that the system's own messages go to."""
    return f"root=PARTUUID={root} ro quiet console=tty0 console=ttyS0,115200"


def disk(tree: str, path: str, size: int, identity: Identity, moment: int) -> None:
    """Write the disk `path` of `size` bytes with the system in `tree`.

    Unsupported if mke2fs is missing, Invalid if there is no kernel or it does not fit, Unavailable
    with mke2fs's words if that fails.
    """
    size = size // gpt.ALIGNMENT * gpt.ALIGNMENT
    first = gpt.ALIGNMENT + ESP_BYTES
    root_bytes = size - first - gpt.TAIL
    if root_bytes < _LEAST_FREE:
        raise Invalid(f"a bootable disk of {size >> 20} MiB has no room for a system")
    partitions = (
        gpt.Partition(gpt.ESP, identity.uuid("esp"), "EFI", gpt.ALIGNMENT, ESP_BYTES),
        gpt.Partition(gpt.LINUX_ROOT, identity.uuid("root"), "root", first, root_bytes),
    )
    files = _boot_files(tree, command_line(identity.uuid("root")))
    serial = identity.uuid("fat").int & 0xFFFFFFFF
    with open(path, "xb") as out:
        out.truncate(size)
        gpt.write(out, size, identity.uuid("disk"), partitions)
        fat.write(
            out, files, size=ESP_BYTES, label="EFI", serial=serial, moment=moment,
            offset=gpt.ALIGNMENT,
        )  # fmt: skip
    _ext4(tree, path, first, root_bytes, identity, moment)


def _boot_files(tree: str, options: str) -> dict[str, bytes]:
    kernels = sorted(glob.glob(f"{tree}/boot/vmlinuz-*"))
    if not kernels:
        raise Invalid("the system has no kernel: include a linux-image package")
    version = os.path.basename(kernels[-1]).removeprefix("vmlinuz-")
    place = f"{DISTRIBUTION}/{version}"
    entry = (
        f"title      {_pretty_name(tree)}\nversion    {version}\n"
        f"options    {options}\nlinux      /{place}/linux\n"
        f"initrd     /{place}/initrd.img-{version}\n"
    )
    loader = _read(f"{tree}/{_LOADER}")
    return {
        "EFI/BOOT/BOOTX64.EFI": loader,
        "EFI/systemd/systemd-bootx64.efi": loader,
        "loader/loader.conf": b"timeout 0\nconsole-mode keep\n",
        "loader/entries.srel": b"type1\n",
        f"loader/entries/{DISTRIBUTION}-{version}.conf": entry.encode(),
        f"{place}/linux": _read(kernels[-1]),
        f"{place}/initrd.img-{version}": _read(f"{tree}/boot/initrd.img-{version}"),
    }


def _pretty_name(tree: str) -> str:
    text = _read(f"{tree}/etc/os-release").decode("utf-8", "replace")
    match = re.search(r'^PRETTY_NAME="([^"\n]+)"', text, re.MULTILINE)
    return match[1] if match else "Linux"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise Invalid(f"the system to boot lacks {error.filename}") from error


def _ext4(tree: str, path: str, first: int, size: int, identity: Identity, moment: int) -> None:
    own = identity.uuid("ext4")
    settings = f"offset={first},lazy_itable_init=1,lazy_journal_init=1,hash_seed={own},nodiscard"
    command = [
        "mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-U", str(own),
        "-E", settings, "-d", tree, path, f"{size >> 10}k",
    ]  # fmt: skip
    environment = {**os.environ, "E2FSPROGS_FAKE_TIME": str(moment), "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_MAKE_S,
            check=False,
        )
    except FileNotFoundError:
        raise Unsupported("mke2fs is missing: apt-get install e2fsprogs") from None
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"mke2fs did not end within {_MAKE_S:g} s") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        text = said[-1] if said else f"exit code {done.returncode}"
        if "allocate" in text or "No space" in text or "no free" in text:
            raise Invalid(f"the system does not fit on the disk: give a larger --size ({text})")
        raise Unavailable(f"mke2fs: {text}")
