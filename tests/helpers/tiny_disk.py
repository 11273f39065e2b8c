"""Disks with a system of one sector (tiny_boot.S), as raw files, in other formats, as an OVA."""

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

SOURCE = Path(__file__).with_name("tiny_boot.S")
SIZE = 8 << 20

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


def raw(path: Path, text: str = "tiny") -> Path:
    """A disk that says "BOOT n TEXT"."""
    built = path.with_suffix(".o")
    subprocess.run(["as", "--32", "-o", built, SOURCE], check=True)
    flat = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
    subprocess.run([*flat, "-o", path, built], check=True)
    built.unlink()
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(text.encode() + b"\0")
        file.truncate(SIZE)
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
