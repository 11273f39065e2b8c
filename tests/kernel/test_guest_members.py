"""Further workloads of a guest, as its monitor keeps them; the guest is a PID namespace."""

import fcntl
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Mode, Type
from bulkhead.boundaries.guest.link import Link
from bulkhead.errors import LaunchFailed, Unavailable
from bulkhead.keeper.holder import program_path
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Compiled, Program
from tests.helpers.guest_rig import simple
from tests.helpers.monitor_rig import Monitor, main_frames
from tests.helpers.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as made:
        made.report()
        yield made


def _link(tmp_path: Path) -> Link:
    return Link(os.getpid(), place=str(tmp_path / "guest.sock"))


def _making(path: Path) -> Program:
    program = Program()
    program.call("make it", "mkdirat", AT_FDCWD, str(path), 0o755)
    return program


def _lock(path: Path) -> OwnedFd:
    fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
    fcntl.flock(int(fd), fcntl.LOCK_EX)
    return fd


def _free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _join(connection: Link, tmp_path: Path, farewell: Compiled, *more: int) -> None:
    with _lock(tmp_path / "lock") as lock:
        connection.become_member(farewell, [int(lock), *more])


def _client(connection: Link, tmp_path: Path, program: bytes) -> subprocess.Popen[bytes]:
    script = tmp_path / "member-frames"
    script.write_bytes(frames.run(frames.MAIN, program, Mode.PIPES))
    fd = connection.fileno()
    words = ["exec", "--channel", str(fd), "--member", "--frames", str(script)]
    command = [program_path("bulkhead-monitor"), *words]
    return subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL)


def test_its_farewell_comes_after_its_end(monitor: Monitor, tmp_path: Path) -> None:
    with _link(tmp_path) as connection:
        _join(connection, tmp_path, _making(tmp_path / "bye").compile())
        connection.set_up(_making(tmp_path / "begun"))
        assert (tmp_path / "begun").exists() and not (tmp_path / "bye").exists()
        client = _client(connection, tmp_path, simple("sh", "-c", "exit 6"))
    assert client.wait() == 6
    assert (tmp_path / "bye").exists() and _free(tmp_path / "lock")


def test_a_lost_connection_ends_it_and_says_farewell(monitor: Monitor, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    with _link(tmp_path) as connection:
        _join(connection, tmp_path, _making(tmp_path / "bye").compile())
        client = _client(connection, tmp_path, simple("sh", "-c", f"> {alive}; exec sleep 1000"))
    until(alive.exists, "it runs")
    assert not _free(tmp_path / "lock")
    client.kill()
    client.wait()
    until(lambda: _free(tmp_path / "lock"), "its disk is free")
    assert (tmp_path / "bye").exists()


def test_while_its_farewell_fails_its_disk_is_nobodys(monitor: Monitor, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with _link(tmp_path) as connection:
        _join(connection, tmp_path, _making(tmp_path / "there").compile())
    with _link(tmp_path) as connection:  # by now that one's has been said
        connection.set_up(_making(tmp_path / "later"))
    assert not _free(tmp_path / "lock")
    monitor.process.kill()
    until(lambda: _free(tmp_path / "lock"), "it ends with the guest")


def test_its_file_server_is_its_own(monitor: Monitor, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    ours, theirs = socket.socketpair()
    with ours, _link(tmp_path) as connection:
        _join(connection, tmp_path, _making(tmp_path / "bye").compile(), theirs.fileno())
        theirs.close()
        connection.mount(100, str(tmp_path / "mnt"), "allow_other")
        head = frames.HEADER.unpack(ours.recv(frames.HEADER.size, socket.MSG_WAITALL))
        assert (head[1], head[4]) == (Type.FUSE, 100)  # FUSE_INIT, by the member's own number
        with pytest.raises(LaunchFailed):
            connection.mount(101, str(tmp_path / "nowhere"), "")
    until(lambda: _free(tmp_path / "lock"), "it is gone")
    with _link(tmp_path) as connection:
        connection.set_up(_making(tmp_path / "still"))
    assert monitor.process.poll() is None


def test_a_server_that_breaks_the_protocol_ends_its_member_alone(
    monitor: Monitor, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    with ours, _link(tmp_path) as connection:
        _join(connection, tmp_path, _making(tmp_path / "bye").compile(), theirs.fileno())
        theirs.close()
        ours.sendall(frames.encode(Type.FUSE_REPLY, 4711, 0, b"x"))
        until(lambda: _free(tmp_path / "lock"), "it is gone")
    with _link(tmp_path) as connection:
        connection.set_up(_making(tmp_path / "still"))
    assert monitor.process.poll() is None


def test_a_member_needs_a_lock(monitor: Monitor, tmp_path: Path) -> None:
    with _link(tmp_path) as connection, pytest.raises(Unavailable):
        connection.become_member(_making(tmp_path / "bye").compile(), [])
    with _link(tmp_path) as connection:
        connection.set_up(_making(tmp_path / "still"))
    assert not (tmp_path / "bye").exists()
