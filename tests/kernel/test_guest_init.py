"""The guest's init as process 1 of a plain namespace: set-up, streams, terminals, exec, ends."""

import errno
import os
import signal
import struct
from pathlib import Path

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import CONTEXT, Mode, Type
from bulkhead.errors import CommandNotFound
from bulkhead.linux import namespaces
from bulkhead.linux.program import Fd, Program
from tests.helpers.guest_rig import Guest, simple

MAIN = 1
AT_FDCWD = -100


def test_hello_is_answered_with_its_nonce() -> None:
    with Guest() as guest:
        answer = guest.hello(b"0123456789abcdef")
        assert answer.payload.startswith(b"0123456789abcdef" + os.uname().release.encode() + b"\0")
        assert answer.arg == frames.VERSION


def test_output_end_and_exit_code() -> None:
    with Guest() as guest:
        guest.run(MAIN, simple("sh", "-c", "echo out; echo err >&2; exit 7"), Mode.PIPES)
        assert os.waitstatus_to_exitcode(guest.finish(MAIN)) == 7
        assert guest.output(MAIN) == b"out\n"
        assert guest.output(MAIN, 2) == b"err\n"
        kinds = [f.type for f in guest.frames if f.id == MAIN]
        assert kinds.index(Type.STARTED) < kinds.index(Type.OUT) < kinds.index(Type.EXITED)


def test_input_and_its_end() -> None:
    with Guest() as guest:
        guest.run(MAIN, simple("cat"), Mode.PIPES)
        guest.send(frames.encode(Type.STDIN, MAIN, 0, b"hello"))
        guest.send(frames.encode(Type.STDIN_EOF, MAIN))
        assert guest.finish(MAIN) == 0
        assert guest.output(MAIN) == b"hello"
        assert sum(f.arg for f in guest.find(Type.GUEST_CREDIT, MAIN)) == 5


def test_a_signal_ends_it() -> None:
    with Guest() as guest:
        guest.run(MAIN, simple("sleep", "1000"), Mode.PIPES)
        guest.wait_for(Type.STARTED, MAIN)
        guest.send(frames.encode(Type.SIGNAL, MAIN, signal.SIGTERM))
        assert os.waitstatus_to_exitcode(guest.finish(MAIN)) == -signal.SIGTERM


def test_set_up_runs_in_order_in_inits_own_namespaces(tmp_path: Path) -> None:
    first, second = Program(), Program()
    first.call("mount", "mount", "t", str(tmp_path), "tmpfs", 0, None)
    second.call("make", "mkdirat", AT_FDCWD, f"{tmp_path}/made", 0o755)
    with Guest() as guest:
        guest.send(
            frames.run(10, first.compile().data, Mode.SETUP)
            + frames.run(11, second.compile().data, Mode.SETUP)
            + frames.run(MAIN, simple("ls", str(tmp_path)), Mode.PIPES)
        )
        guest.wait_for(Type.DONE, 10)
        guest.wait_for(Type.DONE, 11)
        assert guest.finish(MAIN) == 0
        assert guest.output(MAIN) == b"made\n"
    assert not list(tmp_path.iterdir())


def test_a_failed_set_up_stops_what_follows() -> None:
    program = Program()
    program.call("fine", "getpid")
    program.call("enter nothing", "chdir", "/no/such/place")
    compiled = program.compile()
    with Guest() as guest:
        guest.run(10, compiled.data, Mode.SETUP)
        guest.run(MAIN, simple("true"), Mode.PIPES)
        error = frames.failure(guest.wait_for(Type.FAILED, 10), compiled.steps)
        assert (error.step, error.errno) == ("enter nothing", errno.ENOENT)
        assert guest.wait_for(Type.FAILED, MAIN).arg == errno.ECANCELED
        guest.hello()
        guest.run(MAIN, simple("true"), Mode.PIPES)
        assert guest.finish(MAIN) == 0


def test_a_missing_program_is_named() -> None:
    program = Program()
    program.exec("execute", ["/bin/no-such", "/usr/bin/no-such"], ["no-such"], [])
    compiled = program.compile()
    with Guest() as guest:
        guest.run(MAIN, compiled.data, Mode.PIPES)
        error = frames.failure(guest.wait_for(Type.FAILED, MAIN), compiled.steps)
        assert isinstance(error, CommandNotFound)
        assert str(error) == 'exec: "no-such": executable file not found in $PATH'


def terminal(*argv: str) -> bytes:
    """A program on a new terminal."""
    program = Program()
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    master = program.call("open", "openat", AT_FDCWD, "/dev/ptmx", flags, 0)
    program.call("unlock", "ioctl", master, 0x40045431, struct.pack("=i", 0))
    slave = program.call("slave", "ioctl", master, 0x5441, flags)
    program.send_fd("send", "pty", master)
    program.call("session", "setsid")
    program.call("control", "ioctl", slave, 0x540E, 0)
    for number in range(3):
        program.call("stream", "dup3", slave, number, 0)
    program.close("close")
    program.exec("execute", [f"/usr/bin/{argv[0]}", f"/bin/{argv[0]}"], argv, [])
    return program.compile().data


def test_a_terminal_has_its_size_and_passes_keys() -> None:
    with Guest() as guest:
        script = "stty size; read line; stty size; echo got $line"
        guest.run(MAIN, terminal("sh", "-c", script), Mode.TERMINAL, rows=30, columns=100)
        guest.wait_for(Type.STARTED, MAIN)
        guest.send(frames.resize(MAIN, 40, 120))
        guest.send(frames.encode(Type.STDIN, MAIN, 0, b"key\r"))
        assert guest.wait_for(Type.EXITED, MAIN).arg == 0
        guest.wait_for(Type.EOF, MAIN, 1)
        shown = guest.output(MAIN)
        assert b"40 120\r\ngot key\r\n" in shown
        assert shown.startswith((b"30 100\r\n", b"40 120\r\n", b"key"))


def test_exec_joins_by_the_context() -> None:
    flags = namespaces.NEWPID | namespaces.NEWNS | namespaces.NEWUTS
    main = Program()
    for number in range(3):
        main.call("stream", "dup3", Fd(number), number, 0)
    main.call("name", "sethostname", "inside", 6)
    main.exec("execute", ["/usr/bin/sleep", "/bin/sleep"], ["sleep", "1000"], [])
    joined = Program()
    for number in range(3):
        joined.call("stream", "dup3", Fd(number), number, 0)
    joined.call("enter", "setns", Fd(CONTEXT), flags)
    joined.fork("enter the pid namespace")
    joined.exec(
        "execute", ["/usr/bin/sh", "/bin/sh"], ["sh", "-c", "uname -n; echo $$; exit 3"], []
    )
    with Guest() as guest:
        guest.run(MAIN, main.compile().data, Mode.PIPES, clone_flags=flags)
        guest.wait_for(Type.STARTED, MAIN)
        for identity in range(2, 12):
            guest.run(identity, joined.compile().data, Mode.PIPES, context=MAIN)
        for identity in range(2, 12):
            assert os.waitstatus_to_exitcode(guest.finish(identity)) == 3
            name, pid = guest.output(identity).split()
            assert name == b"inside" and int(pid) > 1
        guest.send(frames.encode(Type.SIGNAL, MAIN, signal.SIGKILL))
        assert os.waitstatus_to_exitcode(guest.finish(MAIN)) == -signal.SIGKILL
        guest.run(20, joined.compile().data, Mode.PIPES, context=MAIN)
        assert guest.wait_for(Type.FAILED, 20).arg == errno.ESRCH


def test_output_waits_for_credit() -> None:
    total = frames.WINDOW + 200_000
    with Guest() as guest:
        guest.run(MAIN, simple("head", "-c", str(total), "/dev/zero"), Mode.PIPES)
        while len(guest.output(MAIN)) < frames.WINDOW:
            guest.receive()
        assert len(guest.output(MAIN)) == frames.WINDOW
        assert not guest.find(Type.EOF, MAIN)
        guest.send(frames.credit(MAIN, 1, 100_000))
        while len(guest.output(MAIN)) < frames.WINDOW + 100_000:
            guest.receive()
        guest.send(frames.credit(MAIN, 1, 150_000))
        assert guest.finish(MAIN) == 0
        assert len(guest.output(MAIN)) == total


def test_errors_are_not_held_up_by_output() -> None:
    script = "head -c 1000000 /dev/zero & echo error >&2; wait"
    with Guest() as guest:
        guest.run(MAIN, simple("sh", "-c", script), Mode.PIPES)
        while guest.output(MAIN, 2) != b"error\n" or len(guest.output(MAIN)) < frames.WINDOW:
            guest.receive()
        assert not guest.find(Type.EXITED, MAIN)


def test_a_large_program_comes_in_fragments(tmp_path: Path) -> None:
    program = Program()
    text = b"x" * 300_000
    flags = os.O_WRONLY | os.O_CREAT
    fd = program.call("make", "openat", AT_FDCWD, f"{tmp_path}/file", flags, 0o600)
    program.call("fill", "write", fd, text, len(text))
    with Guest() as guest:
        guest.run(10, program.compile().data, Mode.SETUP)
        guest.wait_for(Type.DONE, 10)
    assert (tmp_path / "file").stat().st_size == len(text)


def test_files_are_read() -> None:
    with Guest() as guest:
        guest.send(frames.encode(Type.READ, 5, 0, b"/proc/self/comm"))
        assert guest.wait_for(Type.DATA, 5).payload == b"bulkhead-guest\n"
        guest.send(frames.encode(Type.READ, 6, 0, b"/no/such"))
        assert guest.wait_for(Type.DATA, 6).arg == errno.ENOENT
        guest.send(frames.encode(Type.READ, 7, 0, b"/dev/zero"))
        assert len(guest.wait_for(Type.DATA, 7).payload) == frames.FRAME_MAX


def test_a_hello_forgets_everything() -> None:
    with Guest() as guest:
        guest.run(MAIN, simple("sleep", "1000"), Mode.PIPES)
        guest.wait_for(Type.STARTED, MAIN)
        guest.hello()
        guest.run(MAIN, simple("echo", "again"), Mode.PIPES)
        assert guest.finish(MAIN) == 0
        assert guest.output(MAIN) == b"again\n"


def test_shutdown_ends_everything() -> None:
    with Guest() as guest:
        guest.run(MAIN, simple("sh", "-c", "trap '' TERM; sleep 1000"), Mode.PIPES)
        guest.wait_for(Type.STARTED, MAIN)
        guest.send(frames.shutdown(0, ["/no/such"]))
        while not guest.ended:
            guest.receive()


FUSE_INIT, FUSE_GETATTR = 26, 3
IN = struct.Struct("<IIQQIIII")


def _reply(unique: int, body: bytes, error: int = 0) -> bytes:
    return struct.pack("<IiQ", 16 + len(body), error, unique) + body


def _answer(request: bytes) -> bytes:
    """A file system of one directory, 4242 bytes long."""
    _, opcode, unique, *_ = IN.unpack_from(request)
    if opcode == FUSE_INIT:
        head = struct.pack("<IIIIHHIIHHI", 7, 31, 65536, 0, 16, 12, 65536, 1, 16, 0, 0)
        return _reply(unique, head.ljust(64, b"\0"))
    if opcode == FUSE_GETATTR:
        attributes = struct.pack("<QQQQQQIIIIIIIIII", 1, 4242, 8, *[0] * 6, 0o40755, 2, *[0] * 5)
        return _reply(unique, struct.pack("<QII", 0, 0, 0) + attributes)
    return _reply(unique, b"", -errno.ENOSYS)


def test_files_come_over_the_channel(tmp_path: Path) -> None:
    with Guest() as guest:
        guest.send(frames.fuse_mount(100, str(tmp_path)))
        guest.wait_for(Type.DONE, 100)
        guest.run(MAIN, simple("stat", "-c", "%s %F", str(tmp_path)), Mode.PIPES)
        while not guest.find(Type.EXITED, MAIN):
            for request in guest.find(Type.FUSE, 100):
                guest.frames.remove(request)
                guest.send(frames.encode(Type.FUSE_REPLY, 100, 0, _answer(request.payload)))
            guest.receive()
        assert guest.finish(MAIN) == 0
        assert guest.output(MAIN) == b"4242 directory\n"


def test_a_mount_that_fails_is_told(tmp_path: Path) -> None:
    with Guest() as guest:
        guest.send(frames.fuse_mount(100, f"{tmp_path}/missing"))
        assert guest.wait_for(Type.FAILED, 100).arg == errno.ENOENT
