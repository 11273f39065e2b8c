"""The monitor between a workload's streams and a guest, with a guest that is only a namespace."""

import contextlib
import errno
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from bulkhead.boundaries.guest import frames
from bulkhead.boundaries.guest.frames import Mode, Type
from bulkhead.boundaries.guest.link import Link
from bulkhead.errors import CommandNotFound, LaunchFailed
from bulkhead.keeper.holder import program_path
from bulkhead.linux.program import Program
from tests.helpers.guest_rig import simple
from tests.helpers.monitor_rig import Monitor, main_frames, vmm_command
from tests.helpers.waiting import DEADLINE_S, until
from tests.kernel.test_guest_init import terminal


def test_streams_and_exit_code(tmp_path: Path) -> None:
    program = simple("sh", "-c", "cat; echo err >&2; exit 7")
    with Monitor(tmp_path, main_frames(program)) as monitor:
        assert monitor.report().type == Type.STARTED
        assert monitor.wait(b"hello") == (7, b"hello", b"err\n")
        detail = monitor.detail()
        assert (detail["reason"], detail["code"], detail["wait_status"]) == ("exited", 7, 7 << 8)


def test_a_signal_is_passed_on(tmp_path: Path) -> None:
    program = simple(
        "sh", "-c", "trap 'echo got; exit 3' USR1; echo ready; while :; do sleep 0.05; done"
    )
    with Monitor(tmp_path, main_frames(program)) as monitor:
        assert monitor.process.stdout is not None
        assert monitor.process.stdout.readline() == b"ready\n"
        monitor.process.send_signal(signal.SIGUSR1)
        assert monitor.wait()[:2] == (3, b"got\n")


def test_the_end_by_a_signal_is_told_as_shells_do(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("sh", "-c", "kill -9 $$"))) as monitor:
        assert monitor.wait()[0] == 128 + signal.SIGKILL
        assert monitor.detail()["wait_status"] == signal.SIGKILL


def test_the_workload_is_killed_by_a_signal_that_the_monitor_survives(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        monitor.process.send_signal(63)
        assert monitor.wait()[0] == 128 + signal.SIGKILL
        assert monitor.detail()["reason"] == "exited"


def test_much_output_and_input_come_whole(tmp_path: Path) -> None:
    size = 5_000_000
    data = os.urandom(1 << 20) * 5
    with Monitor(tmp_path, main_frames(simple("cat"))) as monitor:
        assert monitor.wait(data) == (0, data, b"")
    with Monitor(
        tmp_path / "2", main_frames(simple("head", "-c", str(size), "/dev/zero"))
    ) as monitor:
        code, out, _ = monitor.wait()
        assert (code, len(out)) == (0, size)


def test_output_that_nobody_reads_holds_up_only_the_workload(tmp_path: Path) -> None:
    program = simple("sh", "-c", "echo err >&2; head -c 3000000 /dev/zero; echo end >&2")
    with Monitor(tmp_path, main_frames(program)) as monitor:
        assert monitor.process.stderr is not None
        assert monitor.process.stderr.readline() == b"err\n"
        with monitor.client() as client:
            client.send(Type.READ, 7, 0, b"/proc/sys/kernel/ostype")
            assert client.receive().payload == b"Linux\n"
        code, out, err = monitor.wait()
        assert (code, len(out), err) == (0, 3_000_000, b"end\n")


def test_an_input_that_the_workload_closes_is_closed(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("sh", "-c", "exec <&-; sleep 1000"))) as monitor:
        stream = monitor.process.stdin
        assert stream is not None
        with pytest.raises(BrokenPipeError):
            until(lambda: stream.write(b"x") and stream.flush(), "a broken pipe")
        monitor.process.stdin = None
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    program = Program()
    program.exec("execute", ["/bin/no-such"], ["no-such"], [])
    compiled = program.compile()
    with Monitor(tmp_path, main_frames(compiled.data)) as monitor:
        error = frames.failure(monitor.report(), compiled.steps)
        assert isinstance(error, CommandNotFound)
        assert monitor.wait()[0] == 125


def test_a_failed_set_up_is_reported(tmp_path: Path) -> None:
    program = Program()
    program.call("enter nothing", "chdir", "/no/such/place")
    compiled = program.compile()
    script = frames.run(10, compiled.data, Mode.SETUP) + main_frames(simple("true"))
    with Monitor(tmp_path, script) as monitor:
        frame = monitor.report()
        assert frame.id == 10
        assert frames.failure(frame, compiled.steps).errno == errno.ENOENT
        monitor.wait()


@pytest.mark.parametrize("vmm", [["/bin/false"], ["/no/such/vmm"]])
def test_a_vmm_that_ends_is_reported(tmp_path: Path, vmm: list[str]) -> None:
    with Monitor(tmp_path, main_frames(simple("true")), vmm=vmm) as monitor:
        frame = monitor.report()
        assert "the guest ended" in str(frames.failure(frame, []))
        assert monitor.wait()[0] == 125
        assert monitor.detail()["reason"] == "failed"


def test_the_consoles_last_words_are_in_the_report(tmp_path: Path) -> None:
    vmm = ["/bin/sh", "-c", "echo booting; echo; printf 'no \\033[31mdisk\\n' >&2; exit 1"]
    with Monitor(tmp_path, main_frames(simple("true")), vmm=vmm) as monitor:
        said = str(frames.failure(monitor.report(), []))
        assert "the guest ended" in said
        assert said.endswith("; its console's last words: booting / no  [31mdisk")
        monitor.wait()


def test_a_client_s_failed_set_up_spoils_nothing(tmp_path: Path) -> None:
    program = Program()
    program.call("enter nothing", "chdir", "/no/such/place")
    good = Program()
    good.call("enter something", "chdir", "/")
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        place = str(tmp_path / "guest.sock")
        with Link(os.getpid(), place=place) as link, pytest.raises(LaunchFailed, match="nothing"):
            link.set_up(program)
        with Link(os.getpid(), place=place) as link:
            link.set_up(good)
        with Link(os.getpid(), place=place) as link:
            assert link.read("/proc/self/comm") == b"bulkhead-guest\n"
        done = monitor.exec(frames.run(1, simple("echo", "still here"), Mode.PIPES))
        assert done.communicate(timeout=DEADLINE_S) == (b"still here\n", b"")


def test_a_vmm_that_ends_later_ends_the_workload(tmp_path: Path) -> None:
    script = main_frames(simple("sh", "-c", "echo out; sleep 1000"))
    vmm = ["/bin/sh", "-c", f"echo $$ >{tmp_path}/pid; exec {' '.join(vmm_command())}"]
    with Monitor(tmp_path, script, vmm=vmm) as monitor:
        assert monitor.process.stdout is not None
        assert monitor.process.stdout.readline() == b"out\n"
        monitor.report()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        code, _, err = monitor.wait()
        assert code == 125
        assert err == b"bulkhead-monitor: the guest ended\n"


def test_exec(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        echo = simple("sh", "-c", "cat; echo err >&2; exit 5")
        running = [monitor.exec(frames.run(1, echo, Mode.PIPES)) for _ in range(5)]
        for number, process in enumerate(running):
            text = f"number {number}".encode()
            assert process.communicate(text, timeout=DEADLINE_S) == (text, b"err\n")
            assert process.returncode == 5


def test_exec_of_nothing(tmp_path: Path) -> None:
    program = Program()
    program.exec("execute", ["/bin/no-such"], ["no-such"], [])
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        process = monitor.exec(frames.run(1, program.compile().data, Mode.PIPES))
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 127


def test_an_exec_that_is_killed_takes_its_process_along(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        process = monitor.exec(frames.run(1, simple("sh", "-c", "echo on; sleep 1001"), Mode.PIPES))
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.kill()
        out, _ = process.communicate(timeout=DEADLINE_S)  # its end: nobody in the guest writes
        assert out == b""


def test_a_signal_to_exec(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("sleep", "1000"))) as monitor:
        monitor.report()
        process = monitor.exec(
            frames.run(1, simple("sh", "-c", "echo on; exec sleep 1001"), Mode.PIPES)
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 128 + signal.SIGTERM


def test_a_terminal(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 33, 99, 0, 0))
    script = "read line; stty size; echo got $line; read line; stty size"
    program = main_frames(terminal("sh", "-c", script), Mode.TERMINAL, rows=24, columns=80)
    with Monitor(tmp_path, program, streams=(slave, slave, slave)) as monitor:
        os.close(slave)
        monitor.report()
        os.write(master, b"key\r")
        _read_until(master, b"got key\r\n", b"33 99\r\n")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
        monitor.process.send_signal(signal.SIGWINCH)  # it is not this terminal's session
        with monitor.client() as client:  # behind the resize in the one queue
            client.send(Type.READ, 7, 0, b"/proc/sys/kernel/ostype")
            client.receive()
        os.write(master, b"\r")
        _read_until(master, b"40 120\r\n")
        assert monitor.process.wait(DEADLINE_S) == 0
    os.close(master)


def _read_until(master: int, *wanted: bytes) -> None:
    seen = b""
    deadline = time.monotonic() + DEADLINE_S
    while not all(text in seen for text in wanted):
        assert select.select([master], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(master, 1 << 16)


def test_killing_the_monitor_ends_the_guest(tmp_path: Path) -> None:
    vmm = ["/bin/sh", "-c", f"echo $$ >{tmp_path}/pid; exec {' '.join(vmm_command())}"]
    with Monitor(tmp_path, main_frames(simple("sleep", "1000")), vmm=vmm) as monitor:
        monitor.report()
        pid = int((tmp_path / "pid").read_text())
        monitor.process.kill()
        monitor.process.wait()
        until(lambda: _gone(pid), "the guest's end")


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_clone_is_greeted_first(tmp_path: Path) -> None:
    with Monitor(tmp_path, main_frames(simple("echo", "hi")), options=["--clone"]) as monitor:
        assert monitor.wait()[:2] == (0, b"hi\n")


def test_usage() -> None:
    done = subprocess.run([program_path("bulkhead-monitor")], capture_output=True, check=False)
    assert done.returncode == 125 and b"usage" in done.stderr
