"""Disks with a system of one sector (tiny_boot.S): raw, in other formats, as an OVA, on discs."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from bulkhead.machines import fat
from tests.helpers import packages

SOURCE = Path(__file__).with_name("tiny_boot.S")
INSTALLER = SOURCE.with_name("tiny_install.S")
SIZE = 8 << 20
INSTALLED = 3 * 512
"""Bytes of a system that the installer copies; it expects them behind its own sector."""
DISC_PACKAGES = (
    "xorriso", "libisoburn1", "libburn4", "libisofs6", "libjte2",
    "grub-common", "grub-efi-amd64-bin",
)  # fmt: skip

OVF = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
<References><File ovf:id="file1" ovf:href="disk.vmdk"/></References>
<DiskSection><Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:capacity="8388608"/></DiskSection>
<VirtualSystem ovf:id="tiny"><VirtualHardwareSection>
<Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item>
<Item><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>
</VirtualHardwareSection></VirtualSystem></Envelope>
"""


def missing() -> str:
    """Why there are no such disks here, "" if there are."""
    for program, package in (("as", "binutils"), ("ld", "binutils"), ("qemu-img", "qemu-utils")):
        if shutil.which(program) is None:
            return f"{program} is missing (apt-get install {package})"
    return ""


def _assembled(source: Path, path: Path, *options: str) -> None:
    built = path.with_suffix(".o")
    subprocess.run(["as", "--32", *options, "-o", built, source], check=True)
    flat = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
    subprocess.run([*flat, "-o", path, built], check=True)
    built.unlink()


def raw(path: Path, text: str = "tiny", *, reads: int = 0) -> Path:
    """A disk that says "BOOT n TEXT", and "READ" after as many `reads` of 4 KiB."""
    _assembled(SOURCE, path, "--defsym", f"READS={reads}")
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(text.encode() + b"\0")
        file.truncate(SIZE)
    return path


def installer(path: Path, text: str) -> Path:
    """A disc that writes such a system onto the first disk, says "INSTALLED", switches off."""
    disk = raw(path.with_suffix(".disk"), text)
    folder = path.with_suffix(".files")
    folder.mkdir()
    _assembled(INSTALLER, folder / "boot.img")
    with (folder / "boot.img").open("ab") as file, disk.open("rb") as system:
        file.write(system.read(INSTALLED))
    disk.unlink()
    disc(path, folder, "-b", "boot.img", "-no-emul-boot", "-boot-load-size", "4")
    return path


def uefi_disc(path: Path, text: str) -> Path:
    """A disc whose UEFI program says `text` on the first serial line, and switches off."""
    tools = packages.unpacked(*DISC_PACKAGES)
    folder = path.with_suffix(".files")
    folder.mkdir()
    (folder / "grub.cfg").write_text(
        f"serial --unit=0\nterminal_output serial\necho '{text}'\nsleep 1\nhalt\n"
    )
    command = [
        f"{tools}/usr/bin/grub-mkimage", "-d", f"{tools}/usr/lib/grub/x86_64-efi",
        "-O", "x86_64-efi", "-p", "/", "-c", f"{folder}/grub.cfg", "-o", f"{folder}/grub.efi",
        "serial", "terminal", "echo", "sleep", "halt", "normal",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    program = {"EFI/BOOT/BOOTX64.EFI": (folder / "grub.efi").read_bytes()}
    with (folder / "efi.img").open("w+b") as file:
        fat.write(file, program, size=fat.LEAST_BYTES, label="EFI", serial=1, moment=0)
    return disc(path, folder, "-e", "efi.img", "-no-emul-boot")


def disc(path: Path, folder: Path, *boot: str) -> Path:
    """An ISO 9660 image of `folder`, with xorriso's options of what boots."""
    tools = packages.unpacked(*DISC_PACKAGES)
    command = [f"{tools}/usr/bin/xorriso", "-as", "mkisofs", "-quiet", "-o", str(path), *boot]
    subprocess.run(
        [*command, str(folder)],
        check=True,
        capture_output=True,
        env={**os.environ, "LD_LIBRARY_PATH": packages.libraries(tools)},
    )
    shutil.rmtree(folder)
    return path


def converted(source: Path, target: Path, kind: str, *options: str) -> Path:
    """The raw disk `source` in another format."""
    command = ["qemu-img", "convert", "-f", "raw", "-O", kind, *options, str(source), str(target)]
    subprocess.run(command, check=True)
    return target


def ova(source: Path, target: Path, description: str = OVF) -> Path:
    """The raw disk `source` as an appliance."""
    disk = target.with_suffix(".vmdk")
    converted(source, disk, "vmdk", "-o", "subformat=streamOptimized")
    data = disk.read_bytes()
    disk.unlink()
    sums = f"SHA256(disk.vmdk)= {hashlib.sha256(data).hexdigest()}\n"
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in (
            ("tiny.ovf", description.encode()), ("tiny.mf", sums.encode()), ("disk.vmdk", data),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target
