"""The command line and the SDK against the real engine: what fingers do all day."""

import asyncio
import contextlib
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from bulkhead import AsyncClient, Client
from bulkhead.errors import Conflict, NotFound
from tests.helpers.installation import TIMEOUT_S, Installation, installation
from tests.helpers.waiting import until


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    folder = tmp_path_factory.mktemp("cli")
    with installation(folder) as here:
        here.load_busybox(folder)
        yield here


@pytest.mark.parametrize(
    ("argv", "code", "err"),
    [
        (["true"], 0, ""),
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "sleep 1000 & kill -9 $!; wait $!"], 137, ""),
        (["nope"], 127, "executable file not found in $PATH"),
        (["/etc"], 126, "permission denied"),
    ],
)
def test_exit_codes(here: Installation, argv: list[str], code: int, err: str) -> None:
    done = here.cli("run", "--rm", "busybox", *argv)
    assert done.code == code
    assert err in done.err
    assert here.cli("ps", "-aq").out == ""


def test_streams_and_stdin(here: Installation) -> None:
    done = here.cli("run", "--rm", "-i", "busybox", "sh", "-c", "cat; echo no >&2", stdin="yes\n")
    assert (done.code, done.out, done.err) == (0, "yes\n", "no\n")


def test_a_day(here: Installation, tmp_path: Path) -> None:
    cli = here.cli
    identity = cli("run", "-d", "--name", "web", "-m", "64m", "busybox", "sleep", "1000").ok().line
    try:
        assert cli("ps", "-q", "--no-trunc").ok().line == identity
        cli("run", "--name", "web", "busybox").failed(125, 'The container name "/web" is already')
        assert cli("exec", "web", "echo", "in").ok().out == "in\n"
        assert cli("exec", "-i", "web", "cat", stdin="abc").ok().out == "abc"
        cli("exec", "web", "sh", "-c", "exit 9").failed(9)
        cli("exec", "web", "nope").failed(127, "executable file not found")
        (tmp_path / "file").write_text("text")
        cli("cp", str(tmp_path / "file"), "web:/tmp/copy").ok()
        assert cli("exec", "web", "cat", "/tmp/copy").ok().out == "text"
        cli("cp", "web:/tmp/copy", str(tmp_path / "back")).ok()
        assert (tmp_path / "back").read_text() == "text"
        assert "A /tmp/copy" in cli("diff", "web").ok().out.splitlines()
        shown = cli("inspect", "-f", "{{.State.Status}} {{.HostConfig.Memory}}", "web").ok()
        assert shown.line == f"running {64 << 20}"
        assert "sleep 1000" in cli("top", "web").ok().out
        assert "web" in cli("stats", "--no-stream", "web").ok().out
        cli("pause", "web").ok()
        cli("unpause", "web").ok()
        cli("rename", "web", "site").ok()
        image = cli("commit", "site", "mine:1").ok().line
        assert image.startswith("sha256:")
        assert "mine" in cli("images").ok().out
        cli("rmi", "mine:1").ok()
        cli("rm", "site").failed(1)
        cli("stop", "-t", "0", "site").ok()
        assert cli("wait", "site").ok().line == "137"
    finally:
        cli("rm", "-f", identity)
    assert cli("ps", "-aq").ok().out == ""


def test_one_line_for_what_is_wrong(here: Installation) -> None:
    for argv, code in (
        (["rm", "nope"], 1), (["start", "nope"], 1), (["logs", "nope"], 1), (["rmi", "nope"], 1),
        (["run", "--rm", "-v", "nope/:x", "busybox"], 125), (["network", "rm", "nope"], 1),
        (["run", "--rm", "--network", "nope", "busybox"], 125), (["volume", "rm", "nope"], 1),
        (["run", "--rm", "--mount", "type=bind,src=/nope,dst=/x", "busybox"], 125),
        (["run", "--rm", "-m", "1k", "busybox"], 125),
    ):  # fmt: skip
        done = here.cli(*argv)
        assert done.code == code, (argv, done)
        lines = done.err.splitlines()
        assert lines[0].startswith("bulkhead: "), (argv, done)
        assert len(lines) == 1 or lines[1:] == [f"See 'bulkhead {argv[0]} --help'."], (argv, done)


class Terminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, here: Installation, *argv: str) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.seen = b""
        self.process = subprocess.Popen(
            here.command(*argv), stdin=slave, stdout=slave, stderr=slave,
            env=here.environment(), start_new_session=True,
        )  # fmt: skip

    def expect(self, text: bytes) -> None:
        """Read until `text` was seen."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.seen:
            assert time.monotonic() < deadline, (text, self.seen)
            if select.select([self.master], [], [], 1.0)[0]:
                self.seen += os.read(self.master, 4096)

    def send(self, text: bytes) -> None:
        os.write(self.master, text)

    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def ended(self) -> int:
        code = self.process.wait(TIMEOUT_S)
        assert termios.tcgetattr(self.slave) == self.before, "the terminal is not as it was"
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def terminal(here: Installation, *argv: str) -> Iterator[Terminal]:
    on = Terminal(here, *argv)
    try:
        yield on
    finally:
        on.close()


def test_a_shell_on_a_terminal(here: Installation) -> None:
    with terminal(here, "run", "--rm", "-it", "busybox", "sh") as on:
        until(on.raw, "the terminal is raw")
        on.send(b"stty size; echo $((40+2))\n")
        on.expect(b"33 111")
        on.expect(b"42")
        ioctl(on.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 99, 0, 0))
        on.process.send_signal(signal.SIGWINCH)
        on.send(b"while [ \"$(stty size)\" != '44 99' ]; do :; done; echo re''sized\n")
        on.expect(b"resized")
        on.send(b"exit 5\n")
        assert on.ended() == 5


def test_detach_and_attach(here: Installation) -> None:
    with terminal(here, "run", "-it", "--name", "shell", "busybox", "sh") as on:
        until(on.raw, "the terminal is raw")
        on.send(b"echo fir''st\n")
        on.expect(b"first")
        on.send(b"\x10\x11")
        assert on.ended() == 0
    assert here.cli("ps", "--format", "{{.Names}}").ok().line == "shell"
    with terminal(here, "attach", "shell") as on:
        until(on.raw, "the terminal is raw")
        on.send(b"echo sec''ond; exit 3\n")
        on.expect(b"second")
        assert on.ended() == 3
    here.cli("rm", "-f", "shell").ok()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_terminal_is_restored_whatever_ends_the_command(
    here: Installation, number: signal.Signals
) -> None:
    name = f"ends-{number}"
    with terminal(here, "run", "-it", "--name", name, "busybox", "sh") as on:
        until(on.raw, "the terminal is raw")
        on.send(b"echo rea''dy\n")
        on.expect(b"ready")
        on.process.send_signal(number)
        on.process.wait(TIMEOUT_S)
        until(lambda: termios.tcgetattr(on.slave) == on.before, "the terminal is as it was")
    here.cli("rm", "-f", name).ok()


def test_interrupts_reach_the_workload(here: Installation) -> None:
    script = "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    with here.popen("run", "--rm", "busybox", "sh", "-c", script) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"got\n"
            assert process.wait(TIMEOUT_S) == 9
        finally:
            process.kill()  # nothing, once it has ended


def test_start_attached(here: Installation) -> None:
    here.cli("create", "--name", "job", "busybox", "sh", "-c", "echo again; exit 4").ok()
    done = here.cli("start", "-a", "job")
    assert (done.code, done.out) == (4, "again\n")
    here.cli("rm", "job").ok()


def client(here: Installation) -> Client:
    return Client(root=str(here.root), run=str(here.run))


def test_sdk(here: Installation, tmp_path: Path) -> None:
    with client(here) as sdk:
        assert sdk.ping()
        done = sdk.run("busybox", ["sh", "-c", "cat; echo e >&2; exit 3"], stdin=b"in")
        assert (done.exit_code, done.stdout, done.stderr) == (3, b"in", b"e\n")
        with pytest.raises(Conflict, match="exit code 3: e"):
            done.check()
        with sdk.start("busybox", "sleep 1000", name="sdk", memory_bytes=64 << 20) as box:
            assert box.exec("echo hello").check().stdout == b"hello\n"
            assert box.exec(["cat"], stdin=b"x" * 300_000).stdout == b"x" * 300_000
            box.put("f", b"content", "/tmp")
            assert box.get("/tmp/f") == b"content"
            assert box.inspect().state.running
            assert [c.names for c in sdk.containers.list()] == [["/sdk"]]
            with pytest.raises(Conflict):
                box.remove()
        with pytest.raises(NotFound):
            sdk.containers.get("sdk")
        with sdk.start("busybox", ["sh", "-c", "echo 1; echo 2"]) as box:
            assert box.wait() == 0
            assert b"".join(data for _, data in box.logs(follow=True)) == b"1\n2\n"
        assert sdk.containers.list(everything=True) == []
        made = sdk.containers.create("busybox", "true")
        made.start()
        assert made.wait() == 0
        made.remove()
        volume = sdk.volumes.create("sdk-volume")
        sdk.run("busybox", ["sh", "-c", "echo v > /v/f"], volumes={"sdk-volume": "/v"}).check()
        assert sdk.run("busybox", "cat /v/f", volumes={volume.name: "/v"}).stdout == b"v\n"
        sdk.volumes.remove("sdk-volume")


def test_async_sdk(here: Installation) -> None:
    async def main() -> None:
        async with AsyncClient(root=str(here.root), run=str(here.run)) as sdk:
            found = await asyncio.gather(*(sdk.run("busybox", f"echo {n}") for n in range(8)))
            assert [outcome.stdout for outcome in found] == [b"%d\n" % n for n in range(8)]
            async with await sdk.start("busybox", ["sh", "-c", "echo a; sleep 1000"]) as box:
                async for _, data in box.logs(follow=True):
                    assert data == b"a\n"
                    break
                assert (await box.exec("true")).exit_code == 0
            assert await sdk.containers.list(everything=True) == []

    asyncio.run(main())
