"""Disk images from elsewhere: what format they are in, and that they are one file.

The format is found here, by the file's first bytes, and told to qemu-img; nothing is ever probed
by QEMU, for a raw disk's content is the guest's and could pretend to be another format. An image
that refers to further files (backing files, external data, several extents) is refused.
"""

import os
import struct
from typing import BinaryIO

from bulkhead.errors import Invalid

FORMATS = {"qcow2": "qcow2", "raw": "raw", "vmdk": "vmdk", "vhdx": "vhdx", "vdi": "vdi",
           "vhd": "vpc", "vpc": "vpc"}  # fmt: skip
"""What people call a format: what qemu-img calls it."""
MOST_BYTES = 8 << 40
"""Of a disk as its machine sees it."""
_QCOW2_EXTERNAL_DATA = 1 << 2
_QCOW2_KNOWN = 0b11111
_VDI_MAGIC = 0xBEDA107F
_VMDK_DESCRIPTOR = b"# Disk DescriptorFile"
_VMDK_KINDS = ("monolithicSparse", "streamOptimized")


def detect(path: str) -> str:
    """qemu-img's name of the format of `path`, which is one self-contained image.

    Invalid, in words, for what is not; "raw" for everything of no known format.
    """
    with open(path, "rb") as file:
        head = file.read(512)
        if head.startswith(b"QFI\xfb"):
            _qcow2(head, path)
            return "qcow2"
        if head.startswith(b"KDMV"):
            _vmdk(file, head, path)
            return "vmdk"
        if head.startswith(b"vhdxfile"):
            return "vhdx"
        if head[64:68] == struct.pack("<I", _VDI_MAGIC):
            return "vdi"
        if head.startswith(_VMDK_DESCRIPTOR):
            raise Invalid(
                f"{path} only describes a disk whose data are in other files: convert it to a "
                "monolithic image, or import an .ova"
            )
        for magic, name in ((b"QED\0", "qed"), (b"COWD", "vmdk3"), (b"conectix", "dynamic vhd")):
            if head.startswith(magic) and name != "dynamic vhd":
                raise Invalid(f"{path} is of the old format {name}: convert it to qcow2 first")
            if head.startswith(magic):
                return "vpc"
        size = os.fstat(file.fileno()).st_size
        if size >= 1024:
            file.seek(size - 512)
            if file.read(8) == b"conectix":
                return "vpc"
    return "raw"


def _qcow2(head: bytes, path: str) -> None:
    version, backing = struct.unpack_from(">IQ", head, 4)
    if version not in (2, 3):
        raise Invalid(f"{path} is qcow2 of version {version}: only 2 and 3 are known")
    if backing:
        raise Invalid(
            f"{path} lies on another file (a backing file): make it whole with qemu-img convert"
        )
    features = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
    if features & _QCOW2_EXTERNAL_DATA:
        raise Invalid(f"{path} keeps its data in another file (external data file)")
    if features & ~_QCOW2_KNOWN:
        raise Invalid(f"{path} needs features of qcow2 that are not known here")
    if struct.unpack_from(">I", head, 32)[0]:
        raise Invalid(f"{path} is encrypted")


def _vmdk(file: BinaryIO, head: bytes, path: str) -> None:
    first, size = struct.unpack_from("<QQ", head, 28)
    if not first or not size or size > 128:
        raise Invalid(f"{path} has no description of itself: convert it to qcow2 first")
    file.seek(first * 512)
    text = file.read(size * 512).partition(b"\0")[0].decode("utf-8", "replace")
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    fields = {key.strip().lower(): value.strip().strip('"') for key, value in fields.items()}
    if fields.get("createtype") not in _VMDK_KINDS:
        raise Invalid(
            f"{path} is a vmdk of type {fields.get('createtype', 'unknown')}: its data are in "
            f"several files; supported are {' and '.join(_VMDK_KINDS)}"
        )
    if fields.get("parentcid", "ffffffff").lower() != "ffffffff":
        raise Invalid(f"{path} lies on another file (parentCID): make it whole first")
    extents = [
        line for line in text.splitlines() if line.startswith(("RW ", "RDONLY ", "NOACCESS "))
    ]
    if len(extents) != 1:
        raise Invalid(f"{path} has {len(extents)} extents, not one")


def format_named(name: str) -> str:
    """qemu-img's word for a format that somebody named; Invalid if it is not supported."""
    try:
        return FORMATS[name.lower()]
    except KeyError:
        raise Invalid(
            f"unknown disk format {name!r}; there are {', '.join(sorted(FORMATS))}"
        ) from None
