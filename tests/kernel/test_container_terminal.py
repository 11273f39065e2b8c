"""Terminals of containers: the pair is the container's own, its master comes out."""

import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundary.seam import Stdio
from bulkhead.errors import LaunchFailed
from bulkhead.keeper.holder import ADOPT, HELLO
from bulkhead.keeper.launching import MESSAGE
from bulkhead.oci.runtime import Mount, Process, Spec, User
from tests.helpers.container_lab import Lab, cannot_run, default_spec
from tests.helpers.waiting import DEADLINE_S

WHY_NOT = cannot_run()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no containers here: {WHY_NOT}")


class Masters:
    """A connection to the holder that is given terminals' masters, as a keeper's is."""

    def __init__(self, run: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(DEADLINE_S)
        folder = os.open(run, os.O_PATH)
        try:
            self.sock.connect(f"/proc/self/fd/{folder}/holder.sock")
        finally:
            os.close(folder)
        self.sock.send(MESSAGE.pack(HELLO, 1, 1, 0))
        self.sock.recv(1 << 17)

    def take(self) -> int:
        """The next master; whoever takes it closes it."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 17, 16)
            assert data, "the holder has ended"
            if MESSAGE.unpack_from(data)[0] == ADOPT and fds:
                for extra in fds[1:]:
                    os.close(extra)
                return fds[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("terminal")) as made:
        yield made


@pytest.fixture
def masters(lab: Lab) -> Iterator[Masters]:
    made = Masters(lab.home.run)
    yield made
    made.sock.close()


def read_all(master: int) -> str:
    """Everything until the last process closes its side (EIO)."""
    data = b""
    while True:
        ready, _, _ = select.select([master], [], [], DEADLINE_S)
        assert ready, f"nothing more came after {data!r}"
        try:
            part = os.read(master, 65536)
        except OSError:
            return data.decode().replace("\r\n", "\n")
        if not part:
            return data.decode().replace("\r\n", "\n")
        data += part


def read_until(master: int, text: str) -> str:
    """What came until `text` was there."""
    data = b""
    while text.encode() not in data:
        ready, _, _ = select.select([master], [], [], DEADLINE_S)
        assert ready, f"{text!r} did not come after {data!r}"
        data += os.read(master, 65536)
    return data.decode()


def start(lab: Lab, masters: Masters, script: str, user: User | None = None) -> tuple[str, str]:
    """(identity, output) of a shell script with a terminal of 30 by 100 characters."""
    spec: Spec = default_spec(["sh", "-c", script])
    assert spec.process is not None
    if user is not None:
        spec.process.user = user
    container = lab.create(spec)
    lab.do(container.start(Stdio(terminal=True, rows=30, columns=100)))
    master = masters.take()
    try:
        output = read_all(master)
    finally:
        os.close(master)
    assert lab.wait(container.bundle.id) == 0
    lab.do(container.delete())
    return container.bundle.id, output


def test_terminal_of_a_container(lab: Lab, masters: Masters) -> None:
    _, output = start(
        lab, masters, "tty; stty size; ls -l /dev/console | cut -c1; echo to-console > /dev/console"
    )
    assert output == "/dev/pts/0\n30 100\nc\nto-console\n"


def test_terminal_belongs_to_the_user(lab: Lab, masters: Masters) -> None:
    _, output = start(lab, masters, "stat -c '%u %g %a' $(tty); echo ok > $(tty)", User(1000, 1000))
    assert output == "1000 5 620\nok\n"


def test_terminal_is_controlling(lab: Lab, masters: Masters) -> None:
    # A loop: a signal that comes before a child is waited for is handled after it.
    script = "trap 'echo interrupted; exit 0' INT; echo ready; while :; do sleep 0.05; done"
    spec = default_spec(["sh", "-c", script])
    container = lab.create(spec)
    lab.do(container.start(Stdio(terminal=True, rows=24, columns=80)))
    master = masters.take()
    try:
        read_until(master, "ready")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("=4H", 50, 60, 0, 0))
        os.write(master, b"\x03")
        assert "interrupted" in read_all(master)
    finally:
        os.close(master)
    assert lab.wait(container.bundle.id) == 0
    lab.do(container.delete())


def test_terminal_of_exec(lab: Lab, masters: Masters) -> None:
    running = lab.start(["sleep", "1000"])
    wanted = Process(
        args=["sh", "-c", "tty; stty size; id -u; stat -c %u $(tty)"],
        env=["PATH=/bin"],
        user=User(1000, 1000),
    )
    container = running.container
    lab.do(container.exec("tty", wanted, Stdio(terminal=True, rows=12, columns=34)))
    master = masters.take()
    try:
        assert read_all(master) == "/dev/pts/0\n12 34\n1000\n1000\n"
    finally:
        os.close(master)
    assert lab.wait(f"{container.bundle.id}/tty") == 0
    running.kill()


def test_terminal_of_exec_is_not_fooled(lab: Lab, masters: Masters, tmp_path: Path) -> None:
    """A container that has put something else at /dev/pts/ptmx gets no exec with a terminal."""
    (tmp_path / "ptmx").write_text("bait")

    def change(spec: Spec) -> None:
        spec.mounts = [m for m in spec.mounts if m.destination != "/dev/pts"]
        spec.mounts.append(Mount("/dev/pts", str(tmp_path), "bind", ["bind"]))

    running = lab.start(["sleep", "1000"], change)
    wanted = Process(args=["sh"], env=["PATH=/bin"])
    with pytest.raises(LaunchFailed) as caught:
        lab.do(running.container.exec("tty", wanted, Stdio(terminal=True)))
    assert caught.value.step == "verify the terminal's file system"
    running.kill()
