"""QEMU's command line, kernels in bzImages, and the rate of the time stamp counter."""

import gzip
import itertools
import lzma
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.boundaries.guest import depmod
from bulkhead.boundaries.vmm import acceleration, bzimage, qemu
from bulkhead.errors import Invalid, Unsupported
from bulkhead.store import codecs

MACHINE = qemu.Machine(kernel="/kernel", initramfs="/initramfs", channel_fd=9, tsc_khz=2_600_000)
ELF = b"\x7fELF" + bytes(range(256)) * 40 + b"abcd" * 500


def option(words: list[str], name: str) -> list[str]:
    return [value for key, value in itertools.pairwise(words) if key == name]


def bz(payload: bytes, size: int) -> bytes:
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 16, len(payload) + 4)
    return bytes(head) + bytes(16) + payload + struct.pack("<I", size)


def lz4_literals(data: bytes) -> bytes:
    more = len(data) - 15
    block = b"\xf0" + b"\xff" * (more // 255) + bytes([more % 255]) + data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def test_a_machine_has_the_fewest_devices() -> None:
    words = qemu.argv(MACHINE)
    assert option(words, "-device") == [
        "virtio-serial-device,max_ports=2,bus=virtio-mmio-bus.23",
        "virtserialport,chardev=channel,name=bulkhead.0",
        "virtio-balloon-device,free-page-reporting=on,deflate-on-oom=on,bus=virtio-mmio-bus.22",
    ]
    assert {"-nodefaults", "-no-user-config"} <= set(words)
    assert option(words, "-sandbox")[0].startswith("on,")
    assert "-mon" not in words
    assert "-incoming" not in words


def test_cards_and_disks_have_their_places() -> None:
    disks = (qemu.Disk("/disks/0", True), qemu.Disk("/disks/1", False), None)
    machine = qemu.Machine(
        "/kernel", "/initramfs", 9, disks, cards=(qemu.Card(11, "02:00:00:00:00:01"),)
    )
    words = qemu.argv(machine)
    assert option(words, "-netdev") == [
        "tap,id=net0,fd=11", "hubport,id=spare0,hubid=0", "hubport,id=spare1,hubid=1",
    ]  # fmt: skip
    first, second, empty = option(words, "-blockdev")
    assert "filename=/disks/0,read-only=on" in first
    assert "filename=/disks/1,read-only=off" in second
    assert empty.startswith("driver=null-co")
    devices = [word for word in option(words, "-device") if "bus." in word]
    buses = [word.rpartition("bus.")[2].partition(",")[0] for word in devices]
    assert buses == ["23", "22", "21", "20", "19", "18", "17", "16"]
    assert qemu.disk_names(2) == ["/dev/vda", "/dev/vdb"]


def test_kvm_uses_the_host_processor_and_tcg_its_clock() -> None:
    kvm = qemu.Machine("/kernel", "/initramfs", 9, accelerator="kvm", vcpus=2)
    assert option(qemu.argv(kvm), "-cpu") == ["host"]
    assert "tsc" not in qemu.command_line(kvm)
    assert "nr_cpus=2" in qemu.command_line(kvm)
    assert "tsc_early_khz=2600000" in qemu.command_line(MACHINE)
    assert "mitigations" not in qemu.command_line(MACHINE)


@pytest.mark.parametrize(
    ("machine", "error"),
    [
        (qemu.Machine("/k", "/i", 9, memory_bytes=32 << 20), Invalid),
        (qemu.Machine("/k", "/i", 9, vcpus=0), Invalid),
        (qemu.Machine("/k", "/i", 9, accelerator="magic"), Invalid),
        (qemu.Machine("/k", "/i", 9, [qemu.Disk("/a,readonly=off", True)]), Invalid),
        (qemu.Machine("/k", "/i", 9, [qemu.Disk("/d", True)] * 24), Unsupported),
    ],
)
def test_what_cannot_be_is_refused(machine: qemu.Machine, error: type[Exception]) -> None:
    with pytest.raises(error):
        qemu.argv(machine)


@pytest.mark.parametrize(
    "payload",
    [
        gzip.compress(ELF),
        lzma.compress(ELF),
        lzma.compress(ELF, format=lzma.FORMAT_ALONE),
        codecs.zstd.compress(ELF),
        lz4_literals(ELF),
    ],
)
def test_the_kernel_in_a_bzimage(payload: bytes) -> None:
    assert bzimage.extract(bz(payload, len(ELF))) == ELF
    with pytest.raises(Invalid):
        bzimage.extract(bz(payload, len(ELF) - 1))
    with pytest.raises(Invalid):
        bzimage.extract(bz(payload[: len(payload) // 2], len(ELF)))


def test_lz4_copies_from_behind() -> None:
    # "\x7fELF", then 4 + 11 bytes from 4 behind, which overlap themselves; then a last literal.
    block = b"\x4b\x7fELF\x04\x00" + b"\x10!"
    payload = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block
    wanted = (b"\x7fELF" * 5)[:19] + b"!"
    assert bzimage.extract(bz(payload, len(wanted))) == wanted


def test_an_elf_image_needs_no_extraction() -> None:
    assert bzimage.extract(ELF) is ELF
    assert not bzimage.has_pvh_entry(ELF)


@given(st.binary(max_size=2000))
def test_rubbish_is_refused(data: bytes) -> None:
    for image in (data, bz(data, 100), bz(b"\x02\x21\x4c\x18" + data, 100)):
        with pytest.raises((Invalid, Unsupported)):
            bzimage.extract(image)


def test_the_rate_of_the_counter(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: AMD EPYC\ncpu MHz\t\t: 2596.120\n")
    assert acceleration.tsc_khz(str(info)) == 2_596_120
    info.write_text("model name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\ncpu MHz\t\t: 3100.0\n")
    assert acceleration.tsc_khz(str(info)) == 2_200_000


def test_no_kvm_without_its_node(tmp_path: Path) -> None:
    found = acceleration.acceleration(str(tmp_path / "kvm"))
    assert found.name == "tcg"
    assert "does not exist" in found.reason


def test_dependencies_of_modules(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    info = b"\x7fELF\0license=GPL\0depends=%s\0retpoline=Y\0"
    (tmp_path / "kernel/virtio-net.ko").write_bytes(info % b"virtio_ring,built-in")
    (tmp_path / "kernel/virtio_ring.ko.xz").write_bytes(lzma.compress(info % b""))
    depmod.write(str(tmp_path))
    assert (tmp_path / "modules.dep").read_text().splitlines() == [
        "kernel/virtio-net.ko: kernel/virtio_ring.ko.xz",
        "kernel/virtio_ring.ko.xz: ",
    ]
    (tmp_path / "modules.dep").unlink()
    (tmp_path / "kernel/bad.ko").write_bytes(b"\x7fELF")
    with pytest.raises(Invalid):
        depmod.write(str(tmp_path))
    assert not list(tmp_path.glob("modules.dep*"))
