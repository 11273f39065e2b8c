"""A guest that attacks the file server: names that lead out, numbers that are none, floods."""

import errno
import os
import random
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Type
from tests.helpers import fuse_client as fuse
from tests.helpers.fuse_client import ROOT, Fuse

NATIVE = Path(__file__).resolve().parents[2] / "native"
MEMORY_KB = 64 << 10
HANDLES = 8192
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """The server with address and undefined-behaviour checks, if this compiler has them."""
    out = tmp_path_factory.mktemp("sanitized")
    probe = subprocess.run(
        ["gcc", "-fsanitize=address,undefined", "-x", "c", "-", "-o", str(out / "probe")],
        input=b"int main(void) { return 0; }",
        capture_output=True,
        check=False,
    )
    if probe.returncode or subprocess.run([str(out / "probe")], check=False).returncode:
        print("no sanitizers here, fuzzing the plain program:", probe.stderr.decode()[-200:])
        return None
    made = f"{out}/bulkhead-files"
    command = ["make", "-s", "-C", str(NATIVE), f"OUT={out}", "SANITIZE=1", made]
    subprocess.run(command, check=True)
    return str(out)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = tmp_path / "outer" / "source"
    found.mkdir(parents=True)
    (found / "file").write_text("inside")
    (found / "directory").mkdir()
    (tmp_path / "outer" / "secret").write_text("secret")
    (found / "link").symlink_to("../secret")
    (found / "absolute").symlink_to("/etc/shadow")
    (found / "up").symlink_to("..")
    os.mkfifo(found / "fifo")
    return found


@pytest.mark.parametrize(
    "name",
    [b"..", b".", b"", b"../secret", b"directory/../../secret", b"/etc/shadow", b"a/b", b"n" * 256],
)
def test_a_name_is_one_component(source: Path, checked: str | None, name: bytes) -> None:
    with Fuse(source, checked) as guest:
        wanted = errno.ENAMETOOLONG if len(name) > 255 else errno.EINVAL
        zero = name + b"\0"
        rename = struct.pack("<Q", ROOT)
        assert guest.ask(fuse.LOOKUP, ROOT, zero)[0] == wanted
        assert guest.ask(fuse.UNLINK, ROOT, zero)[0] == wanted
        assert guest.ask(fuse.MKDIR, ROOT, struct.pack("<II", 0o777, 0) + zero)[0] == wanted
        assert guest.ask(fuse.SYMLINK, ROOT, zero + b"target\0")[0] == wanted
        assert guest.ask(fuse.RENAME, ROOT, rename + b"file\0" + zero)[0] == wanted
        assert guest.ask(fuse.RENAME, ROOT, rename + zero + b"new\0")[0] == wanted
        create = struct.pack("<IIII", os.O_WRONLY | os.O_CREAT, 0o666, 0, 0)
        assert guest.ask(fuse.CREATE, ROOT, create + zero)[0] == wanted
        node = guest.look_up(b"file")
        assert guest.ask(fuse.LINK, ROOT, struct.pack("<Q", node) + zero)[0] == wanted
    assert sorted(os.listdir(source.parent)) == ["secret", "source"]


@pytest.mark.parametrize("name", [b"link", b"absolute", b"up"])
def test_links_are_told_and_never_followed(source: Path, checked: str | None, name: bytes) -> None:
    with Fuse(source, checked) as guest:
        node = guest.look_up(name)
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC):
            with pytest.raises(OSError, match="cannot be opened"):
                guest.open(node, flags)
        assert guest.ask(fuse.LOOKUP, node, b"secret\0")[0] == errno.ESTALE
        assert guest.ask(fuse.OPENDIR, node, struct.pack("<II", 0, 0))[0] == errno.ESTALE
        create = struct.pack("<IIII", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, 0, 0)
        assert guest.ask(fuse.CREATE, ROOT, create + name + b"\0")[0] == errno.EINVAL
        size = struct.pack("<IIQQQQQQIIIIIIII", 1 << 3, 0, 0, 0, 0, *(0,) * 11)
        assert guest.ask(fuse.SETATTR, node, size)[0] == errno.EINVAL
        target = os.readlink(source / name.decode()).encode()
        assert guest.ask(fuse.READLINK, node)[1] == target
    assert (source.parent / "secret").read_text() == "secret"


def test_a_file_that_becomes_a_link_is_stale(source: Path, checked: str | None) -> None:
    with Fuse(source, checked) as guest:
        node = guest.look_up(b"file")
        inner = guest.look_up(b"directory")
        (source / "file").unlink()
        (source / "file").symlink_to("../secret")
        (source / "directory").rmdir()
        (source / "directory").symlink_to("..")
        with pytest.raises(OSError) as caught:
            guest.open(node)
        assert caught.value.errno == errno.ESTALE
        error, data = guest.ask(fuse.LOOKUP, inner, b"secret\0")
        assert error == errno.ESTALE and not data


def test_devices_are_not_made_and_queues_not_opened(source: Path, checked: str | None) -> None:
    with Fuse(source, checked) as guest:
        for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, 0):
            made = struct.pack("<IIII", kind | 0o666, os.makedev(1, 3), 0, 0) + b"device\0"
            assert guest.ask(fuse.MKNOD, ROOT, made)[0] == errno.EPERM
        with pytest.raises(OSError, match="cannot be opened"):
            guest.open(guest.look_up(b"fifo"))
        create = struct.pack("<IIII", os.O_WRONLY | os.O_CREAT, 0o666, 0, 0)
        assert guest.ask(fuse.CREATE, ROOT, create + b"fifo\0")[0] == errno.EINVAL
    assert not (source / "device").exists()


@pytest.mark.parametrize("name", [b"trusted.overlay.opaque", b"security.ima", b"system.x", b"user"])
def test_other_attributes_are_refused(source: Path, checked: str | None, name: bytes) -> None:
    with Fuse(source, checked) as guest:
        node = guest.look_up(b"file")
        data = struct.pack("<II", 1, 0) + name + b"\0" + b"y"
        assert guest.ask(fuse.SETXATTR, node, data)[0] == errno.EOPNOTSUPP
        data = struct.pack("<II", 100, 0) + name + b"\0"
        assert guest.ask(fuse.GETXATTR, node, data)[0] == errno.EOPNOTSUPP


def test_numbers_that_nobody_gave_are_none(source: Path, checked: str | None) -> None:
    with Fuse(source, checked) as guest:
        attr = struct.pack("<IIQ", 0, 0, 0)
        for node in (0, 2, 3, 1 << 20, (1 << 64) - 1):
            assert guest.ask(fuse.GETATTR, node, attr)[0] == errno.ESTALE
        handle = guest.open(guest.look_up(b"file"))
        assert guest.read(handle, 100) == (0, b"inside")
        for wrong in (0, handle + 1, handle + HANDLES, handle - HANDLES, (1 << 64) - 1):
            assert guest.read(wrong % (1 << 64), 100)[0] == errno.EBADF
        node = guest.look_up(b"directory")
        guest.send(guest.request(fuse.FORGET, node, struct.pack("<Q", 1 << 63)))
        assert guest.ask(fuse.GETATTR, node, attr)[0] == errno.ESTALE
        guest.send(guest.request(fuse.FORGET, ROOT, struct.pack("<Q", 1 << 63)))
        assert guest.ask(fuse.GETATTR, ROOT, attr)[0] == 0


def test_a_file_that_is_forgotten_while_it_is_open_stays_open(
    source: Path, checked: str | None
) -> None:
    with Fuse(source, checked) as guest:
        node = guest.look_up(b"file")
        handle = guest.open(node)
        guest.send(guest.request(fuse.FORGET, node, struct.pack("<Q", 5)))
        assert guest.read(handle, 6) == (0, b"inside")
        release = struct.pack("<QIIQ", handle, 0, 0, 0)
        assert guest.ask(fuse.RELEASE, node, release)[0] == 0
        assert guest.ask(fuse.RELEASE, node, release)[0] == errno.EBADF


def test_as_many_are_forgotten_at_once_as_a_guest_reads(source: Path, checked: str | None) -> None:
    """The kernel fills what it is given to read, 1 MiB, when it drops what it had cached."""
    with Fuse(source, checked) as guest:
        node = guest.look_up(b"file")
        count = 1 << 16
        forgets = struct.pack("<II", count, 0) + struct.pack("<QQ", node, 1) * count
        guest.send(guest.request(fuse.BATCH_FORGET, 0, forgets))
        attr = struct.pack("<IIQ", 0, 0, 0)
        assert guest.ask(fuse.GETATTR, node, attr)[0] == errno.ESTALE
        assert guest.ask(fuse.GETATTR, ROOT, attr)[0] == 0


def test_a_directory_that_is_forgotten_may_lose_what_was_known_of_it(
    source: Path, checked: str | None
) -> None:
    """An exchange takes the last known file out of it and puts another in."""
    (source / "directory" / "inner").write_text("inner")
    with Fuse(source, checked) as guest:
        directory, file = guest.look_up(b"directory"), guest.look_up(b"file")
        inner = guest.look_up(b"inner", directory)
        guest.send(guest.request(fuse.FORGET, directory, struct.pack("<Q", 1)))
        exchange = struct.pack("<QII", ROOT, 2, 0) + b"inner\0file\0"
        assert guest.ask(fuse.RENAME2, directory, exchange)[0] == 0
        assert guest.look_up(b"file") == inner
        assert guest.look_up(b"inner", guest.look_up(b"directory")) == file
    assert (source / "file").read_text() == "inner"


def test_open_files_are_bounded(source: Path, checked: str | None) -> None:
    with Fuse(source, checked) as guest:
        node = guest.look_up(b"file")
        opened = 0
        with pytest.raises(OSError) as caught:
            while opened <= HANDLES:
                guest.open(node)
                opened += 1
        assert caught.value.errno in (errno.ENFILE, errno.EMFILE)
        assert guest.ask(fuse.GETATTR, ROOT, struct.pack("<IIQ", 0, 0, 0))[0] == 0


def test_many_files_need_few_descriptors(source: Path, checked: str | None) -> None:
    for number in range(2500):
        (source / "directory" / str(number)).touch()
    with Fuse(source, checked) as guest:
        directory = guest.look_up(b"directory")
        nodes = [guest.look_up(str(n).encode(), directory) for n in range(2500)]
        attr = struct.pack("<IIQ", 0, 0, 0)
        assert {guest.ask(fuse.GETATTR, node, attr)[0] for node in nodes} == {0}
        assert len(os.listdir(f"/proc/{guest.server.pid}/fd")) < 2100
        (source / "directory").rename(source / "elsewhere")
        error = guest.ask(fuse.GETATTR, nodes[0], attr)[0]
        assert error in (0, errno.ESTALE)
        assert guest.look_up(b"0", guest.look_up(b"elsewhere")) == nodes[0]
        assert guest.ask(fuse.GETATTR, nodes[0], attr)[0] == 0


def _ends(guest: Fuse) -> bool:
    try:
        while True:
            guest.receive()
    except (ConnectionError, OSError):
        return True


NONSENSE: list[Callable[[Fuse], bytes]] = [
    lambda guest: b"\xff" * 64,
    lambda guest: frames.HEADER.pack(70000, Type.FUSE, 0, 0, 100, 0),
    lambda guest: frames.encode(Type.FUSE, 999, 0, guest.request(fuse.GETATTR, 1, bytes(16))),
    lambda guest: frames.encode(Type.OUT, 100, 0, b"x"),
    lambda guest: frames.encode(Type.FUSE, 100, 0, b"short"),
    lambda guest: frames.encode(Type.FUSE, 100, 0, guest.request(fuse.GETATTR, 1, b"") + b"more"),
    lambda guest: frames.encode(Type.FUSE, 100, 0, bytes(1 << 21)),
]


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_what_is_no_request_ends_it(
    source: Path, checked: str | None, nonsense: Callable[[Fuse], bytes]
) -> None:
    with Fuse(source, checked) as guest:
        try:
            guest.sock.sendall(nonsense(guest))
            guest.sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert _ends(guest)
        assert guest.server.wait(60) in (0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_requests_at_random_harm_nothing(source: Path, checked: str | None, seed: int) -> None:
    """Every opcode with bytes that are nearly right; the server stays and the outside as it was."""
    chance = random.Random(seed)
    names = [b"file\0", b"directory\0", b"link\0", b"..\0", b"x\0y\0", b"", b"new\0other\0"]
    before = sorted(os.listdir(source.parent))
    with Fuse(source, checked) as guest:
        nodes = [ROOT, guest.look_up(b"file"), guest.look_up(b"directory"), guest.look_up(b"link")]
        handles = [guest.open(nodes[1], os.O_RDWR) for _ in range(3)]
        silent = {2, 36, 42}
        for _ in range(2500):
            opcode = chance.choice([*range(1, 53), chance.randrange(1 << 32)])
            words = [
                chance.choice(
                    [0, 1, 2, *nodes, *handles, 1 << 31, (1 << 63) - 1, chance.getrandbits(64)]
                )
                for _ in range(chance.randrange(9))
            ]
            payload = struct.pack(f"<{len(words)}Q", *words) + chance.choice(names)
            if opcode in (37, 32) or (opcode == 47 and len(words) > 1):
                continue  # SETLKW may wait, which is tested elsewhere; fallocate fills the disk
            if opcode in (4, 16, 43):
                words = [min(word, 1 << 20) for word in words]
                payload = struct.pack(f"<{len(words)}Q", *words) + chance.choice(names)
            node = chance.choice([*nodes, 0, 5, chance.getrandbits(64)])
            guest.send(guest.request(opcode, node, payload[: chance.randrange(len(payload) + 1)]))
            if opcode not in silent:
                guest.receive()
        assert guest.ask(fuse.GETATTR, ROOT, struct.pack("<IIQ", 0, 0, 0))[0] == 0
        with open(f"/proc/{guest.server.pid}/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        if checked is None:
            assert int(peak.split()[1]) < MEMORY_KB
    assert sorted(os.listdir(source.parent)) == before
    assert (source.parent / "secret").read_text() == "secret"
