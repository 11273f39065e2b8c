"""`vm bootstrap debian:bookworm`: a bootable disk straight from the distribution's packages.

    resolve  apt decides which packages (images/apt.py)    → or a lock file says it
    fetch    every .deb, its hash verified
    install  mmdebstrap from a local repository of exactly these files, into a directory
    finish   what a machine needs and a container does not: fstab, boot entries, cloud-init
    disk     GPT, EFI system partition, ext4 (build.py); no loop device, no mount, no root left

What is not in the packages is in this module.
"""

import glob
import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from bulkhead.errors import Conflict, Corrupt, Invalid, Unavailable
from bulkhead.images import apt, bootstrap
from bulkhead.images.progress import Progress, status
from bulkhead.machines import build

PACKAGES = (
    "linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd-sysv", "systemd-boot",
    "systemd-resolved", "udev", "dbus", "kmod", "iproute2", "netbase", "e2fsprogs", "fdisk",
    "cloud-init", "cloud-guest-utils", "openssh-server", "sudo",
)  # fmt: skip
"""Beside what is essential: a kernel and what it takes to be a guest that cloud-init sets up."""
DEFAULT_BYTES = 4 << 30
USER = "debian"
_SERVICES = "systemd-networkd systemd-resolved"
_LEFT_OUT = ("man", "doc", "locale", "info", "lintian")
_MODULES = (
    "virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "ahci", "nvme", "mptspi", "vmw_pvscsi",
    "ext4",
)  # fmt: skip
"""Those that a root may need, here and on other hypervisors."""
_CLOUD = """\
# Written by bulkhead vm bootstrap: the seed is a disk labelled cidata, and nothing else is asked.
datasource_list: [NoCloud, None]
network: {config: disabled}
ssh_genkeytypes: [ed25519]
cloud_init_modules: [seed_random, bootcmd, write-files, growpart, resizefs, disk_setup, mounts,
  set_hostname, update_hostname, update_etc_hosts, ca-certs, users-groups, ssh]
cloud_config_modules: [ssh-import-id, keyboard, set-passwords, apt-configure, ntp, timezone, runcmd]
cloud_final_modules: [package-update-upgrade-install, write-files-deferred, scripts-vendor,
  scripts-per-once, scripts-per-boot, scripts-per-instance, scripts-user, final-message,
  power-state-change]
"""
_NETWORK = """\
# Written by bulkhead vm bootstrap: every Ethernet card asks by DHCP, whichever it is today.
[Match]
Type=ether
Kind=!*

[Network]
DHCP=yes

[DHCPv4]
UseDomains=yes
"""
_ONLINE = """\
[Service]
ExecStart=
ExecStart=/lib/systemd/systemd-networkd-wait-online --any --timeout=20
"""
_FILES = {
    # Neighbours have names of one word.
    "etc/systemd/resolved.conf.d/bulkhead.conf": "[Resolve]\nResolveUnicastSingleLabel=yes\n",
    "etc/systemd/network/80-ethernet.network": _NETWORK,
    "etc/systemd/system/systemd-networkd-wait-online.service.d/bulkhead.conf": _ONLINE,
    "etc/fstab": "LABEL=root / ext4 errors=remount-ro 0 1\n"
    "PARTLABEL=EFI /boot/efi vfat umask=0077,noauto,x-systemd.automount 0 0\n",
    "etc/machine-id": "",
    "etc/default/locale": "LANG=C.UTF-8\n",
    "etc/cloud/ds-identify.cfg": "policy: enabled\ndatasource: NoCloud\n",
    "etc/cloud/cloud.cfg.d/90_bulkhead.cfg": _CLOUD,
}
_EARLY = {
    "etc/initramfs-tools/conf.d/bulkhead": "MODULES=list\nCOMPRESS=zstd\n",
    "etc/initramfs-tools/modules": "\n".join(_MODULES) + "\n",
    "etc/kernel/entry-token": f"{build.DISTRIBUTION}\n",
}
"""Read by the kernel package's own scripts."""


class Lock(msgspec.Struct, kw_only=True):
    """Everything that the disk's contents depend on."""

    version: int = 1
    reference: str
    suite: str
    architecture: str
    include: list[str]
    sources: list[apt.Source]
    epoch: int
    packages: list[apt.Package]


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; `lock` is a file's path, or "". `size` of the disk, in bytes."""

    name: str
    include: Sequence[str] = ()
    mirror: str | None = None
    lock: str = ""
    size: int = DEFAULT_BYTES


def make(request: Request, work: str, disk: str, progress: Progress) -> Lock:
    """Write the raw disk `disk`; `work` is an empty directory on a file system with room.

    Unsupported if a tool is missing; Conflict if the lock is for something else.
    """
    apt.need("mmdebstrap", "apt-get", "apt-config", "dpkg-deb")
    distribution, _, suite = request.name.partition(":")
    if not suite or distribution != "debian":
        raise Invalid(f"{request.name!r}: disks are made of debian:SUITE (debian:bookworm)")
    apt.check_words(suite, request.include)
    with ExitStack() as undo:
        lock = _read_lock(request)
        architecture = "amd64"
        sources = lock.sources if lock else apt.sources_for(distribution, suite, request.mirror)
        tool = apt.Apt(work, architecture, sources)
        if lock is None:
            progress(status(f"Reading package lists for {suite}"))
            epoch = tool.update()
            wanted = sorted({*PACKAGES, *request.include})
            lock = Lock(
                reference=request.name, suite=suite, architecture=architecture,
                include=sorted(request.include), sources=sources, epoch=epoch,
                packages=tool.resolve(wanted),
            )  # fmt: skip
        size = sum(package.size for package in lock.packages)
        progress(status(f"Fetching {len(lock.packages)} packages, {size / 1e6:.1f} MB"))
        files = tool.download(lock.packages)
        bootstrap.repository(work, lock, files)
        progress(status("Installing packages"))
        tree = f"{work}/tree"
        undo.callback(_clear, tree)
        _install(lock, work, tree, progress)
        _finish(tree, lock)
        progress(status("Writing the disk"))
        build.disk(tree, disk, request.size, build.Identity(_seed(lock)), lock.epoch)
        if request.lock:
            _write_lock(request.lock, lock)
            progress(status(f"Locked in {request.lock}"))
    return lock


def _clear(tree: str) -> None:
    subprocess.run(["rm", "-rf", "--one-file-system", tree], check=True)


def _seed(lock: Lock) -> str:
    return f"{lock.reference}:{lock.epoch}:{len(lock.packages)}"


def _read_lock(request: Request) -> Lock | None:
    if not request.lock:
        return None
    try:
        with open(request.lock, "rb") as file:
            lock = msgspec.json.decode(file.read(), type=Lock)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{request.lock} is no lock file of a disk: {error}") from error
    if lock.version != 1:
        raise Invalid(f"{request.lock} is of another version ({lock.version})")
    apt.check_words(lock.suite, [*lock.include, *(package.name for package in lock.packages)])
    for package in lock.packages:
        if not re.fullmatch(r"[0-9a-f]{64}", package.sha256) or "\n" in package.uri:
            raise Corrupt(f"{request.lock}: the entry of {package.name} is damaged")
    if lock.reference != request.name or (
        request.include and lock.include != sorted(request.include)
    ):
        raise Conflict(f"{request.lock} locks {lock.reference}: remove it, or ask for the same")
    return lock


def _write_lock(path: str, lock: Lock) -> None:
    scratch = f"{path}.{os.getpid()}.new"
    with open(scratch, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(lock), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(scratch, path)


def _install(lock: Lock, work: str, tree: str, progress: Progress) -> None:
    early = f"{work}/early"
    _write(early, _EARLY)
    names = ",".join(package.name for package in lock.packages)
    command = [
        "mmdebstrap", "--variant=minbase", "--format=directory", "--skip=output/dev",
        f"--architectures={lock.architecture}", f"--include={names}",
        '--aptopt=APT::Sandbox::User "root"', "--aptopt=APT::Install-Recommends false",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT),
        f"--setup-hook=cp -r {early}/. '$1'".replace("'", '"'),
        f'--customize-hook=chroot "$1" systemctl enable {_SERVICES}',
        lock.suite, tree, f"deb [trusted=yes] copy:{work}/debs ./",
    ]  # fmt: skip
    for _ in bootstrap.tar(command, lock.epoch, work, progress):
        raise Unavailable("mmdebstrap wrote something to its standard output")


def _finish(tree: str, lock: Lock) -> None:
    lines = "".join(source.line(signed=False) + "\n" for source in lock.sources)
    options = build.command_line(build.Identity(_seed(lock)).uuid("root"))
    own = {"etc/apt/sources.list": lines, "etc/kernel/cmdline": options + "\n"}
    _write(tree, _FILES | own)
    os.makedirs(f"{tree}/boot/efi", exist_ok=True)
    for pattern in ("etc/ssh/ssh_host_*", "etc/apt/apt.conf.d/99mmdebstrap", "etc/hostname",
                    "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "var/lib/dbus/machine-id"):  # fmt: skip
        for path in glob.glob(f"{tree}/{pattern}"):
            os.unlink(path)
    resolv = f"{tree}/etc/resolv.conf"
    if os.path.lexists(resolv):
        os.unlink(resolv)
    os.symlink("../run/systemd/resolve/stub-resolv.conf", resolv)


def _write(tree: str, files: dict[str, str]) -> None:
    for place, text in files.items():
        path = f"{tree}/{place}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
