"""Disk images and appliances from elsewhere: what is taken, what is refused."""

import contextlib
import io
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Corrupt, Invalid
from bulkhead.machines import foreign, ova
from tests.helpers.tiny_disk import OVF


def qcow2(*, version: int = 3, backing: int = 0, features: int = 0, crypt: int = 0) -> bytes:
    head = b"QFI\xfb" + struct.pack(">IQIIQI", version, backing, 0, 16, 1 << 20, crypt)
    return head.ljust(72, b"\0") + struct.pack(">Q", features).ljust(440, b"\0")


def vmdk(text: str) -> bytes:
    head = b"KDMV" + struct.pack("<IIQQQQ", 1, 3, 2048, 128, 1, 2)
    return head.ljust(512, b"\0") + text.encode().ljust(1024, b"\0")


WHOLE = 'createType="monolithicSparse"\nparentCID=ffffffff\nRW 2048 SPARSE "disk.vmdk"\n'


def detect(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "disk"
    path.write_bytes(data)
    return foreign.detect(str(path))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (qcow2(), "qcow2"),
        (qcow2(version=2), "qcow2"),
        (vmdk(WHOLE), "vmdk"),
        (b"vhdxfile" + b"\0" * 512, "vhdx"),
        (b"<<< Oracle".ljust(64, b"\0") + struct.pack("<I", 0xBEDA107F), "vdi"),
        (b"\0" * 1024 + b"conectix".ljust(512, b"\0"), "vpc"),
        (b"\0" * 4096, "raw"),
        (b"", "raw"),
    ],
    ids=["qcow2", "qcow2 v2", "vmdk", "vhdx", "vdi", "vhd", "raw", "empty"],
)
def test_formats(tmp_path: Path, data: bytes, kind: str) -> None:
    assert detect(tmp_path, data) == kind


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (qcow2(backing=4096), "backing file"),
        (qcow2(features=4), "external data"),
        (qcow2(features=1 << 40), "not known"),
        (qcow2(version=4), "version 4"),
        (qcow2(crypt=1), "encrypted"),
        (vmdk(WHOLE.replace("monolithicSparse", "twoGbMaxExtentFlat")), "several files"),
        (vmdk(WHOLE.replace("ffffffff", "12345678")), "parentCID"),
        (vmdk(WHOLE + 'RW 1 FLAT "/etc/shadow" 0\n'), "extents"),
        (vmdk("")[:28] + b"\0" * 484, "no description"),
        (b'# Disk DescriptorFile\nRW 1 FLAT "/etc/shadow" 0\n', "other files"),
    ],
    ids=["backed", "external", "unknown", "new", "encrypted", "extents", "parent", "two", "bare",
         "described"],
)  # fmt: skip
def test_what_is_not_one_file_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        detect(tmp_path, data)


@given(st.binary(max_size=600), st.sampled_from([b"", b"QFI\xfb", b"KDMV", b"vhdxfile"]))
def test_garbage_has_a_format_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "disk"
    path.write_bytes((magic + data).ljust(512, b"\0"))
    with contextlib.suppress(Invalid):
        assert foreign.detect(str(path)) in set(foreign.FORMATS.values())


def appliance(path: Path, members: dict[str, bytes], **kinds: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.type = kinds.get(name.partition(".")[0], tarfile.REGTYPE)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_an_appliance_says_what_it_is(tmp_path: Path) -> None:
    path = appliance(tmp_path / "a.ova", {"a.ovf": OVF.encode(), "disk.vmdk": b"disk"})
    assert ova.is_ova(str(path))
    said = ova.unpack(str(path), str(tmp_path / "out"))
    assert (said.disk, said.memory_bytes, said.vcpus) == ("disk.vmdk", 64 << 20, 1)
    assert (tmp_path / "out").read_bytes() == b"disk"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "<!DOCTYPE x [<!ENTITY a 'b'>]>" + text, "document type"),
        (
            lambda text: "<?x <!-- ?><!DOCTYPE x [<!ENTITY a 'b'>]><?y --> ?>" + text,
            "document type",
        ),
        (lambda text: text.replace("<Disk ", "<Disk ovf:fileRef='file1'/><Disk "), "2 disks"),
        (lambda text: text.replace("disk.vmdk", "../../etc/shadow"), "not in it"),
        (lambda text: text[:200], "not XML"),
    ],
    ids=["entities", "hidden", "disks", "outside", "cut"],
)
def test_descriptions_that_are_refused(tmp_path: Path, change: object, words: str) -> None:
    assert callable(change)
    text = change(OVF)
    path = appliance(tmp_path / "a.ova", {"a.ovf": text.encode(), "disk.vmdk": b"disk"})
    with pytest.raises(Invalid, match=words):
        ova.unpack(str(path), str(tmp_path / "out"))


def test_members_that_are_refused(tmp_path: Path) -> None:
    path = appliance(tmp_path / "a.ova", {"a.ovf": OVF.encode(), "disk.vmdk": b""},
                     disk=tarfile.SYMTYPE)  # fmt: skip
    with pytest.raises(Invalid, match="plain file"):
        ova.unpack(str(path), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "c.ova", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.ovf"))
    with pytest.raises(Invalid, match="twice"):
        ova.unpack(str(tmp_path / "c.ova"), str(tmp_path / "out"))
    many = {"a.ovf": OVF.encode()} | {f"f{number}": b"" for number in range(100)}
    with pytest.raises(Invalid, match="members"):
        ova.unpack(str(appliance(tmp_path / "b.ova", many)), str(tmp_path / "out"))


def test_a_disk_that_is_not_the_manifests(tmp_path: Path) -> None:
    sums = b"SHA256(disk.vmdk)= " + b"0" * 64
    path = appliance(
        tmp_path / "a.ova", {"a.ovf": OVF.encode(), "a.mf": sums, "disk.vmdk": b"disk"}
    )
    with pytest.raises(Corrupt):
        ova.unpack(str(path), str(tmp_path / "out"))
